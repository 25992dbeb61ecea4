"""The AMX kernels with emulated registers (tests/amx_on_host), and what their results must be."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from host_library import ROOT, shared_library
from quantopt.ops.inputs import ACTIVATIONS
from quantopt.ops.tiles import binary_tiles, conv_tiles
from quantopt.ops.weights import pack_signs
from quantopt.reference import binary as reference

FORMS = ("int8", "bf16", "exact")  # in the order of the kernels' Form


def runs_gfni() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and " gfni" in path.read_text()


def load() -> ctypes.CDLL:
    flags = ["-O2", "-march=x86-64-v4", "-Wno-psabi"]
    vectors = ["-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16", "-mgfni", "-mprfchw"]
    sources = {ROOT / f"tests/amx_on_host/{name}.cpp": [*flags, *vectors] for name in ("conv", "linear")}
    loaded = ctypes.CDLL(
        str(shared_library("amx_on_host", {**sources, ROOT / "csrc/cpu/conv_plan.cpp": flags}))
    )
    for function in (loaded.conv_on_host, loaded.linear_on_host, loaded.breach_on_host):
        function.restype = ctypes.c_char_p
    return loaded


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def whole(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def pairs(**geometry: tuple[int, int]) -> list[tuple[int, int]]:
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return [geometry.get(name, default) for name, default in defaults.items()]


def conv(
    library: ctypes.CDLL,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    form: str = "int8",
    plane_weights: tuple[int, ...] = (1,),
    activation: str = "none",
    group: int = 0,
    together: int = 1,
    side_by_side: bool = False,
    cut: int = 0,
    y_type: torch.dtype = torch.float32,
    levels: tuple[int, Tensor] | None = None,
    **geometry: tuple[int, int],
) -> Tensor:
    """y of x [B, C, H, W] with the signs of w [P, N, C, kh, kw], by the emulated kernel.

    levels: the size of groups of weights, and their levels in the order of tiles.

    If x has more channels than w, they are those of group ``group``, and the outputs too.
    """
    planes, outputs, channels, *kernel = w.shape
    stride, padding, dilation = pairs(**geometry)
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    group_size, of_groups = (0, None) if levels is None else levels
    tiles = conv_tiles(pack_signs(w.flatten(2)), channels, kernel, 1, group_size)
    assert tiles is not None
    values = x.permute(0, 2, 3, 1).to(torch.bfloat16 if form == "bf16" else x.dtype).contiguous()
    groups = x.shape[1] // channels
    y = torch.full((x.shape[0], *size, groups * outputs), torch.nan, dtype=y_type)
    numbers = [x.shape[0], *x.shape[2:], channels, x.shape[1], *size, outputs, y.shape[3]]
    numbers += [*kernel, *stride, *padding, *dilation]
    fault = library.conv_on_host(
        (ctypes.c_int64 * len(numbers))(*numbers),
        *whole(planes),
        pointer(tiles),
        *whole(tiles.numel()),
        (ctypes.c_int32 * planes)(*plane_weights),
        pointer(scale),
        *whole(0 if scale.numel() == 1 else 1),
        pointer(bias),
        *whole(group_size),
        pointer(of_groups),
        FORMS.index(form),
        values.dtype == torch.bfloat16,
        pointer(values),
        *whole(group * channels),
        ACTIVATIONS.index(activation),
        y_type == torch.bfloat16,
        pointer(y),
        *whole(group * outputs, together),
        side_by_side,
        *whole(cut),
    )
    assert fault is None, fault
    rest = torch.cat([y[..., : group * outputs], y[..., (group + 1) * outputs :]], -1)
    assert bool(rest.isnan().all())
    return y[..., group * outputs : (group + 1) * outputs].permute(0, 3, 1, 2)


def linear(
    library: ctypes.CDLL,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    form: str = "int8",
    plane_weights: tuple[int, ...] = (1,),
    cuts: tuple[int, int] = (0, 0),
    y_type: torch.dtype = torch.float32,
    activation: str = "none",
    **groups: Any,
) -> Tensor:
    """y of x [M, K] with the signs of w [P, N, K]; ``groups``: group, group_scales or levels, x_scale."""
    planes, outputs, inputs = w.shape
    tiles = binary_tiles(pack_signs(w), inputs)
    assert tiles is not None
    values = x.to(torch.bfloat16 if form == "bf16" else x.dtype).contiguous()
    y = torch.full((x.shape[0], outputs), torch.nan, dtype=y_type)
    fault = library.linear_on_host(
        *whole(x.shape[0], outputs, inputs, planes),
        pointer(tiles),
        *whole(tiles.numel()),
        (ctypes.c_int32 * planes)(*plane_weights),
        pointer(scale),
        *whole(groups.get("group", 0)),
        pointer(groups.get("group_scales")),
        pointer(groups.get("levels")),
        pointer(bias),
        FORMS.index(form),
        values.dtype == torch.bfloat16,
        pointer(values),
        pointer(groups.get("x_scale")),
        ACTIVATIONS.index(activation),
        y_type == torch.bfloat16,
        pointer(y),
        *whole(*cuts),
    )
    assert fault is None, fault
    return y


def check(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    form: str = "int8",
    plane_weights: tuple[int, ...] = (1,),
    activation: str = "none",
    image: Tensor | None = None,
    **geometry: tuple[int, int],
) -> None:
    """int8: whole sums, exact in float64, and the roundings of the kernels after them: the same bits. Else float64.

    image: what the scale is that of, if x is a part of it.
    """
    signs = torch.where(w >= 0, 1.0, -1.0).double() * torch.tensor(plane_weights).view(
        -1, *[1] * (w.dim() - 1)
    )
    levels = signs.sum(0)
    if form == "int8":
        image = x if image is None else image
        s = image.float().abs().amax((-3, -2, -1), keepdim=True) / 127
        q = torch.where(s > 0, (x.float() / s).round().clamp(-127, 127), 0.0)
        expected = F.conv2d(q.double(), levels, **geometry).float() * (scale.view(-1, 1, 1) * s)  # type: ignore[arg-type]
        if bias is not None:
            expected = expected + bias.view(-1, 1, 1)
        assert torch.equal(y, expected)
        return
    levels = levels * scale.double().view(-1, 1, 1, 1)
    offset = None if bias is None else bias.double()
    values = (x.to(torch.bfloat16) if form == "bf16" else x).double()
    exact = reference.activate(F.conv2d(values, levels, offset, **geometry), activation)  # type: ignore[arg-type]
    size = F.conv2d(values.abs(), levels.abs(), None if offset is None else offset.abs(), **geometry)  # type: ignore[arg-type]
    assert bool(((y.double() - exact).abs() <= 2e-6 * size).all())
