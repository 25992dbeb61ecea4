"""Which CUDA kernel runs: registrations, the table of kernels, backends, shapes for torch.compile."""

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from machine_code import needs_cuda_build
from product_cases import KERNELS
from quantopt import _extension, backends
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


@needs_extension
def test_cpu_kernel_is_registered() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantopt::fused_step", "CPU")


@needs_extension
def test_cuda_kernel_is_registered_in_a_cuda_build() -> None:
    built = bool(_extension.build_info()["cuda_archs"])
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantopt::fused_step", "CUDA") == built


@needs_cuda_build
@pytest.mark.parametrize(
    "operator",
    [
        "binary_linear",
        "binary_tiles",
        "binary_conv2d",
        "binary_conv_tiles",
    ],
)
def test_is_registered(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantopt::{operator}", "CUDA")


def test_the_table(host: Any) -> None:
    """Every row of it is reached, and what a kernel cannot do goes to the next."""
    for capability, many in ((80, "cublas"), (90, "wgmma"), (100, "cublas")):
        host.device(capability, 4)
        assert [KERNELS[host.chosen(True, rows, 4096, False)] for rows in (256, 257)] == ["mma", many]
    host.device(80, 4)
    names = {
        (int8, rows): KERNELS[host.chosen(int8, rows, 4096, False)]
        for int8, rows in itertools.product((False, True), (1, 2, 256, 257, 512, 513))
    }
    assert [names[True, rows] for rows in (1, 2, 256, 257)] == ["gemv", "mma", "mma", "cublas"]
    assert [names[False, rows] for rows in (1, 512, 513)] == ["mma", "mma", "cublas"]
    assert KERNELS[host.chosen(True, 1, 100_000, False)] == "mma"  # x does not fit gemv's shared memory
    assert all(KERNELS[host.chosen(int8, 5000, 4096, True)] == "mma" for int8 in (False, True))


def test_operator(host: Any) -> None:
    """Leading dimensions, no rows, no inputs, no tiles; what it refuses."""
    x, bits, scale = torch.randn(2, 3, 40), pack_signs(torch.randn(5, 40)), torch.rand(5)
    expected = reference.binary_linear(x, PackedWeight(bits, scale, None, 40, [1]))
    torch.testing.assert_close(host.binary_linear(x, bits, scale, None, 40, [1]), expected)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(
        host.binary_linear(turned, bits, scale, None, 40, [1]), expected.transpose(0, 1)
    )
    torch.testing.assert_close(host.binary_linear(x[0, 0], bits, scale, None, 40, [1]), expected[0, 0])
    assert host.binary_linear(x[:0], bits, scale, None, 40, [1]).shape == (0, 3, 5)
    assert host.binary_linear(x, bits[:0], scale[:1], None, 40, [1]).shape == (2, 3, 0)
    bias = torch.randn(5)
    empty = host.binary_linear(x[..., :0], bits[:, :0], scale, bias, 0, [1], 0, "exact", None, "relu")
    assert torch.equal(empty, torch.relu(bias).expand(2, 3, 5))
    for arguments, error, message in [
        (
            (x, bits, scale, None, 40, [1], 0, "exact", torch.zeros(5, dtype=torch.int32)),
            ValueError,
            "tiles do not",
        ),
        ((x, bits, torch.rand(5, 3), None, 40, [1], 16), NotImplementedError, "scales of 32, 64"),
        ((x, bits.expand(9, 5, 5), scale, None, 40, [1] * 9), NotImplementedError, "8 planes"),
        ((x[..., :9], bits, scale, None, 40, [1]), ValueError, "as its last dimension"),
        ((x, bits, scale.to("meta"), None, 40, [1]), ValueError, "must be on cpu"),
    ]:
        with pytest.raises(error, match=message):
            host.binary_linear(*arguments)
    with pytest.raises(ValueError, match="kernel must be"):
        host.binary_linear_by(x, bits, scale, None, 40, [1], "magic")
    with pytest.raises(ValueError, match="does not take"):
        host.binary_linear_by(x, bits, scale, None, 40, [1], "gemv")


@needs_cuda_build
def test_backend_on_devices_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for the device's architecture or an older one of its kind, or PTX; else Triton or the reference."""
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["80", "90"]})
    built = {c: backends._built_for(c) for c in (75, 80, 86, 89, 90, 100, 120)}
    assert built == {75: False, 80: True, 86: True, 89: True, 90: True, 100: True, 120: True}
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["90a"]})
    assert backends._built_for(90) and not backends._built_for(80)
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["90"]})
    assert not backends._built_for(80)

    def choice(capability: int) -> backends.Choice:
        return backends._choose.__wrapped__("binary_linear", "cuda", torch.float16, "auto", "0", capability)

    assert choice(90).name == "cuda"
    assert choice(80).name in ("triton", "reference")
    with pytest.raises(backends.BackendError, match="the device has 80"):
        backends._choose.__wrapped__("binary_linear", "cuda", torch.float16, "cuda", "0", 80)


