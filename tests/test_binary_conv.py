"""binary_conv2d against torch's convolution in float64."""

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from quantopt import _extension
from quantopt.nn import BinaryConv2d
from quantopt.ops.conv2d import binary_conv2d
from quantopt.ops.inputs import ACTIVATIONS, COMPUTE
from quantopt.ops.tiles import conv_tiles
from quantopt.ops.weights import pack_signs, unpack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def check(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    compute: str = "exact",
    group_size: int = 0,
    **geometry: object,
) -> None:
    """w holds the signs; geometry is what F.conv2d takes."""
    values = x.to(torch.bfloat16).double() if compute == "bf16" else x.double()
    if compute == "int8":
        s = x.float().abs().amax((-3, -2, -1), keepdim=True) / 127
        values = torch.where(s > 0, (x.float() / s).round().clamp(-127, 127), 0.0).double() * s.double()
    scales = scale.double().view(-1, 1)
    if group_size:
        if compute == "int8" and not x.requires_grad:  # with gradients the reference runs
            levels, r = reference.quantize_rows(scale)
            scale = levels.double() * r.double()
        scales = scale.double().repeat_interleave(group_size, 1)[:, : w[0].numel()]
    weight = (torch.where(w >= 0, 1.0, -1.0).double().flatten(1) * scales).view(w.shape)
    expected = F.conv2d(values, weight, None if bias is None else bias.double(), **geometry)  # type: ignore[arg-type]
    size = F.conv2d(values.abs(), weight.abs(), None, **geometry) + 1  # type: ignore[arg-type]
    bits = pack_signs(w.flatten(1))
    for tiles in (None, conv_tiles(bits, w.shape[1], w.shape[2:], geometry.get("groups", 1), group_size)):  # type: ignore[arg-type]
        y = binary_conv2d(
            x,
            bits,
            scale,
            bias,
            kernel_size=w.shape[2:],
            compute=compute,
            group_size=group_size,
            tiles=tiles,
            **geometry,  # type: ignore[arg-type]
        )
        assert y.shape == expected.shape and y.dtype == x.dtype
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[x.dtype]
        assert bool(((y - expected).abs() <= 2e-6 * size + rounding * expected.abs()).all())


