"""pack_signs and unpack_signs: inverse of each other, order of bits, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linear_cases import signs_by_definition
from quantopt.ops.weights import pack_signs, unpack_signs


@given(
    st.lists(st.lists(st.floats(width=32), min_size=11, max_size=11), min_size=1, max_size=4),
    st.integers(0, 11),
)
def test_pack_and_unpack_are_inverse(values: list[list[float]], k: int) -> None:
    w = torch.tensor(values)[:, :k]
    bits = pack_signs(w)
    assert bits.shape == (w.shape[0], (k + 7) // 8) and bits.dtype == torch.uint8
    assert torch.equal(unpack_signs(bits, k, torch.float64), signs_by_definition(w))
    assert torch.equal(pack_signs(unpack_signs(bits, k)), bits)


def test_bit_order_and_signs_of_zero() -> None:
    w = torch.full((2, 10), -1.0)
    w[0, 0], w[0, 9], w[1, 3], w[1, 4] = 1.0, 0.0, -0.0, torch.nan
    assert pack_signs(w).tolist() == [[1, 2], [8, 0]]
    assert pack_signs(torch.ones(3, 2, 9, dtype=torch.bfloat16)).tolist() == [[[255, 1]] * 2] * 3


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 4, 17)])
def test_pack_shapes(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    assert torch.equal(unpack_signs(pack_signs(w), shape[-1], torch.float64), signs_by_definition(w))


@pytest.mark.parametrize(
    ("w", "error"), [(torch.ones(3, dtype=torch.int8), TypeError), (torch.tensor(1.0), ValueError)]
)
def test_pack_signs_errors(w: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="w must"):
        pack_signs(w)
