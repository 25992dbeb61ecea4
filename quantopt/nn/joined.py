"""Packed layers of one input as one product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from quantopt.nn.linear import BinaryLinear
from quantopt.nn.traced import leaf


class _Product:
    """The product of the layers that were joined, and its last result until all of them have taken their part."""

    def __init__(self, layer: BinaryLinear) -> None:
        self.layer = layer
        # x, its version, y, the row that is next: one tuple, which threads see whole or not
        self.last: tuple[Tensor, Any, Tensor, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "last": None}


class JoinedLinear(nn.Module):
    """Takes the place of one of several BinaryLinear that are called with the same tensor one after the other: the
    first one called computes the outputs of all, the others take theirs from the result.

    Called with another tensor, or with one that was written to in between, it computes all outputs anew. Between the
    calls do not write to the weights, nor to a tensor of torch.inference_mode, whose writes torch does not count. The
    weights are in the first of the joined layers, as ``weights``. Made by :func:`join`.
    """

    def __init__(self, product: _Product, first: int, count: int, is_last: bool) -> None:
        super().__init__()
        self.in_features = product.layer.in_features
        self.out_features = count
        self._product = product
        self._first, self._is_last = first, is_last
        if first == 0:
            self.weights = product.layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return leaf(self, x)  # type: ignore[no-any-return]
        product = self._product
        version = None if is_compiling() or x.is_inference() else (x._version, torch.is_grad_enabled())
        last = product.last
        if last is not None and last[0] is x and last[1] == version and last[3] == self._first:
            y = last[2]
        else:
            y = product.layer(x)
        product.last = None if self._is_last else (x, version, y, self._first + self.out_features)
        return y[..., self._first : self._first + self.out_features]

    def extra_repr(self) -> str:
        rows = self._product.layer.out_features
        end = self._first + self.out_features
        return f"in_features={self.in_features}, out_features={self.out_features} ({self._first}..{end} of {rows})"


def join(layers: Sequence[BinaryLinear]) -> list[JoinedLinear]:
    """What takes the places of ``layers``, in the order of their calls: one product in place of several.

    Outputs are bit-equal. Scales per tensor become scales per channel; biases that lack are zeros.

    Raises:
        TypeError: a layer that is no BinaryLinear, or that has hooks or a forward of its own. ValueError: fewer than
            two layers, or layers that differ in in_features, levels, group_size, compute, activation, mode or device.
    """
    if len(layers) < 2:
        raise ValueError(f"layers: at least two are joined, not {len(layers)}")
    for layer in layers:
        if type(layer) is not BinaryLinear:
            raise TypeError(f"layers: BinaryLinear is needed, not {type(layer).__name__}")
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
        if any(hooks) or "forward" in vars(layer):
            raise TypeError(
                "layers: one has hooks or a forward of its own, which a joined layer would not call: remove them first"
            )
    head = layers[0]
    for name in ("in_features", "levels", "group_size", "compute", "activation", "training"):
        values = [getattr(layer, name) for layer in layers]
        if len(set(values)) > 1:
            raise ValueError(f"layers: {name} must be the same in all, not {', '.join(map(str, values))}")
    if len(devices := {layer.bits.device for layer in layers}) > 1:
        raise ValueError(f"layers: all must be on one device, not on {', '.join(map(str, devices))}")
    rows = [layer.out_features for layer in layers]
    biased = any(layer.bias is not None for layer in layers)
    joined = BinaryLinear(
        head.in_features,
        sum(rows),
        biased,
        levels=head.levels,
        scale="group" if head.group_size else "channel",
        group_size=head.group_size,
        compute=head.compute,
        activation=head.activation,
        device="meta",
    )
    with torch.inference_mode(False):
        scales = [
            layer.scale if layer.group_size else layer.scale.expand(count)
            for layer, count in zip(layers, rows, strict=True)
        ]
        biases = [
            layer.scale.new_zeros(count) if layer.bias is None else layer.bias
            for layer, count in zip(layers, rows, strict=True)
        ]
        bits = torch.cat([layer.bits for layer in layers], -2)
        joined.set_weights(bits, torch.cat(scales), torch.cat(biases) if biased else None)
    product = _Product(joined.train(head.training))
    firsts = [sum(rows[:i]) for i in range(len(rows))]
    return [
        JoinedLinear(product, first, count, first + count == sum(rows)).train(head.training)
        for first, count in zip(firsts, rows, strict=True)
    ]
