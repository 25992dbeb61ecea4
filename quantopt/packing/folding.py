"""Folds batch norms and activations into the scale, bias and epilogue of the packed layer that they follow.

In evaluation a batch norm is y -> f (y - mean) + beta with f = gamma / sqrt(var + eps), one factor for each output
channel of the layer. Folding sets scale -> |f| scale and bias -> f (bias - mean) + beta, and flips the signs of a row
of weights where f < 0, so that scales stay positive.
"""

import copy
import inspect
import itertools
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quantopt.reference.binary import pack_signs

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MAX_OPTIONAL = 4  # optional arguments of forward, which is traced for each subset of them
FOLDABLE = {kind.__name__: kind for kind in (*NORMS, nn.ReLU, nn.GELU, nn.SiLU)}


class Folded(nn.Identity):
    """The identity in place of a batch norm or an activation that was folded into the preceding layer.

    Has the attributes (num_features, eps, inplace, ...) of the module it replaces.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.kind = type(replaced).__name__
        for name, value in vars(replaced).items():
            if not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        # In three dimensions a BatchNorm1d normalises dimension 1, but the layer's outputs are dimension 2.
        if self.kind == "BatchNorm1d" and x.dim() != 2:
            raise ValueError(
                f"a BatchNorm1d that was folded into a Linear takes [batch, features], not {list(x.shape)}: "
                "pack with fold_batchnorm=False"
            )
        return x

    def extra_repr(self) -> str:
        return self.kind


class Chain(NamedTuple):
    """A layer and the modules that follow each of its calls in forward and nothing else."""

    layer: nn.Linear | nn.Conv2d
    norm: nn.Module | None
    activation: nn.Module | None


def activation_of(module: nn.Module | None) -> str:
    """The name by which the packed layers know an activation module, "none" if they do not."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "none"
    if type(module) is nn.ReLU:
        return "relu"
    return "silu" if type(module) is nn.SiLU else "none"


def fold(
    bits: Tensor, scale: Tensor, bias: Tensor | None, row_length: int, norm: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """(bits, scale, bias) of a layer followed by ``norm``, a batch norm in evaluation; the arguments are not changed.

    bits uint8 [N, ceil(K/8)] or [P, N, ceil(K/8)], scale fp32 [1], [N] or [N, groups], bias [N] or None.
    """
    assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
    mean, factor = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.affine:
        factor, shift = factor * norm.weight.detach().double(), norm.bias.detach().double()
    shift = shift + factor * ((0 if bias is None else bias.detach().double()) - mean)
    size = factor.abs() if scale.dim() == 1 else factor.abs().unsqueeze(-1)
    if bool((factor < 0).any()):
        negative = (factor < 0).to(torch.uint8).unsqueeze(-1)
        bits = bits ^ negative * pack_signs(torch.ones(row_length, device=bits.device))  # spare bits stay 0
    return bits, (scale.double() * size).to(torch.float32), shift.to(torch.float32)


def _is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks, which would see no call after folding."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Calls:
    """The calls of modules in one trace of a model's forward."""

    def __init__(self, root: nn.Module, arguments: dict[str, None]) -> None:
        """Traces the forward of ``root``, called without the optional ``arguments``.

        Tracing runs the model's code, which may store values or write to buffers, so a copy is traced.
        """
        twin = copy.deepcopy(root, {id(p): p for p in root.parameters()})
        originals = dict(zip(map(id, twin.modules()), root.modules(), strict=True))
        named = {name: originals[id(module)] for name, module in twin.named_modules(remove_duplicate=False)}
        graph = fx.Tracer().trace(twin, concrete_args=arguments or None)
        self.modules: dict[fx.Node, nn.Module] = {}
        self.nodes: dict[int, list[fx.Node]] = {}
        self.touched: set[int] = set()  # modules that the graph uses in other ways than by a call
        for node in graph.nodes:
            if node.op == "get_attr":
                self.touched.add(id(named.get(str(node.target).rpartition(".")[0])))
            if node.op != "call_module":
                continue
            module = named[str(node.target)]
            self.modules[node] = module
            self.nodes.setdefault(id(module), []).append(node)
            self.touched.update(id(m) for m in module.modules() if m is not module)

    def after(self, module: nn.Module) -> nn.Module | None:
        """The one module that follows every call of ``module``, if it follows nothing else and has no hooks."""
        nodes = self.nodes.get(id(module), [])
        followers = [user for node in nodes for user in node.users]
        following = {id(self.modules.get(node)): self.modules.get(node) for node in followers}
        if any(len(node.users) != 1 for node in nodes) or len(following) != 1 or id(module) in self.touched:
            return None
        if _is_watched(module):
            return None
        (follower,) = following.values()
        if (
            follower is None
            or _is_watched(follower)
            or id(follower) in self.touched
            or len(self.nodes[id(follower)]) != len(nodes)
        ):
            return None
        return follower


def _traces(model: nn.Module) -> list[_Calls]:
    """The calls that forward makes with each choice of its optional arguments (those that are None by default)."""
    optional = [name for name, p in inspect.signature(model.forward).parameters.items() if p.default is None]
    if len(optional) > MAX_OPTIONAL:
        raise TypeError(
            f"more than {MAX_OPTIONAL} arguments of its forward are optional: {', '.join(optional)}"
        )
    choices = itertools.product((False, True), repeat=len(optional))
    return [
        _Calls(model, {name: None for name, given in zip(optional, choice, strict=True) if not given})
        for choice in choices
    ]


def find_chains(model: nn.Module, layers: Collection[nn.Linear | nn.Conv2d]) -> list[Chain]:
    """What can be folded into each of ``layers``, modules of ``model``: what follows each of its calls in forward.

    torch.fx traces the forward pass with and without each argument that is None by default. If tracing fails, the
    other uses of a layer's output are unknown: nothing is folded, and a warning gives the reason.
    Traces do not show calls from other methods than forward, nor branches on isinstance or ``is`` that depend on other
    arguments. Raises ValueError if there is something to fold, but the model is in training.
    """
    try:
        traces = _traces(model)
    except Exception as error:  # the model's code may raise anything when it is given a proxy
        warnings.warn(
            f"fold_batchnorm=True folded nothing: torch.fx cannot trace the model ({error}), so that what follows a "
            "layer is not known. Make its forward traceable, or pack without folding",
            stacklevel=3,
        )
        return []

    def after(module: nn.Module) -> nn.Module | None:
        followers = [calls.after(module) for calls in traces]
        return followers[0] if all(f is followers[0] for f in followers) else None

    chains = []
    for layer in layers:
        norm: Any = after(layer)
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
        if type(norm) is not kind or norm.running_mean is None or norm.num_features != outputs:
            norm = None
        activation = after(layer if norm is None else norm)
        if activation_of(activation) == "none":
            activation = None
        if norm is not None or activation is not None:
            chains.append(Chain(layer, norm, activation))
    norms = {id(chain.norm) for chain in chains}
    # A module with children may call them in one mode only.
    if chains and any(m.training for m in model.modules() if m._modules or id(m) in norms):
        raise ValueError(
            "fold_batchnorm=True folds what follows a layer in evaluation, but the model is in training: "
            "call model.eval()"
        )
    return chains
