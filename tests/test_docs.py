"""The code in the documentation runs."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Each page with blocks of Python, and the libraries that it needs.
PAGES = {
    "accelerate.md": ("accelerate",),
    "export.md": ("onnx", "onnxscript", "onnxruntime"),
    "gguf.md": ("gguf", "transformers"),
    "language-models.md": ("transformers",),
    "lightning.md": ("lightning",),
    "memory.md": (),
    "peft.md": ("peft", "transformers"),
    "transformers.md": ("transformers", "accelerate"),
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_page_is_listed() -> None:
    assert sorted(PAGES) == sorted(page.name for page in DOCS.glob("*.md") if "```python" in page.read_text())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in their order, in one namespace and an empty folder."""
    for library in PAGES[name]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        lines_before = text[: block.start(1)].count("\n")
        exec(
            compile("\n" * lines_before + block[1], str(page), "exec"), namespace
        )  # so that errors have its lines
