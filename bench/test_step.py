"""The fused step in pytest-benchmark, beside the reference and torch's fused SGD. bench/step.py has the full table."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.rules import RULES, StepRecord

N = 1 << 20


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", ["askew", "askew_memory", "splitting", "alternating"])
def test_flat_step(benchmark: BenchmarkFixture, rule: str, backend: str) -> None:
    torch.set_num_threads(1)
    p, g, m = torch.randn(N), torch.randn(N) * 0.1, torch.zeros(N)
    latents = [p.clone()] if RULES[rule].latent else []
    hyper = hyper_tensor(lr=0.1, momentum=0.9, epsilon=0.5, rate=0.1, cap=0.25, bound=2.0, kappa=0.1)
    before = p.clone()
    benchmark.group = f"{rule}, flat fp32 1M"
    record = StepRecord(rule, "sgd", [p], [g], [m], [], latents, [torch.ones(1)], [], [], hyper)
    benchmark(fused_step, record, backend)
    assert torch.isfinite(p).all() and not torch.equal(p, before)


def test_torch_fused_sgd(benchmark: BenchmarkFixture) -> None:
    torch.set_num_threads(1)
    p = nn.Parameter(torch.randn(N))
    p.grad = torch.randn(N) * 0.1
    benchmark.group = "askew, flat fp32 1M"
    benchmark(torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True).step)