@pytest.mark.parametrize("compute", COMPUTE)
def test_geometry(isa: str, compute: str) -> None:
    cases = itertools.product([(3, 3), (1, 1), (2, 5)], [1, (2, 3)], [0, 1, (2, 1)], [1, (2, 1)], [1, 3])
    for kernel, stride, padding, dilation, groups in cases:
        w, scale, bias = torch.randn(6, 9 // groups, *kernel), torch.rand(6) + 0.5, torch.randn(6)
        x = torch.randn(2, 9, 9, 11)
        check(x, w, scale, bias, compute, stride=stride, padding=padding, dilation=dilation, groups=groups)


@pytest.mark.parametrize("compute", COMPUTE)
def test_groups(isa: str, compute: str) -> None:
    """On the packed weights, but for a group of too few channels."""
    for channels, outputs, groups in ((48, 66, 2), (60, 96, 3), (16, 16, 16)):
        w = torch.randn(outputs, channels // groups, 3, 3)
        scale, bias = torch.rand(outputs), torch.randn(outputs)
        packed = conv_tiles(pack_signs(w.flatten(1)), channels // groups, (3, 3), groups) is not None
        assert packed == (groups < 16)
        x = torch.randn(2, channels, 5, 6)
        for size in (scale, scale[:1]):
            check(x, w, size, bias, compute, stride=(1, 2), padding=1, groups=groups)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 20])
def test_scales_of_groups_of_weights(isa: str, compute: str, group_size: int) -> None:
    """Groups that end within a kernel's positions, alone too in the last chunk; some are run by ATen."""
    for channels, outputs, kernel, geometry in (
        (5, 65, (3, 3), {"padding": 1}),
        (33, 70, (3, 2), {"stride": (2, 1), "dilation": (1, 2), "padding": (2, 1)}),
        (40, 260, (1, 1), {"padding": 1}),
        (40, 6, (1, 1), {"stride": 2}),
        (66, 140, (3, 3), {"padding": 1, "groups": 2}),
        (12, 12, (3, 3), {"groups": 12}),
    ):
        features = channels // int(geometry.get("groups", 1)) * kernel[0] * kernel[1]  # type: ignore[call-overload]
        w = torch.randn(outputs, features // kernel[0] // kernel[1], *kernel)
        scale, bias = torch.rand(outputs, -(-features // group_size)) + 0.5, torch.randn(outputs)
        x = torch.randn(2, channels, 5, 6)
        for view in (x, x.bfloat16(), x[:0]):
            check(view, w, scale, bias, compute, group_size, **geometry)


@pytest.mark.parametrize("compute", COMPUTE)
def test_planes_and_scales_of_groups(isa: str, compute: str) -> None:
    bits, scale = pack_signs(torch.randn(2, 70, 20 * 9)), torch.rand(70, 6)
    x = torch.randint(-127, 128, (2, 20, 6, 5)).float()
    x[:, 0, 0, 0] = 127  # so that int8 rounds nothing
    for weights in ([1, 1], [1, 2]):
        packed = PackedWeight(bits, scale.double(), None, 180, weights, 32)
        levels = reference.level_scales(packed)
        if compute == "int8" and levels is not None:
            packed = packed._replace(scale=levels[0] * levels[1])
        weight = reference.dense_weight(packed, torch.float64).view(70, 20, 3, 3)
        for tiles in (None, conv_tiles(bits, 20, (3, 3), 1, 32)):
            y = binary_conv2d(
                x,
                bits,
                scale,
                kernel_size=3,
                group_size=32,
                plane_weights=weights,
                compute=compute,
                tiles=tiles,
            )
            torch.testing.assert_close(y, F.conv2d(x.double(), weight).float(), rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_module_keeps_tiles_of_groups_of_weights(compute: str) -> None:
    layer = BinaryConv2d(20, 65, 3, padding=1, scale="group", group_size=32, compute=compute)
    assert layer.tiles is not None or _extension.error is not None
    layer.set_weights(pack_signs(torch.randn(65, 180)), torch.rand(65, 6) + 0.5, torch.randn(65))
    x = torch.randn(2, 20, 7, 5)
    if compute == "bf16":
        x = x.bfloat16().float()
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    error = float((layer(x) - expected).detach().norm() / expected.norm())
    assert error < (2e-2 if compute == "int8" else 1e-6)


@needs_extension
def test_what_keeps_tiles_reads_them(isa: str) -> None:
    """With few outputs, beyond 1x1 and with sizes of groups that are no words, neither."""
    used = set()
    for outputs, kernel, group_size in itertools.product((6, 64), (1, 2), (16, 20)):
        layer = BinaryConv2d(40, outputs, kernel, padding=1, scale="group", group_size=group_size)
        w = torch.randn(outputs, 40 * kernel**2)
        layer.set_weights(pack_signs(w), torch.rand(layer.scale.shape) + 0.5, torch.randn(outputs))
        x = torch.randn(2, 40, 6, 5)
        expected = layer(x)
        torch.testing.assert_close(
            expected, F.conv2d(x, layer.weight, layer.bias, padding=1), rtol=1e-4, atol=1e-4
        )
        if layer.tiles is None:
            continue
        used.add((outputs, kernel, group_size))
        layer.tiles.data.bitwise_not_()  # which torch does not count
        assert torch.equal(layer(x), expected) == (isa == "portable")
    assert used == {(6, 1, 16), (64, 1, 16), (64, 2, 16)}


def test_far_apart(isa: str) -> None:
    """Kernel positions further apart than the image is high take no more memory than the image."""
    if isa == "portable":
        pytest.skip("ATen's convolution runs here")
    far = 2**30
    x, bits = torch.randn(1, 16, 3, 4), pack_signs(torch.randn(32, 16 * 9))
    y = binary_conv2d(x, bits, torch.ones(1), kernel_size=3, padding=far, dilation=far, stride=far)
    center = unpack_signs(bits, 144).view(32, 16, 3, 3)[:, :, 1:2, 1:2]
    assert y.shape == (1, 32, 1, 1)
    torch.testing.assert_close(y, F.conv2d(x, center)[:, :, :1, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1, 1], [1, 2]])
@pytest.mark.parametrize("compute", ["exact", "bf16"])
def test_infinities_with_several_planes(isa: str, weights: list[int], compute: str) -> None:
    x, bits = torch.randn(2, 16, 4, 5).to(torch.bfloat16).float(), pack_signs(torch.randn(2, 33, 144))
    x[0, 3, 1, 1], x[1, 2, 3, 3] = torch.inf, -torch.inf
    dense = reference.dense_weight(PackedWeight(bits, torch.ones(1), None, 144, weights, 0), torch.float32)
    form = {"kernel_size": 3, "plane_weights": weights, "compute": compute}
    y = binary_conv2d(x, bits, torch.ones(1), tiles=conv_tiles(bits, 16, (3, 3)), **form)
    expected = F.conv2d(x, dense.view(33, 16, 3, 3))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-4)
    assert bool(y.isinf().any())
    with_gradients = binary_conv2d(x.requires_grad_(), bits, torch.ones(1), **form)
    torch.testing.assert_close(with_gradients.detach(), expected, equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("compute", COMPUTE)
def test_1x1_is_linear(isa: str, compute: str) -> None:
    w, scale, bias = torch.randn(40, 48, 1, 1), torch.rand(40), torch.randn(40)
    for stride in (1, (2, 3)):
        check(torch.randn(3, 48, 7, 8), w, scale, bias, compute, stride=stride)
        check(torch.randn(3, 48, 7, 8), w, scale, bias, compute, stride=stride, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("compute", COMPUTE)
def test_types_and_layouts(isa: str, dtype: torch.dtype, kernel: int, compute: str) -> None:
    w, scale, bias = torch.randn(40, 20, kernel, kernel), torch.rand(40) + 0.5, torch.randn(40)
    x = torch.randn(3, 20, 7, 6).to(dtype)
    for view in (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[0],
        x[:, :, ::2],
        x[:0],
        x[:1],
    ):
        check(view, w, scale, bias, compute)
    check(x, w, scale[:1], None, compute, stride=2)
    # Channels last without saying so: the batch of a single image has any stride.
    single = torch.randn(7, 6, 20).to(dtype).permute(2, 0, 1)
    for view in (single, single[None]):
        check(view, w, scale, bias, compute)
        check(view, w, scale, bias, compute, stride=2)
        check(view, w[:, :1], scale, bias, compute, groups=20)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 47, 48, 49, 64, 255, 256, 257, 300])
def test_channels(isa: str, compute: str, channels: int) -> None:
    """In and around the words, units and chunks of the packed kernels; rows of 1 to 5 pixels; more than 128 tiles."""
    for outputs, width in ((1, 1), (33, 3), (70, 5)):
        w, scale, bias = torch.randn(outputs, channels, 3, 2), torch.rand(outputs) + 0.5, torch.randn(outputs)
        check(torch.randn(2, channels, 4, width), w, scale, bias, compute, padding=1)
    if channels == 17:
        check(
            torch.randn(1, 17, 2, 2), torch.randn(4130, 17, 1, 1), torch.rand(4130), None, compute, padding=1
        )


@pytest.mark.parametrize("compute", COMPUTE)
def test_many_pixels_and_positions(isa: str, compute: str) -> None:
    """Rows longer than a block, several rows or images in one; more kernel positions than are summed at once."""
    for shape, kernel, geometry in (
        ((1, 17, 4, 150), (3, 3), {"padding": 1}),
        ((2, 17, 9, 40), (3, 3), {"padding": 1, "stride": (2, 1)}),
        ((7, 17, 3, 4), (3, 3), {"padding": 1}),
        ((3, 3, 9, 10), (6, 7), {"padding": 3}),
        ((2, 16, 3, 3), (3, 3), {"padding": 4}),  # pixels of nothing but padding
    ):
        w, scale, bias = torch.randn(33, shape[1], *kernel), torch.rand(33) + 0.5, torch.randn(33)
        check(torch.randn(shape), w, scale, bias, compute, **geometry)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("group_size", [0, 32])
def test_threads_and_other_images_give_the_same_bits(isa: str, compute: str, group_size: int) -> None:
    outputs, channels = 130, 40
    bits = pack_signs(torch.randn(outputs, channels * 9))
    tiles = conv_tiles(bits, channels, (3, 3), 1, group_size)
    scale = torch.rand(outputs, -(-channels * 9 // group_size)) if group_size else torch.rand(outputs)
    form = {"kernel_size": 3, "padding": 1, "compute": compute, "group_size": group_size, "tiles": tiles}
    if isa == "portable":
        pytest.skip("ATen's convolution runs here")
    threads = torch.get_num_threads()
    for images, *size in ((5, 2, 2), (5, 9, 7), (9, 4, 5)):
        x = torch.randn(images, channels, *size)
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(binary_conv2d(x, bits, scale, **form))  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*results)
        alone = torch.cat([binary_conv2d(image[None], bits, scale, **form) for image in x])  # type: ignore[arg-type]
        assert torch.equal(alone, results[0])


@pytest.mark.parametrize("channels", [15, 64, 300])
@pytest.mark.parametrize("mixed", [False, True])
def test_largest_sums_are_exact(isa: str, channels: int, mixed: bool) -> None:
    """All products of one sign: of x of one sign, or of both."""
    signs = torch.randn(channels).sign() if mixed else torch.ones(channels)
    x = torch.full((5, channels, 5, 5), 127.0) * signs.view(-1, 1, 1)
    x[1] = -x[1]
    x[2, :, ::2] /= 127  # neighbours that overflow 16 bits later
    for sign in (1.0, -1.0):
        weight = (sign * signs).view(-1, 1, 1).expand(40, -1, 3, 3).contiguous()
        bits = pack_signs(weight.flatten(1))
        tiles = conv_tiles(bits, channels, (3, 3))
        expected = F.conv2d(x.double(), weight.double()).float()
        for compute in COMPUTE:
            y = binary_conv2d(x, bits, torch.ones(1), kernel_size=3, compute=compute, tiles=tiles)
            assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation(isa: str, activation: str, compute: str, dtype: torch.dtype) -> None:
    """By the packed kernel, by ATen's convolution, and of no channels at all: those of the product as it is."""
    apply = getattr(F, activation)
    x, w, bias = torch.randn(2, 20, 5, 6).to(dtype), torch.randn(37, 20, 3, 3), torch.randn(37)
    bits, scale = pack_signs(w.flatten(1)), torch.rand(37) / 13
    form = {"kernel_size": 3, "padding": 1, "compute": compute}
    for tiles in (None, conv_tiles(bits, 20, (3, 3))):
        sums = binary_conv2d(x.float(), bits, scale, bias, tiles=tiles, **form)
        y = binary_conv2d(x, bits, scale, bias, tiles=tiles, activation=activation, **form)
        assert y.dtype == dtype
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(y.double(), apply(sums.double()), rtol=1e-6 + rounding, atol=2e-6)
    y = binary_conv2d(
        x[:, :0], bits[:, :0], scale, bias, kernel_size=3, activation=activation, compute=compute
    )
    torch.testing.assert_close(y, apply(bias).to(dtype)[:, None, None].expand_as(y))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_gradients_go_through_the_activation(activation: str) -> None:
    w, bias = torch.randn(5, 6, 3, 3), torch.randn(5, requires_grad=True)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    y = binary_conv2d(
        x, pack_signs(w.flatten(1)), torch.full((1,), 0.1), bias, kernel_size=3, activation=activation
    )
    grad = torch.randn_like(y)
    expected = getattr(F, activation)(F.conv2d(x, torch.where(w >= 0, 0.1, -0.1), bias))
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("compute", COMPUTE)
def test_opcheck(compute: str) -> None:
    bits = pack_signs(torch.randn(40, 20 * 9))
    pairs = ([3, 3], [2, 1], [1, 0], [1, 2])
    for x in (
        torch.randn(2, 20, 9, 8),
        torch.randn(2, 20, 9, 8).bfloat16().to(memory_format=torch.channels_last),
    ):
        for tiles in (None, conv_tiles(bits, 20, (3, 3))):
            arguments = (x, bits, torch.rand(40), torch.randn(40), *pairs, 1, [1], 0, compute, tiles, "gelu")
            torch.library.opcheck(torch.ops.quantopt.binary_conv2d.default, arguments)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 9, 9)}, r"x must be \[B, C, H, W\]"),
        ({4: [3]}, "kernel_size must be two integers"),
        ({4: [2**62, 2]}, "kernel_size must be less than"),
        ({4: [2**31 - 1, 2**31 - 1]}, "positions of the kernel must be less than"),
        ({5: [2**62, 1]}, "stride must be less than"),
        ({6: [2**62, 1]}, "padding must be less than"),
        ({7: [2**62, 1]}, "dilation must be less than"),
        ({5: [0, 1]}, "stride must be two integers of at least 1"),
        ({6: [-1, 1]}, "padding must be two integers of at least 0"),
        ({7: [9, 1]}, "larger than the padded image"),
        ({8: 2}, "groups=2 does not divide"),
        ({2: torch.ones(3)}, "scale must be"),
        ({1: torch.zeros(4, 3, dtype=torch.uint8)}, "bytes per row"),
        ({12: torch.zeros(32, dtype=torch.int16)}, "tiles do not belong"),
    ],
)
def test_the_operator_itself_checks_sizes(change: dict[int, object], message: str) -> None:
    """torch.ops.quantopt.binary_conv2d called directly must not read beyond its tensors."""
    bits = torch.zeros(4, 4, dtype=torch.uint8)
    if 12 in change and conv_tiles(bits, 3, (3, 3)) is None:
        pytest.skip("this instruction set has no tiles")
    arguments: list[object] = [torch.randn(1, 3, 9, 9), bits, torch.ones(4), None]
    arguments += [[3, 3], [1, 1], [0, 0], [1, 1], 1, [1], 0, "exact", None]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.quantopt.binary_conv2d(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", COMPUTE)
def test_gradients_are_those_of_the_dense_layer(compute: str, dtype: torch.dtype) -> None:
    w, bias = torch.randn(5, 6, 3, 3), torch.randn(5, requires_grad=True)
    x = torch.randn(2, 6, 5, 5).to(dtype).requires_grad_()
    bits, scale = pack_signs(w.flatten(1)), torch.full((1,), 0.5)
    y = binary_conv2d(x, bits, scale, bias, kernel_size=3, compute=compute)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    dense = torch.where(w >= 0, 0.5, -0.5)
    expected = F.conv_transpose2d(grad.float(), dense)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert y.dtype == grad_x.dtype == dtype
    torch.testing.assert_close(grad_x.float(), expected, rtol=1e-5 + rounding, atol=1e-5)
    torch.testing.assert_close(grad_bias, grad.float().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the type's rounding alone may differ, of sums that are equal to fp32's
        without = binary_conv2d(x, bits, scale, bias, kernel_size=3, compute=compute)
    torch.testing.assert_close(y.detach().float(), without.float(), rtol=1e-5 + rounding, atol=1e-5)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5, 6), (0, 8, 5, 6)])
