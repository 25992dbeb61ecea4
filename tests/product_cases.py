"""Products with packed weights of random numbers, and how they are compared: what the tests of the CUDA kernels on the
host and on a device share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_host import placing
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import ConvGeometry, PackedWeight
from quantopt.reference import binary as reference

KERNELS = ("gemv", "mma", "cublas", "wgmma")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (8, 32, 1024),
    (8, 128, 256),
    (16, 128, 256),
    (32, 256, 128),
    (64, 256, 128),
)  # of mma: tokens, rows, depth
WGMMA_TOKENS, WGMMA_ROWS = (64, 128), 256


class LinearCase:
    """A product with random weights; its exact result, and what the error is relative to."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        int8: bool = False,
        group: int = 0,
        plane_weights: Sequence[int] = (1,),
        x: Tensor | None = None,
        one_scale: bool = False,
        bias: bool = True,
        activation: str = "none",
    ) -> None:
        self.x = torch.randn(m, k).to(dtype) if x is None else x
        self.int8, self.group, self.activation, self.k = int8, group, activation, k
        self.plane_weights = list(plane_weights)
        self.bits = pack_signs(torch.randn(len(self.plane_weights), n, k))
        if k % 8:
            self.bits[..., -1] |= (0xFF << (k % 8)) & 0xFF  # bits beyond K must not matter
        shape = [n, -(-k // group)] if group else [1 if one_scale else n]
        self.scale = torch.rand(shape) + 0.5
        self.bias = torch.randn(n) if bias else None

    def run(
        self,
        host: Any,
        kernel: str = "",
        shape: int = -1,
        splits: int = 1,
        *,
        capability: int = 90,
        processors: int = 4,
        device: str = "cpu",
        compute: str = "",
    ) -> Tensor:
        """y by ``kernel`` ("": the one of the table), mma divided by ``shape`` and ``splits`` (-1: as planned)."""
        tensors = [self.x, self.bits, self.scale, self.bias]
        with placing(host, device, capability, processors) as place:
            x, bits, scale, bias = (None if t is None else place(t) for t in tensors)
            compute = compute or ("int8" if self.int8 else "exact")
            tail = (self.group, compute, host.binary_tiles(bits, self.k), self.activation)
            if not kernel:
                y = host.binary_linear(x, bits, scale, bias, self.k, self.plane_weights, *tail)
            else:
                by_kernel = torch.ops.quantopt_by_kernel if host is torch.ops.quantopt else host
                y = by_kernel.binary_linear_by(
                    x, bits, scale, bias, self.k, self.plane_weights, kernel, shape, splits, *tail
                )
        return y.cpu().clone()

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.bits, self.scale, self.bias, self.k, self.plane_weights, self.group)

    def expected(self) -> tuple[Tensor, Tensor]:
        """y in float64, and the sum of the magnitudes."""
        x = self.x
        if self.int8:
            q, s = reference.quantize_rows(x.float())
            x = q.double() * s.double()
        weight = reference.dense_weight(self.weight, torch.float64)
        y, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size

    def check(self, y: Tensor) -> None:
        expected, size = self.expected()
        error = (y.double() - expected).abs()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
        allowed = 1e-6 * size + rounding * expected.abs() + 1e-30
        assert bool((error <= allowed).all()), float((error / allowed).max())

    def check_bits(self, y: Tensor) -> None:
        """Whole sums: the reference's bits."""
        assert self.int8 and not self.group
        expected = reference.binary_linear(self.x, self.weight, "int8")
        assert torch.equal(y, expected)


class ConvCase:
    """A convolution with random weights, and its exact result."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        *,
        dtype: torch.dtype = torch.bfloat16,
        int8: bool = False,
        plane_weights: Sequence[int] = (1,),
        bias: bool = True,
        activation: str = "none",
        channels_last: bool = True,
    ) -> None:
        self.x = torch.randn(shape).to(dtype)
        if channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.channels, self.taps = shape[1] // groups, kernel[0] * kernel[1]
        self.geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
        self.form = (*self.geometry, list(plane_weights))
        self.int8, self.activation = int8, activation
        k = self.channels * self.taps
        self.bits = pack_signs(torch.randn(len(plane_weights), outputs, k))
        if k % 8:
            self.bits[..., -1] |= (0xFF << (k % 8)) & 0xFF  # bits beyond K must not matter
        self.scale = torch.rand(outputs) + 0.5
        self.bias = torch.randn(outputs) if bias else None

    def run(
        self,
        host: Any,
        *,
        tiles: bool = True,
        capability: int = 90,
        processors: int = 4,
        device: str = "cpu",
        compute: str = "",
    ) -> Tensor:
        tensors = [self.x, self.bits, self.scale, self.bias]
        with placing(host, device, capability, processors) as place:
            x, bits, scale, bias = (None if t is None else place(t) for t in tensors)
            derived = host.binary_conv_tiles(bits, self.channels, self.taps, self.form[4]) if tiles else None
            compute = compute or ("int8" if self.int8 else "exact")
            y = host.binary_conv2d(x, bits, scale, bias, *self.form, 0, compute, derived, self.activation)
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y.cpu().clone()

    def check(self, y: Tensor) -> None:
        def result(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, weights: Any) -> Tensor:
            weight = PackedWeight(bits, scale, bias, self.channels * self.taps, weights)
            return reference.binary_conv2d(x, weight, self.geometry, compute)

        compute = "int8" if self.int8 else "exact"
        bias = None if self.bias is None else self.bias.double()
        x = self.x.float().double() if self.int8 else self.x.double()
        if self.int8:
            q, s = reference.quantize_rows(self.x.float().flatten(1))
            x = (q.double() * s.double()).view(self.x.shape)
            compute = "exact"
        expected = result(x, self.bits, self.scale.double(), bias, self.form[5])
        ones = torch.full_like(self.bits, 255)
        size = result(x.abs(), ones, self.scale.double(), None if bias is None else bias.abs(), self.form[5])
        if self.activation == "relu":
            expected = expected.relu()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
        assert y.dtype == self.x.dtype and y.shape == expected.shape
        error, allowed = (y.double() - expected).abs(), 1e-6 * size + rounding * expected.abs() + 1e-30
        assert bool((error <= allowed).all()), float((error / allowed).max())

    def check_bits(self, y: Tensor) -> None:
        """Whole sums, then one rounding for the scales, the product, the bias and the type each."""
        q, s = reference.quantize_rows(self.x.float().flatten(1))
        one = torch.ones(1, dtype=torch.float64)
        weight = PackedWeight(self.bits, one, None, self.channels * self.taps, self.form[5])
        sums = reference.binary_conv2d(q.double().view(self.x.shape), weight, self.geometry)
        expected = sums.float() * (self.scale.view(1, -1, 1, 1) * s.view(-1, 1, 1, 1))
        if self.bias is not None:
            expected = expected + self.bias.view(1, -1, 1, 1)
        if self.activation == "relu":
            expected = expected.relu()
        assert torch.equal(y, expected.to(y.dtype))


CONVS: list[tuple[Any, ...]] = [
    ((2, 64, 5, 6), 32),
    ((1, 3, 7, 7), 5, (3, 3), (2, 2)),
    ((1, 130, 4, 3), 33, (3, 2), (1, 2), (2, 0), (2, 1)),
    ((3, 65, 3, 3), 129, (1, 1), (1, 1), (0, 0)),
    ((1, 16, 9, 11), 260, (5, 3), (3, 1), (4, 2), (1, 3)),
    ((2, 48, 4, 5), 40, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    ((1, 128, 2, 2), 8, (7, 7), (1, 1), (3, 3)),
    ((2, 8, 12, 12), 24, (3, 3), (1, 1), (0, 0), (5, 5)),
]
