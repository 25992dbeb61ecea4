"""Calls of the operators that would end the process or do nothing: tensors without memory, single tensors on the meta
device, sizes beyond 32 bits. Each is refused by the name of the argument, and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantopt import _extension
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.ops.conv2d import binary_conv2d
from quantopt.ops.linear import binary_linear
from quantopt.ops.step import fused_step
from quantopt.ops.tiles import binary_tiles, conv_tiles
from quantopt.ops.weights import pack_signs, unpack_signs
from quantopt.rules import StepRecord
from step_cases import Case, changing, make

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
BACKENDS = [pytest.param("cpu", marks=needs_extension), "reference"]


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: Tensor) -> Tensor:
    """The last element is beyond the storage, the rest is there."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - tensor.itemsize)
    return tensor


def full_record() -> StepRecord:
    """A step with a tensor in every place."""
    case = Case("alternating", 4, "adam", "channel", latent_bound="channel", grad_scale=2.0, found_inf=0.0)
    return make(case, [(6, 5), (7, 3)])


PLACES = [name for name, _ in full_record().tensors() if not name.endswith("[0]")]


def put(record: StepRecord, place: str, change: Callable[[Tensor], Tensor]) -> StepRecord:
    field, _, index = place.removesuffix("]").partition("[")
    value = getattr(record, field)
    if not index:
        return record._replace(**{field: change(value)})
    tensors = list(value)
    tensors[int(index)] = change(tensors[int(index)])
    return record._replace(**{field: tensors})


def refused(record: StepRecord, backend: str, place: str, message: str) -> None:
    rest = {id(t) for name, t in record.tensors() if name != place}
    before = [(t, t.clone()) for t in changing(record) if id(t) in rest]
    with pytest.raises(ValueError, match=message):
        fused_step(record, backend=backend)
    assert all(torch.equal(now, then) for now, then in before)


def test_the_record_has_a_tensor_in_every_place() -> None:
    tensors = {field for field in StepRecord._fields if "ensor" in str(StepRecord.__annotations__[field])}
    assert tensors == {place.split("[")[0] for place in PLACES}


@pytest.mark.parametrize("change", [freed, shrunk])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_without_memory(place: str, backend: str, change: Callable[[Tensor], Tensor]) -> None:
    name = place.replace("[", r"\[").replace("]", r"\]")
    refused(put(full_record(), place, change), backend, place, f"fused_step: {name} has no memory")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_with_one_tensor_on_the_meta_device(place: str, backend: str) -> None:
    record = put(full_record(), place, lambda t: t.to("meta"))
    refused(record, backend, place, "on meta|hyper must be")


@needs_extension
def test_a_step_on_the_meta_device_alone_is_a_trace() -> None:
    record = full_record()
    for place, _ in list(record.tensors()):
        if place != "hyper":
            record = put(record, place, lambda t: t.to("meta"))
    torch.ops.quantopt.fused_step(*record)
    with pytest.raises(ValueError, match=r"fused_step: params\[1\] is on cpu, params\[0\] on meta"):
        torch.ops.quantopt.fused_step(*put(record, "params[1]", lambda t: torch.empty_like(t, device="cpu")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["grad_scale", "found_inf"])
def test_numbers_of_amp_that_are_none(place: str, backend: str) -> None:
    record = put(full_record(), place, lambda t: torch.empty(0))
    refused(record, backend, place, f"fused_step: {place} must be one (float32 )?number")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [2**32 + 2, 2**32 + 4, -(2**32) + 2, 0, 18])
