"""Stochastic rounding to bfloat16: the random numbers, their quality, and that the CPU kernels draw them."""

import pytest
import torch
from torch import Tensor

from quantopt import _extension
from quantopt.ops.step import fused_step
from quantopt.reference.rounding import philox, stochastic_bfloat16
from step_cases import BF16, F32, Case, make

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
    apart, and of one element in the next step, the next tensor, and under the next seed."""
    numbers = halves(rounds=rounds)
    others = [numbers.roll(distance) for distance in (1, 2, 8)]
    others += [
        halves(step=2, rounds=rounds),
        halves(tensor=1, rounds=rounds),
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
