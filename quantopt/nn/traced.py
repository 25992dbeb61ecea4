"""Packed layers in torch.fx.symbolic_trace."""

from typing import Any

from torch import fx, nn


def leaf(layer: nn.Module, x: fx.Proxy) -> Any:
    """The call of ``layer`` as one node of the graph that torch.fx traces: what it does itself for layers of torch.nn.

    Raises TypeError if ``layer`` is what is traced, or has hooks."""
    tracer, name = x.tracer, type(layer).__name__
    if not isinstance(tracer, fx.Tracer) or tracer.root is layer:
        raise TypeError(
            f"torch.fx has nothing to trace in a {name} alone: its forward is one operator; trace a model that has it"
        )
    # Hooks of register_backward_hook make torch look for a tensor in the result for ever.
    legacy = layer._backward_hooks and layer._is_full_backward_hook is False
    if layer._forward_hooks or layer._forward_pre_hooks or legacy:
        raise TypeError(
            f"a {name} with hooks cannot be traced, as they would be called once more in the traced model: remove them "
            "first, or trace with a torch.fx.Tracer whose is_leaf_module is True for it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})