def test_levels_beyond_32_bits(levels: int, backend: str) -> None:
    refused(
        full_record()._replace(levels=levels),
        backend,
        "",
        f"levels must be 2, 3, 4, 8, 16 or 17, not {levels}",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_longer_than_a_row_is_the_row(backend: str) -> None:
    """Whatever its size: 2^32 + 7 is not 7."""
    results = []
    for group_size in (15, 2**32 + 7, 2**63 - 1):
        record = make(Case("askew", 4, "sgd", "channel"), [(6, 15)])
        record = record._replace(scales=[s.unsqueeze(1) for s in record.scales], group_size=group_size)
        fused_step(record, backend=backend)
        results.append(record.params[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- products ----------------------------------------------------------------------------------------------------


def linear_arguments(dtype: torch.dtype) -> dict[str, Any]:
    bits = pack_signs(torch.randn(9, 20))
    return {
        "x": torch.randn(3, 20, dtype=dtype),
        "bits": bits,
        "scale": torch.rand(9),
        "bias": torch.rand(9),
        "tiles": binary_tiles(bits, 20),
    }


def conv_arguments(dtype: torch.dtype) -> dict[str, Any]:
    bits = pack_signs(torch.randn(40, 16 * 9))
    return {
        "x": torch.randn(2, 16, 5, 5, dtype=dtype),
        "bits": bits,
        "scale": torch.rand(40),
        "bias": torch.rand(40),
        "tiles": conv_tiles(bits, 16, (3, 3)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "reference"])
@pytest.mark.parametrize("change", [freed, shrunk])
@pytest.mark.parametrize("name", ["x", "bits", "scale", "bias", "tiles"])
def test_products_without_memory(name: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for product, arguments, more in (
        (binary_linear, linear_arguments(dtype), {"in_features": 20}),
        (binary_conv2d, conv_arguments(dtype), {"kernel_size": 3}),
    ):
        if name == "tiles" and (arguments[name] is None or dtype == torch.float64):
            continue  # there is none, or it is not read
        arguments[name] = change(arguments[name])
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            product(**arguments, **more)


@pytest.mark.parametrize("name", ["bits", "scale", "bias"])
def test_modules_without_memory(name: str) -> None:
    """By the direct call, with gradients, in forward mode, and where the reference runs."""
    for module, x in (
        (BinaryLinear(20, 9), torch.randn(3, 20)),
        (BinaryConv2d(3, 8, 3), torch.randn(1, 3, 5, 5)),
    ):
        getattr(module, name).untyped_storage().resize_(0)
        for image in (x, x.clone().requires_grad_(), x.double()):
            with pytest.raises(ValueError, match=f"{name} has no memory"):
                module(image)
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            torch.func.jvp(module, (x,), (x,))


def test_packing_without_memory() -> None:
    w = torch.randn(4, 9)
    bits = pack_signs(w)
    for call in (
        lambda: pack_signs(freed(w)),
        lambda: unpack_signs(freed(bits), 9),
        lambda: binary_tiles(freed(bits), 9),
        lambda: conv_tiles(freed(bits), 9, (1, 1)),
    ):
        if _extension.error is None or "signs" in call.__code__.co_names[0]:
            with pytest.raises(ValueError, match="has no memory"):
                call()
    assert pack_signs(w[1:, 3:]).shape == (3, 1)  # a view, to the end of its storage
    assert pack_signs(freed(torch.empty(0, 9))).shape == (0, 2)  # no elements need no memory


def test_group_sizes_beyond_32_bits() -> None:
    arguments = linear_arguments(torch.float32) | {"scale": torch.rand(9, 1), "in_features": 20}
    for group_size in (2**31, 2**32 + 4, 2**37):
        with pytest.raises(ValueError, match="group_size must be"):
            binary_linear(**arguments, group_size=group_size)
        if _extension.error is None:
            bits = arguments["bits"]
            with pytest.raises(ValueError, match="group_size must be"):
                torch.ops.quantopt.binary_linear(
                    arguments["x"], bits, arguments["scale"], None, 20, [1], group_size
                )
            with pytest.raises(ValueError, match="group_size must be"):
                torch.ops.quantopt.binary_conv_tiles(bits, 20, 1, 1, group_size)
    long = binary_linear(**arguments, group_size=2**30)
    torch.testing.assert_close(long, binary_linear(**arguments, group_size=20), rtol=1e-5, atol=1e-5)
    x = arguments.pop("x").double()
    torch.testing.assert_close(
        long.double(), binary_linear(x, **arguments, group_size=2**30), rtol=1e-5, atol=1e-5
    )