def test_gradients_of_no_channels_and_no_images(
    compute: str, activation: str, shape: tuple[int, int, int, int]
) -> None:
    bits, bias = pack_signs(torch.randn(7, shape[1] * 9)), torch.randn(7, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)
    y = binary_conv2d(x, bits, torch.ones(1), bias, kernel_size=3, compute=compute, activation=activation)
    apply = getattr(F, activation) if activation != "none" else lambda v: v
    expected = apply(bias)[:, None, None].expand(shape[0], 7, 3, 4)
    grad = torch.randn(shape[0], 7, 3, 4)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    torch.testing.assert_close(y, expected)
    assert grad_x.shape == shape and not grad_x.any()
    torch.testing.assert_close(grad_bias, torch.autograd.grad(expected, bias, grad)[0])


@pytest.mark.parametrize("compute", COMPUTE)
def test_gradients_with_scales_of_groups(compute: str) -> None:
    bits, scale = pack_signs(torch.randn(5, 54)), torch.rand(5, 4)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    y = binary_conv2d(x, bits, scale, kernel_size=3, group_size=16, compute=compute)
    grad = torch.randn_like(y)
    weight = reference.dense_weight(PackedWeight(bits, scale, None, 54, [1], 16), torch.float32).view(
        5, 6, 3, 3
    )
    expected = F.conv_transpose2d(grad, weight)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [[127] * 516 + [4], [127] * 517], ids=["2^15", "more"])
