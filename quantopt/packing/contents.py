"""What a packed file may hold of a model: names, kinds and values. Reading and writing ask the same functions."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.packed_weight import check_memory
from quantopt.wrappers import plain_names

# What the header of the file calls the dtypes that safetensors both writes and reads.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def key_of(module: str, tensor: str) -> str:
    """The name of a tensor of ``module`` in the state_dict."""
    return f"{module}.{tensor}" if module else tensor


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules under all their names, without the parts of wrappers: of a wrapper and what it wraps, the latter."""
    named = dict(model.named_modules(remove_duplicate=False))
    return dict(zip(plain_names(named), named.values(), strict=True))


def plain_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{key of the state_dict: the same without the parts of wrappers}."""
    keys, modules = list(keys), dict(model.named_modules(remove_duplicate=False))
    return dict(zip(keys, plain_names([*modules, *keys])[len(modules) :], strict=True))


def kind_fault(name: str, value: Any) -> str | None:
    """Why a packed file cannot hold an entry of a state_dict, or None if it can."""
    if not isinstance(value, Tensor):
        return f"{name} in the state_dict is not a tensor but {type(value).__name__}: a packed file cannot hold it"
    if is_lazy(value):
        return f"tensor {name} has no shape yet: run the model once"
    if is_traceable_wrapper_subclass(value) or value.layout != torch.strided or value.is_quantized:
        return f"tensor {name} is no plain dense tensor ({type(value).__name__}, {value.layout}): convert it"
    if value.dtype not in DTYPES.values():
        return f"tensor {name} is {value.dtype}, which a packed file cannot hold: convert it"
    if name == "__metadata__":
        return "a tensor cannot be called __metadata__, which is a word of the file format: rename it"
    return None


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def value_fault(
    layers: Mapping[str, BinaryLinear | BinaryConv2d],
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
) -> str | None:
    """Which value of ``tensors`` no sound model has, or None: in a packed layer, a parameter, or a buffer of a norm.

    Other buffers may hold anything: the mask of an attention is infinite on purpose.
    """
    for name, layer in layers.items():
        bits, scale = tensors[key_of(name, "bits")], tensors[key_of(name, "scale")]
        spare = -layer.row_length % 8
        if spare and bits.numel() and bool((bits[..., -1] >> (8 - spare)).any()):
            return f"tensor {key_of(name, 'bits')}: the spare bits of its rows are not 0"
        if bool((scale < 0).any()):
            return f"tensor {key_of(name, 'scale')}: negative"
    finite = [(name, part) for name in layers for part in ("scale", "bias")]
    for name, module in modules.items():
        finite += [(name, part) for part in module._parameters]
        if any("Norm" in kind.__name__ for kind in type(module).__mro__):  # LlamaRMSNorm, ... too
            finite += [(name, part) for part in module._buffers]
    for name, part in finite:
        tensor = tensors.get(key_of(name, part))
        if tensor is not None and not _finite(tensor):
            return f"tensor {key_of(name, part)}: not finite"
    return None


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one: the same object, or the same view of the same memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.device, *view)


def shared_fault(
    modules: Mapping[str, nn.Module], replaced: Mapping[int, nn.Module], tensors: Mapping[str, Tensor]
) -> str | None:
    """Which two unlike tensors of a file are one in the model, so that the second would overwrite the first, or None.

    Args:
        modules: the modules of the model by name.
        replaced: {id of one of them: the packed module that takes its place}.
        tensors: those of the file under all names.
    """
    first: dict[tuple[Any, ...], str] = {}
    for module_name, module in modules.items():
        module = replaced.get(id(module), module)
        for key, own in (*module._parameters.items(), *module._buffers.items()):
            name = key_of(module_name, key)
            if own is None or name not in tensors:
                continue
            other = first.setdefault(memory_of(own), name)
            if not _same_bytes(tensors[other], tensors[name]):
                return (
                    f"tensors {other} and {name} differ in the file and are one tensor in the model: untie them in "
                    "the model, or give the model that was saved"
                )
    return None


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The state_dict of a packed model and the versions of its modules, under plain names.

    Raises ValueError naming what a file cannot hold."""
    state = model.state_dict()
    plain = plain_keys(model, state)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = plain[key]
        if fault := kind_fault(name, value):
            raise ValueError(fault)
        if name in tensors:
            raise ValueError(f"two tensors are called {name} without the parts of wrappers: rename one")
        if value.is_meta:
            raise ValueError(f"tensor {name} is on the meta device: it has no values to save")
        check_memory(f"tensor {name}", value)
        tensors[name] = value.detach().resolve_conj().resolve_neg()
    versions: dict[str, int] = {}
    known: dict[str, dict[str, Any]] = getattr(state, "_metadata", {})
    for key, name in plain_keys(model, known).items():
        if set(known[key]) - {"version"} or type(known[key].get("version")) is not int:
            raise ValueError(
                f"module {name}: its state_dict has the metadata {known[key]!r}; a packed file holds a whole version"
            )
        versions[name] = known[key]["version"]
    return tensors, versions


def in_place_of_meta(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """{id of a parameter or buffer on the meta device: the tensor of the file}, the memo of a deepcopy: ties are kept.

    The file's tensors are taken over without a copy; one that stands for several parameters is copied for the others.
    """
    result: dict[int, Tensor] = {}
    taken: set[int] = set()
    for name, module in modules.items():
        for key, old in (*module._parameters.items(), *module._buffers.items()):
            new = tensors.get(key_of(name, key))
            if old is None or not old.is_meta or new is None or id(old) in result:
                continue
            tensor = new.clone() if id(new) in taken else new
            taken.add(id(new))
            parameter = isinstance(old, nn.Parameter)
            result[id(old)] = nn.Parameter(tensor, old.requires_grad) if parameter else tensor
    return result


def first_on_meta(model: nn.Module) -> str | None:
    """The name of a parameter, buffer or attribute that is a tensor on the meta device."""
    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, Tensor) and value.is_meta:
                return key_of(name, key)
    return None
