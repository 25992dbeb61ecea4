"""Packed layers in pytest-benchmark, beside the same product in plain PyTorch. bench/gemm.py has the full table."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from quantopt.nn import BinaryLinear
from quantopt.reference import binary as reference


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("which", ["exact", "int8", "reference", "torch fp32"])
def test_linear(benchmark: BenchmarkFixture, which: str, rows: int) -> None:
    torch.set_num_threads(1)
    linear = nn.Linear(1024, 1024)
    layer = BinaryLinear.from_linear(linear, compute="int8" if which == "int8" else "exact")
    x = torch.randn(rows, 1024)
    benchmark.group = f"linear 1024x1024, {rows} rows"
    with torch.inference_mode():
        if which == "torch fp32":
            benchmark(linear, x)
        elif which == "reference":
            benchmark(reference.binary_linear, x, layer.packed)
        else:
            y = benchmark(layer, x)
            expected = x @ layer.weight.T + layer.bias
            assert float((y - expected).norm() / expected.norm()) < 0.02
