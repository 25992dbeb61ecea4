"""The bits of steps and products are those that are on record (tests/golden.py)."""

import json

import pytest
import torch

import golden
from quantopt import _extension

KNOWN = json.loads(golden.FILE.read_text())
pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


@pytest.mark.parametrize("part", KNOWN)
def test_bits(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, isa = part.split()
    if not torch.ops.quantopt.cpu_isa_supported(isa):
        pytest.skip(f"{isa} is not built or not supported by this processor")
    monkeypatch.setenv("QUANTOPT_CPU_ISA", isa)
    torch.ops.quantopt.read_cpu_isa()
    found = golden.steps() if kind == "steps" else golden.products(isa)
    assert {name: found[name] for name in KNOWN[part]} == KNOWN[part]
