"""The style sheet of a page. It names no font and no file; the colours of the figures are its variables."""

CSS = """
:root {
  --ink: #1c2430; --soft: #5a6675; --line: #d5dae1; --paper: #ffffff; --panel: #f6f8fa; --accent: #0072b2;
  --shadow: #0004; color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ee; --soft: #9ba7b6; --line: #3a434f; --paper: #12161c; --panel: #1a2028; --accent: #56b4e9;
    --shadow: #fff5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1360px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; overflow-wrap: anywhere; }
p, ul { margin: 0 0 12px; }
p.soft, figcaption small, td small, footer { color: var(--soft); }
.soft, small, footer { font-size: 13px; overflow-wrap: anywhere; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 20px; }
ul.legend li { overflow-wrap: anywhere; min-width: 0; }
ul.legend svg { width: 30px; height: 8px; margin-right: 7px; vertical-align: middle; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 165px), 1fr)); gap: 12px; margin: 20px 0;
}
.tiles div { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.tiles b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
figure {
  margin: 0; padding: 10px 10px 6px; background: var(--panel); border-radius: 8px; min-width: 0;
  display: flex; flex-direction: column;
}
figcaption { font-weight: 600; font-size: 14px; padding: 0 4px 4px; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; display: block; }
figure svg { display: block; margin-top: auto; width: 100%; height: auto; overflow: visible; font-family: inherit; }
@media (max-width: 560px) {
  main { padding: 18px 12px 28px; }
  figure { padding: 8px 6px 6px; }
}
.scroll {
  overflow-x: auto; margin-bottom: 12px; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; background-size: 40px 100%, 40px 100%, 14px 100%, 14px 100%;
  background-position: left, right, left, right;
  background-image: linear-gradient(to right, var(--paper) 40%, transparent),
    linear-gradient(to left, var(--paper) 40%, transparent),
    linear-gradient(to right, var(--shadow), transparent), linear-gradient(to left, var(--shadow), transparent);
}
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.name { max-width: 22em; min-width: 9em; white-space: normal; overflow-wrap: anywhere; }
td.text, th.text { text-align: left; }
.spark { width: 80px; height: 20px; vertical-align: middle; color: var(--accent); margin-left: 8px; }
.bar { display: block; height: 5px; border-radius: 3px; background: var(--accent); margin: 1px 0 2px auto; }
.mark {
  display: inline-block; width: 18px; height: 4px; border-radius: 2px; margin-right: 5px; vertical-align: middle;
}
.shares { display: inline-block; width: 120px; height: 10px; border-radius: 3px; margin: 0 6px; }
details { margin-bottom: 8px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; overflow-wrap: anywhere; }
footer { margin-top: 40px; padding-top: 10px; border-top: 1px solid var(--line); }
"""
