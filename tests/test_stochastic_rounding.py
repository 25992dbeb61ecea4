"""Stochastic rounding to bfloat16: the random numbers, their quality, that the CPU kernels draw them; exp_avg_sq."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import step_cases
from quantopt import _extension
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.reference.rounding import STATE_TENSOR, philox, stochastic_bfloat16
from quantopt.rules import StepRecord
from step_cases import BF16, F16, F32, Case, make, map_lists, narrow_cases

SEED = 2**40 + 77
COUNT = 1 << 21


def halves(step: int = 1, tensor: int = 0, seed: int = SEED, *, rounds: int = 7) -> Tensor:
    """The first COUNT random numbers of 16 bits of a tensor."""
    words = philox(torch.arange(COUNT // 8), step, tensor, seed, rounds)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)


def deviation(numbers: Tensor) -> float:
    """Of the counts of 16-bit numbers from equal ones: chi-square, in standard deviations from its mean."""
    counts = torch.bincount(numbers, minlength=1 << 16).double()
    freedom = counts.numel() - 1
    expected = counts.mean()
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def worst(*, rounds: int = 7) -> float:
    """The largest deviation of the numbers, and of pairs of their high or low bytes: of neighbours, of elements 2 and 8
    apart, and of one element in the next step, the next tensor, exp_avg_sq, and under the next seed."""
    numbers = halves(rounds=rounds)
    others = [numbers.roll(distance) for distance in (1, 2, 8)]
    others += [
        halves(step=2, rounds=rounds),
        halves(tensor=1, rounds=rounds),
        halves(tensor=STATE_TENSOR, rounds=rounds),
        halves(seed=SEED + 1, rounds=rounds),
    ]
    pairs = [(numbers >> 8) * 256 + (other >> 8) for other in others]
    pairs += [(numbers & 0xFF) * 256 + (other & 0xFF) for other in others]
    return max(deviation(values) for values in (numbers, *pairs))


def test_philox_known_answers() -> None:
    """Random123's published vectors for philox4x32 of 7 rounds."""
    zeros = philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)
    assert zeros.tolist() == [[0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]]
    ones = philox(torch.tensor([-1]), 0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1)
    assert ones.tolist() == [[0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]]
    block = torch.tensor([0x85A308D3243F6A88 - 2**64])
    pi = philox(block, 0x13198A2E, 0x03707344, 0x299F31D0A4093822)
    assert pi.tolist() == [[0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]]


def test_random_numbers_are_uniform_and_independent() -> None:
    assert worst() < 4
    assert worst(rounds=6) > 8  # one round less shows: the same element of two tensors


def test_rounding_error_has_mean_zero_and_neighbours_err_independently() -> None:
    x = torch.rand(COUNT, generator=torch.Generator().manual_seed(0)) + 1
    error = (stochastic_bfloat16(x, 1, 0, SEED).double() - x.double()) * 2**7  # in units of the last place
    deviations = (error / error.std() * COUNT**0.5).mean()
    assert abs(float(deviations)) < 4
    for distance in (1, 2, 3, 8):
        correlation = float((error * error.roll(distance)).mean() / error.square().mean())
        assert abs(correlation) < 4 / COUNT**0.5
    fraction = (x.double() * 2**7) % 1
    up = error > 0
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (fraction > low) & (fraction < low + 0.25)
        expected = float(fraction[inside].mean())
        assert float(up[inside].double().mean()) == pytest.approx(expected, abs=4 / int(inside.sum()) ** 0.5)


@pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
@pytest.mark.parametrize("size", [5, 8 * 1031 + 3, 3 * 16384 + 40])
def test_kernels_draw_the_numbers_of_the_reference(isa: str, size: int) -> None:
    """All 16 bits of them: 1 + f 2^-23 goes up if f is 2^16 less the number or more, and a search over f finds it."""
    case = Case("none", 2, "sgd", "tensor", BF16, F32, lr=1.0, weight_decay=0.0, momentum=1.0, seed=SEED)
    record = make(case, [(3,), (size,)])
    number = torch.zeros(size, dtype=torch.int64)
    for bit in reversed(range(16)):
        tried = number | 1 << bit
        for p, g, step in zip(record.params, record.grads, record.steps, strict=True):
            p.fill_(1.0)
            g.zero_()
            step.fill_(3.0)
        record.momentum_buffers[1].copy_(
            (tried - 2**16) * 2.0**-23
        )  # the weight becomes 1 + (2^16 - tried) 2^-23
        fused_step(record, backend="cpu")
        number = torch.where(record.params[1] > 1, tried, number)
    words = philox(torch.arange(-(-size // 8)), 4, 1, SEED)
    assert torch.equal(number, torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[:size])


# ---- exp_avg_sq --------------------------------------------------------------------------------------------------

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def second_moments(record: StepRecord, beta2: float) -> list[Tensor]:
    """exp_avg_sqs after the next step, by the equations and the random numbers of docs/algorithms.md."""
    exact = [
        beta2 * v.float() + (1 - beta2) * g.float() * g.float()
        for v, g in zip(record.exp_avg_sqs, record.grads, strict=True)
    ]
    return [stochastic_bfloat16(v, 4, 2**31 + n, record.state_seed) for n, v in enumerate(exact)]


@needs_extension
def test_exp_avg_sq_in_bfloat16_follows_the_float64_reference(isa: str) -> None:
    for case in narrow_cases():
        ours, before = (make(case, [(129,), (0, 4), (7, 1031)]) for _ in range(2))
        fused_step(ours, backend="cpu")
        step_cases.check(case, ours, before)


@needs_extension
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    rule=st.sampled_from(["none", "askew_memory", "alternating", "splitting"]),
    dtype=st.sampled_from([F32, BF16, F16]),
    momentum_dtype=st.sampled_from([F32, BF16]),
    rows=st.integers(1, 4),
    length=st.integers(1, 1200),
    size=st.integers(1, 700),
    dynamic=st.booleans(),
    lr=st.sampled_from([0.0, 0.1]),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_exp_avg_sq_has_the_bits_of_its_definition(
    rule: str, dtype: torch.dtype, momentum_dtype: torch.dtype, rows: int, length: int, size: int, dynamic: bool,
    lr: float, backend: str,
) -> None:  # fmt: skip
    """However a step is divided into spans, groups and stages, and also at lr = 0."""
    case = Case(
        rule, 2, "adam", "group" if rule != "none" else "tensor", dtype, momentum_dtype, group_size=size,
        dynamic_scale=dynamic and rule in ("alternating", "splitting"), weight_decay=0.0, lr=lr, exp_avg_sq_dtype=BF16,
    )  # fmt: skip
    record = make(case, [(3,), (rows, length)])
    expected = second_moments(record, case.beta2)
    fused_step(record, backend=backend)
    assert all(map(torch.equal, record.exp_avg_sqs, expected))


@needs_extension
def test_exp_avg_sq_on_every_instruction_set_and_in_chunks(isa: str) -> None:
    for dtype in (F32, BF16):
        seed = SEED if dtype == BF16 else -1
        case = Case(
            "none", 2, "adam", "tensor", dtype, dtype, seed=seed, weight_decay=0.0, exp_avg_sq_dtype=BF16
        )
        record = make(case, [(5,), (8 * 1031 + 3,), (3 * 16384 + 40,)])
        special = record.exp_avg_sqs[2]
        special[:4] = torch.tensor([torch.inf, torch.nan, 3.3e38, 1e-40])
        expected = second_moments(record, case.beta2)
        fused_step(record, backend="cpu")
        for ours, theirs in zip(record.exp_avg_sqs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert special[0].isinf() and special[1].isnan() and special[2].isfinite()


@needs_extension
def test_exp_avg_sq_decays_where_rounding_to_nearest_stalls() -> None:
    """beta2 = 0.999 moves v by less than half of the distance of two bfloat16 numbers."""
    steps, beta2 = 700, 0.999
    case = Case("none", 2, "adam", "tensor", weight_decay=0.0, beta2=beta2, lr=0.0, exp_avg_sq_dtype=BF16)
    record = make(case, [(4096,)])
    record.grads[0].zero_()
    record.exp_avg_sqs[0].fill_(1.0)
    nearest = torch.ones(1, dtype=BF16)
    for _ in range(steps):
        fused_step(record, backend="cpu")
        nearest = (nearest.float() * beta2).bfloat16()
    v = record.exp_avg_sqs[0].double()
    assert float(nearest) == 1.0
    assert float(v.mean()) == pytest.approx(beta2**steps, abs=5 * float(v.std()) / 64)
    assert float(v.std()) < 0.05


@needs_extension
def test_parameter_and_exp_avg_sq_are_rounded_independently() -> None:
    """Though both have the same seed, and half of the last place to lose."""
    case = Case(
        "none", 2, "adam", "tensor", BF16, BF16, seed=SEED, lr=2.0**-9, exp_avg_sq_dtype=BF16, adam_eps=0.0
    )
    record = make(case, [(1 << 16,)])._replace(state_seed=SEED)
    p, g, m, v = (
        tensors[0] for tensors in (record.params, record.grads, record.momentum_buffers, record.exp_avg_sqs)
    )
    record.hyper.copy_(hyper_tensor(lr=2.0**-9, momentum=0.0, beta2=0.5))  # d = sqrt(1 - beta2^k) g / sqrt(v)
    p.fill_(0.75), g.fill_(1.0), m.zero_(), v.fill_(1 + 2.0**-7)
    record.steps[0].fill_(99.0)
    fused_step(record, backend="cpu")
    up, larger = (p == p.max()).double(), (v == v.max()).double()
    assert {len(p.unique()), len(v.unique())} == {2}
    correlation = torch.corrcoef(torch.stack([up, larger]))[0, 1]
    assert abs(float(correlation)) < 5 / 2**8


@needs_extension
def test_random_numbers_follow_the_memory_of_a_tensor() -> None:
    """Of weights and exp_avg_sq in channels_last, by the kernel and by the reference."""
    case = Case("none", 2, "adam", "tensor", BF16, seed=SEED, lr=0.0, exp_avg_sq_dtype=BF16)
    records = [map_lists(make(case, [(4, 6, 3, 3)]), _in_channels_last, keep=("steps",)) for _ in range(2)]
    for record, backend in zip(records, ("cpu", "reference"), strict=True):
        fused_step(record, backend=backend)
    assert torch.equal(records[0].exp_avg_sqs[0], records[1].exp_avg_sqs[0])


def _in_channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


BAD_MOMENTS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "rounding to nearest would stall; pass state_seed", dict(state_seed=-1)),
    (ValueError, "state_seed is for bfloat16 exp_avg_sqs", dict(exp_avg_sqs=[torch.ones(3), torch.ones(4)])),
    (
        TypeError,
        r"exp_avg_sqs\[1\] is .*loat.*, exp_avg_sqs\[0\]",
        dict(exp_avg_sqs=[torch.ones(3).bfloat16(), torch.ones(4)]),
    ),
]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize(("error", "message", "changes"), BAD_MOMENTS)
def test_second_moments_that_do_not_fit_are_refused(
    error: type[Exception], message: str, changes: dict[str, Any], backend: str
) -> None:
    record = make(Case("askew", 2, "adam", "tensor", exp_avg_sq_dtype=BF16), [(3,), (4,)])
    before = map_lists(record, Tensor.clone)
    with pytest.raises(error, match=message):
        fused_step(record._replace(**changes), backend=backend)
    assert all(map(torch.equal, [*record.params, *record.steps], [*before.params, *before.steps]))
