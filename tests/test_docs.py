"""The documents hold: their code runs, their commands parse, what they quote is in the source."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quantopt
from quantopt.train import cli, recipes
from quantopt.train.lm import config as lm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Each page with blocks of Python that run here, and the libraries that it needs.
PAGES = {
    "README.md": ("sklearn",),
    "accelerate.md": ("accelerate",),
    "export.md": ("onnx", "onnxscript", "onnxruntime"),
    "file-format.md": (),
    "gguf.md": ("gguf", "transformers"),
    "language-models.md": ("transformers",),
    "lightning.md": ("lightning",),
    "memory.md": (),
    "peft.md": ("peft", "transformers"),
    "transformers.md": ("transformers", "accelerate"),
    "tutorial.md": ("sklearn",),
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run by tests/test_docs.py: (.+) -->\n$")  # the line before a block
# What stands for something else in a command of a page.
PLACEHOLDERS = {"OPTIMIZER": "askew", "RATE": "0.1", "DATA": "digits", "COMMAND": "env"}


def path_of(page: str) -> Path:
    return ROOT / page if page == "README.md" else DOCS / page


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, source, why it is not run here or None) of each block of Python; the source has the lines of the page."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        if fence[1] == "python":
            line = text[: fence.start(2)].count("\n")
            mark = NOT_RUN.search(text[: fence.start()])
            yield line, "\n" * line + fence[2], mark and mark[1]


MARKED = [(page, *block) for page in pages() for block in blocks(page) if block[2]]


def test_every_block_is_seen() -> None:
    """A fence says what it holds, so that no Python escapes, and every page with Python that runs is listed."""
    for page in pages():
        text = page.read_text()
        assert {fence[1] for fence in FENCE.finditer(text)} <= {"python", "sh", "text"}, page
        assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(FENCE.findall(text)), page
        assert text.count("<!-- not run") == sum(marked == page for marked, *_ in MARKED), page
    run = [page.name for page in pages() if any(why is None for *_, why in blocks(page))]
    assert sorted(PAGES) == sorted(run)


@pytest.mark.parametrize(
    ("page", "line", "source", "why"), MARKED, ids=[f"{page.name}:{line}" for page, line, *_ in MARKED]
)
def test_marked_block(page: Path, line: int, source: str, why: str) -> None:
    """A block that is not run here compiles, and the summary of the tests has the reason."""
    compile(source, str(page), "exec")
    pytest.skip(f"{page.name}:{line} compiles, not run: {why}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks in their order, in one namespace and an empty folder."""
    for library in PAGES[name]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    page = path_of(name)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for _, source, why in blocks(page):
        if why is None:
            exec(compile(source, str(page), "exec"), namespace)
    if name == "README.md":
        printed = r"([\d.]+)% right, ([\d,]+ bytes of [\d,]+)\n"
        (right, size), (right_then, size_then) = (
            re.search(printed, output).groups()  # type: ignore[union-attr]
            for output in (capsys.readouterr().out, page.read_text())
        )
        assert size == size_then and abs(float(right) - float(right_then)) < 2


# ---- commands ------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of the commands in the blocks of all pages, and of those of Python between backticks."""
    line = re.compile(r"^ *((?:\w+=\S+ )*(?:quantopt|python|torchrun|bench/\S+\.sh) .+)$", re.MULTILINE)
    for page in pages():
        text = page.read_text().replace("\\\n", " ")
        fenced = [fence[2] for fence in FENCE.finditer(text) if fence[1] == "sh"]
        text = FENCE.sub("", text)
        indented = re.findall(r"^ {4}.*$", text, re.MULTILINE)
        between = [span.replace("\n", " ") for span in re.findall(r"`(python [^`]+)`", text)]
        for found in line.finditer("\n".join([*fenced, *indented, *between])):
            words = shlex.split(found[1], comments=True)
            yield page.name, [PLACEHOLDERS.get(word, word) for word in words]


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option and every recipe of the commands is there."""
    seen = 0
    for page, words in commands():
        while "=" in words[0]:
            words = words[1:]
        if "-m" in words and words[words.index("-m") + 1] == "quantopt":
            words = words[words.index("-m") + 1 :]
        where = f"{page}: {' '.join(words)}"
        if words[0] == "quantopt":
            try:
                arguments = cli._parser().parse_args(words[1:])
            except SystemExit as stop:
                raise AssertionError(where) from stop
            names = getattr(arguments, "recipes", None) or [getattr(arguments, "recipe", None)]
            for name in names:
                known = lm.names() if arguments.command == "lm" else recipes.names()
                assert name is None or name.endswith(".toml") or name in known, where
        elif words[1] == "-m":
            if words[2].startswith("quantopt"):
                module = importlib.import_module(words[2])
                monkeypatch.setattr(module, "guarded", lambda *_: 0)  # what runs after the options are read
                try:
                    assert module.main(words[3:]) == 0, where
                except SystemExit as stop:
                    raise AssertionError(where) from stop
        else:
            script = ROOT / (words[0] if words[0].endswith(".sh") else words[1])
            source = script.read_text() + (ROOT / "bench" / "common.py").read_text()
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in source, where
        seen += 1
    assert seen > 30


# ---- errors --------------------------------------------------------------------------------------------------------


def _text(node: ast.expr) -> str | None:
    """A message as the source has it, … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "…") + (_text(node.right) or "…")
    return None


def messages() -> str:
    """Every message of the package, one a line; of an InputError behind its argument."""
    found = []
    for path in (ROOT / "quantopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                texts = [text for argument in node.args if (text := _text(argument))]
                found += [": ".join(texts), *texts]
            elif isinstance(node, ast.Return | ast.Assign) and node.value and (text := _text(node.value)):
                found.append(text)
    return "\n".join(" ".join(text.split()) for text in found)


QUOTED = re.findall(r"^```text\n(.*?)\n```$", (DOCS / "errors.md").read_text(), re.DOTALL | re.MULTILINE)


def test_errors_are_in_the_source() -> None:
    """docs/errors.md quotes what something says."""
    assert len(QUOTED) > 30
    said = messages()
    patterns = {quoted: ".*".join(re.escape(part.strip()) for part in quoted.split("…")) for quoted in QUOTED}
    assert not [quoted for quoted, pattern in patterns.items() if not re.search(pattern, said)]


# ---- what is listed ------------------------------------------------------------------------------------------------


def test_every_public_name_has_an_entry() -> None:
    entries = set(
        re.findall(r"^::: (\S+)", "".join(page.read_text() for page in DOCS.glob("api/*.md")), re.MULTILINE)
    )
    documented = {entry.rpartition(".")[2] for entry in entries}
    for module in ("quantopt", "quantopt.nn", "quantopt.packing", "quantopt.optim"):
        public = set(importlib.import_module(module).__all__)
        assert public - documented <= {"__version__", "nn", "optim"}
    assert "quantopt.gguf" in entries
    for path in (ROOT / "quantopt/integrations").glob("[a-z]*.py"):
        assert f"quantopt.integrations.{path.stem}" in entries


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    """Those of the site are checked where it is built."""
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert "://" in link or (ROOT / link).exists(), link


def test_versions() -> None:
    version = quantopt.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()


def test_every_command_has_a_row() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    (commands,) = [action.choices for action in cli._parser()._actions if action.dest == "command"]
    assert sorted(named) == sorted(commands or ())
