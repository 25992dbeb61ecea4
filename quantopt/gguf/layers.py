"""Single tensors of a file as packed layers and as float tensors."""

import os
from collections.abc import Mapping

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from quantopt.gguf.blocks import LEVELS, Scales, from_blocks, kind_of_layer, to_blocks
from quantopt.gguf.container import Field, File, Written, write
from quantopt.nn import BinaryLinear
from quantopt.ops.inputs import compute_mode

FLOAT_KINDS = ("F32", "F16", "BF16", "Q8_0")
_KIND_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_layer(file: File, name: str, *, compute: str = "auto") -> BinaryLinear:
    """The packed layer ``name`` of ``file``: its tensor ``name.weight``, of Q1_0, TQ1_0 or TQ2_0, and ``name.bias`` if
    there is one. Raises :class:`~quantopt.gguf.GGUFFileError` if it is of another type, or damaged."""
    bias = f"{name}.bias"
    return layer_of(file, f"{name}.weight", bias if bias in file.tensors else None, None, compute)


def layer_of(file: File, weight: str, bias: str | None, order: Tensor | None, compute: str) -> BinaryLinear:
    """The packed layer of the tensors ``weight`` and ``bias`` with their rows in ``order``, None: as they are."""
    compute_mode(compute)
    stored, blocks = file.stored(weight), file.read(weight)
    if stored.kind.name not in LEVELS or len(stored.shape) != 2:
        file.fail(
            f"tensor {weight} is {stored.kind.name} {list(stored.shape)}, not a matrix of {', '.join(LEVELS)}"
        )
    shift = None if bias is None else read_float(file, bias)
    if shift is not None and shift.shape != (stored.shape[0],):
        file.fail(f"tensor {bias} has the shape {list(shift.shape)}, not {[stored.shape[0]]}")
    if order is not None:
        blocks, shift = blocks[order.numpy()], None if shift is None else shift[order]
    try:
        return from_blocks(blocks, stored.kind.name, bias=shift, compute=compute, name=f"tensor {weight}")
    except ValueError as error:
        file.fail(str(error))


def read_float(file: File, name: str) -> Tensor:
    """The tensor ``name`` as float32, dequantised; of any type that gguf.quants knows.

    Raises :class:`~quantopt.gguf.GGUFFileError` for other types and for values that are not finite."""
    stored, data = file.stored(name), file.read(name)
    if stored.kind.name in LEVELS:
        try:
            rows = data.reshape(-1, stored.row_bytes)
            tensor = from_blocks(rows, stored.kind.name, name=f"tensor {name}").weight
        except ValueError as error:
            file.fail(str(error))
    else:
        try:
            with np.errstate(all="ignore"):
                tensor = torch.from_numpy(np.array(quants.dequantize(data, stored.kind), dtype=np.float32))
        except NotImplementedError:
            file.fail(f"tensor {name} is {stored.kind.name}, which gguf.quants does not dequantise")
    if not bool(tensor.isfinite().all()):
        file.fail(f"tensor {name} has values that are not finite: the file is damaged")
    return tensor.reshape(stored.shape)


def written_float(tensor: Tensor, kind: str | None, name: str) -> Written:
    """``tensor`` as it is stored: of ``kind``, None: of its dtype; of one dimension as F32, as llama.cpp reads it.

    Raises ValueError for a dtype or a length that the kind does not hold, and where F16 overflows."""
    if tensor.dim() < 2:
        kind = "F32"
    elif kind is None:
        if tensor.dtype not in _KIND_OF_DTYPE:
            raise ValueError(f"{name} is {tensor.dtype}, which GGUF does not hold: pass float_type='F32'")
        kind = _KIND_OF_DTYPE[tensor.dtype]
    elif kind not in FLOAT_KINDS:
        raise ValueError(f"float_type must be one of {', '.join(FLOAT_KINDS)} or None, not {kind!r}")
    number = GGMLQuantizationType[kind]
    block = GGML_QUANT_SIZES[number][0]
    if tensor.shape[-1] % block:
        raise ValueError(
            f"{name} has rows of {tensor.shape[-1]}, no multiple of {block}: pass another float_type"
        )
    values = tensor.detach().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    if kind == "Q8_0":
        return Written(number, quants.quantize(values.float().numpy(), number))
    stored = values.to(
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    ).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError(f"{name} has values beyond the range of {kind}: pass float_type='F32'")
    return Written(number, stored.view(torch.uint8).numpy())


def save_layers(
    layers: Mapping[str, BinaryLinear],
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    scales: Scales = "exact",
) -> None:
    """Writes packed layers into a GGUF file: each as the tensor ``name.weight``, its bias as ``name.bias`` (F32).

    Args:
        layers: {name: layer}.
        path: of the file, which is replaced whole or not at all.
        kind: of each layer, as in :func:`to_blocks`, whose errors it raises before anything is written.
        scales: as in :func:`to_blocks`.
    """
    tensors: list[tuple[str, Written]] = []
    for name, layer in layers.items():
        tensors.append((f"{name}.weight", written_layer(layer, kind, scales, name)))
        if layer.bias is not None:
            tensors.append((f"{name}.bias", written_float(layer.bias, None, f"{name}.bias")))
    write(path, {"general.architecture": Field(GGUFValueType.STRING, "quantopt")}, tensors)


def written_layer(layer: BinaryLinear, kind: str | None, scales: Scales, name: str) -> Written:
    """The weights of ``layer`` as they are stored."""
    blocks = to_blocks(layer, kind, scales=scales, name=name)
    return Written(GGMLQuantizationType[kind_of_layer(layer, kind, name)], blocks)
