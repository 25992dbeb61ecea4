"""docs/scale.md has the tables that bench/scale.py prints."""

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("scale")


def test_the_page_has_the_tables(scale: Any) -> None:
    page = (ROOT / "docs/scale.md").read_text()
    for table in (scale.memory_table(), scale.step_table(scale.TOKENS), scale.decode_table()):
        assert table in page


def test_sizes_are_those_of_llama_2(scale: Any) -> None:
    sizes = {name: model.quantised() + model.others() for name, model in scale.MODELS.items()}
    assert sizes == {"7B": 6_738_415_616, "70B": 68_976_648_192}