def choice_of(
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    backend: str,
    product: backends.Product,
    dtype: torch.dtype,
) -> backends.Choice:
    """For tensors of a device on which ``backend`` runs."""
    monkeypatch.setattr(backends, "_choose", lambda *_: backends.Choice(backend, "for the test"))
    return backends.choose(operation, torch.device("cuda:0"), dtype, product=product)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_products_left_to_the_reference(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def choice(planes: int, group_size: int) -> backends.Choice:
        product = backends.Product(planes, group_size)
        return choice_of(monkeypatch, "binary_linear", backend, product, torch.float16)

    for size in (0, 32, 64, 128, 1024):
        assert choice(8, size) == (backend, "for the test")
    for size in (1, 16, 48, 96, 100):
        assert choice(1, size).name == "reference"
        assert choice(1, size).why == f"{backend}: its kernels take scales shared by 32, 64, 128, ... weights"
    assert choice(9, 0) == ("reference", f"{backend}: its kernels take at most 8 planes")


def test_convolutions_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions of each backend, one broken at a time."""
    fits = backends.Product(8, 0, "exact", 2, 64, 64, 100)
    one = fits._replace(groups=1, channels=3, outputs=1)
    cases: list[tuple[str, backends.Product, torch.dtype, str]] = [
        ("cuda", one, torch.float32, ""),
        ("cuda", fits, torch.float16, ""),
        ("cuda", fits, torch.float32, "groups are read in place"),
        ("cuda", fits._replace(channels=20), torch.float16, "groups are read in place"),
        ("cuda", fits._replace(compute="bf16"), torch.float32, ""),
        ("cuda", fits._replace(compute="int8", channels=20), torch.float32, ""),
        ("cuda", fits._replace(groups=33), torch.float16, "each group is a launch"),
        ("cuda", fits._replace(channels=8), torch.float16, "each group is a launch"),
        ("cuda", fits._replace(outputs=7), torch.float16, "each group is a launch"),
        ("cuda", one._replace(output_pixels=65535 * 64 // 3), torch.float32, ""),
        ("cuda", one._replace(output_pixels=65535 * 64 // 3 + 1), torch.float32, "output pixels"),
        ("triton", fits, torch.float32, ""),
        ("triton", one, torch.float32, ""),
        ("triton", fits._replace(channels=8, outputs=16), torch.float32, ""),
        ("triton", fits._replace(channels=8, outputs=15), torch.float32, "smaller groups"),
    ]
    for backend in ("cuda", "triton"):
        cases += [
            (backend, fits._replace(planes=9), torch.float16, "8 planes"),
            (backend, fits._replace(group_size=32), torch.float16, "scales per tensor"),
        ]
    for backend, product, dtype, why in cases:
        choice = choice_of(monkeypatch, "binary_conv2d", backend, product, dtype)
        assert choice.name == ("reference" if why else backend) and why in choice.why


def test_products_refused_are_those_left_to_the_reference(host: Any) -> None:
    host.device(90, 4)
    for planes, group in itertools.product((1, 8, 9), (0, 16, 32, 48, 64, 96)):
        x, bits = torch.randn(2, 96), pack_signs(torch.randn(planes, 5, 96))
        scale = torch.rand(5, -(-96 // group)) if group else torch.rand(5)
        product = backends.Product(planes, group)
        if all(limit.fits(product, x.dtype) for limit in backends.LIMITS["binary_linear", "cuda"]):
            assert host.binary_linear(x, bits, scale, None, 96, [1] * planes, group).shape == (2, 5)
            continue
        with pytest.raises(NotImplementedError, match="quantopt: the CUDA kernels take"):
            host.binary_linear(x, bits, scale, None, 96, [1] * planes, group)


def test_a_backend_asked_for_by_name_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_choose", lambda *_: backends.Choice("triton", "asked for by name"))
    with pytest.raises(backends.BackendError, match="cannot run binary_linear: its kernels take at most 8"):
        backends.choose(
            "binary_linear", torch.device("cuda:0"), torch.float16, "triton", backends.Product(9, 0)
        )


@needs_cuda_build
def test_shapes_without_a_device() -> None:
    """What torch.compile and torch.export know of the operators, for tensors of a GPU that need not be there."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 300, dtype=torch.float16, device="cuda")
        bits = torch.empty(2, 70, 38, dtype=torch.uint8, device="cuda")
        scale = torch.empty(70, device="cuda")
        tiles = torch.ops.quantopt.binary_tiles(bits, 300)
        assert tiles.shape == (2, 3 * 3 * 128) and tiles.dtype == torch.int32 and tiles.device.type == "cuda"
        for y in (
            torch.ops.quantopt.binary_linear(x, bits, scale, None, 300, [1, 2], 0, "exact", tiles),
            torch.ops.quantopt.binary_linear_triton(x, bits, scale, None, 300, [1, 2], 0, "exact", "none"),
            binary_linear(x, bits, scale, in_features=300, compute="int8"),
        ):
            assert y.shape == (2, 3, 70) and y.dtype == torch.float16 and y.device.type == "cuda"