def test_sums_of_positions_that_just_leave_16_bits(isa: str, row: list[int]) -> None:
    x = F.pad(torch.tensor(row, dtype=torch.float), (0, 251)).view(3, 256).T.reshape(1, 256, 1, 3)
    bits = pack_signs(torch.ones(33, 768))
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        y = binary_conv2d(x[..., order], bits, torch.ones(1), kernel_size=(1, 3), compute="int8")
        assert torch.equal(y, x.sum().expand_as(y))


@pytest.mark.parametrize("compute", COMPUTE)
def test_autocast_changes_nothing(isa: str, compute: str) -> None:
    for channels, groups in ((8, 8), (16, 1)):
        x, bits = torch.randn(2, channels, 5, 5), pack_signs(torch.randn(8, channels // groups * 9))
        form = {"kernel_size": 3, "groups": groups, "compute": compute}
        expected = binary_conv2d(x, bits, torch.ones(1), **form)
        with torch.autocast("cpu", torch.bfloat16):
            y = binary_conv2d(x, bits, torch.ones(1), **form)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_infinities_padding_and_zero_scales(isa: str, compute: str) -> None:
    w, bias = torch.randn(33, 20, 3, 3), torch.randn(33)
    x = torch.randn(2, 20, 6, 5)
    check(x, w, torch.zeros(33), bias, compute, padding=1)
    x[1, 3, 2, 2], x[1, 5, 0, 0] = torch.inf, torch.nan
    bits, scale = pack_signs(w.flatten(1)), torch.rand(33) + 0.5
    y = binary_conv2d(x, bits, scale, bias, kernel_size=3, padding=1, compute=compute)
    alone = binary_conv2d(x[:1], bits, scale, bias, kernel_size=3, padding=1, compute=compute)
    torch.testing.assert_close(y[:1], alone)
    signs = torch.where(w >= 0, 1.0, -1.0) * scale[:, None, None, None]
    expected = F.conv2d(x, signs, bias, padding=1)
    if compute == "exact":
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    else:  # one scale for the image
        assert y[1].isnan().all() and y[0].isfinite().all()


@needs_extension
def test_shapes_of_tiles() -> None:
    """Fake tiles have the shape of real ones; both are empty where a convolution takes no tiles."""
    empty = set()
    for outputs, channels, taps in itertools.product((1, 8, 33, 64), (1, 4, 16, 33), (1, 9)):
        for groups, group_size, planes in itertools.product((1, 3), (0, 8, 16, 48), (1, 2)):
            bits = torch.zeros(planes, outputs * groups, (channels * taps + 7) // 8, dtype=torch.uint8)
            form = (channels, taps, groups, group_size)
            tiles = torch.ops.quantopt.binary_conv_tiles(bits, *form)
            with FakeTensorMode() as mode:
                fake = torch.ops.quantopt.binary_conv_tiles(mode.from_tensor(bits), *form)
            assert fake.shape == tiles.shape and fake.dtype == tiles.dtype
            empty.add(tiles.numel() == 0)
    assert empty == {False, True}


@pytest.mark.parametrize("compute", COMPUTE)
def test_one_channel_whatever_its_stride(compute: str) -> None:
    """torch's own convolution of one channel is wrong for some geometries with the strides of channels last."""
    choice = random.Random(0)
    cases = [((3, 1, 2, 2), (2, 2), (1, 3), (1, 1))]
    for _ in range(400):
        b, h, w, *kernel, down, right = (choice.randint(1, n) for n in (3, 5, 5, 3, 3, 2, 3))
        padding = choice.choice([(1, 0), (1, 1), (2, 0)])
        if h + 2 * padding[0] >= kernel[0] and w + 2 * padding[1] >= kernel[1]:
            cases.append(((b, 1, h, w), (kernel[0], kernel[1]), (down, right), padding))
    for (b, _, h, w), (kh, kw), stride, padding in cases:
        x = torch.empty_strided((b, 1, h, w), (h * w, 1, w, 1)).copy_(torch.randn(b, 1, h, w))
        signs, scale = torch.randn(2, 1, kh, kw), torch.rand(2, -(-kh * kw // 3))
        for image in (x, x.detach().requires_grad_()):
            check(image, signs, scale, None, compute, 3, stride=stride, padding=padding)
