"""Packed layers that read one input, joined into one product."""

from collections.abc import Sequence

from torch import nn

from quantopt.nn.joined import join
from quantopt.nn.linear import BinaryLinear

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The names that Llama, Qwen, Mistral and many others of the transformers library give to layers of one input."""


def join_layers(packed: nn.Module, names: Sequence[Sequence[str]] = PROJECTIONS) -> int:
    """Joins layers of ``packed`` that read the same input, in place: one product takes the places of several. Decoding
    a token at a time is faster by what a call costs. Outputs are bit-equal.

    Args:
        packed: a model that :func:`quantopt.pack` or :func:`quantopt.load` made.
        names: sets of names of submodules, in the order in which a module calls them, with one and the same tensor.

    Returns how many sets were joined, 0 where no module has such names. A set is left as it is where a module lacks one
    of the names, where a layer is not packed, or where the layers differ in in_features, levels, scales, compute or
    mode. Save a model before its layers are joined: :func:`quantopt.save` refuses it after.

    Raises TypeError if ``packed`` is no module.
    """
    if not isinstance(packed, nn.Module):
        raise TypeError(f"packed must be a torch.nn.Module, not {type(packed).__name__}")
    count = 0
    for module in list(packed.modules()):
        for some in names:
            layers = [module._modules.get(name) for name in some]
            found = [layer for layer in layers if isinstance(layer, BinaryLinear)]
            if len(found) < len(layers) or len(set(map(id, found))) < len(found):
                continue
            try:
                joined = join(found)
            except (TypeError, ValueError):
                continue
            for name, layer in zip(some, joined, strict=True):
                setattr(module, name, layer)
            count += 1
    return count
