"""BinaryLinear, and what it shares with BinaryConv2d."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from quantopt.nn.traced import leaf
from quantopt.ops.inputs import check_activation, compute_mode
from quantopt.ops.linear import run_linear
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs, plane_weights_of
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

SCALES = ("tensor", "channel", "group")


class BinaryModule(nn.Module):
    """Packed weights as buffers: bits, scale and bias are in the state_dict, the kernels' layout is derived from them.

    bits: uint8 [N, ceil(K/8)], or [P, N, ceil(K/8)] where levels > 2. scale: fp32 [1] | [N] | [N, ceil(K/group_size)].
    The layout is derived again when a state_dict is loaded, the module moved or copied. It serves only the bits that it
    comes from: after writing to ``bits``, and with other bits (torch.func.functional_call), each call derives it, which
    takes longer, until :meth:`prepare`. A program of torch.export holds the layout: on the CPU the first call after
    loading it compares it with what the bits give, and the others use it; on a GPU each call derives it. Scales of
    groups are kept in that layout until they are written to. Writes that torch does not count (as those through
    ``bits.data`` and ``scale.data``) are not seen.
    """

    bits: Tensor
    scale: Tensor
    bias: Tensor | None
    tiles: Tensor | None

    def __init__(
        self,
        rows: int,
        row_length: int,
        bias: bool,
        levels: int,
        scale: str,
        group_size: int,
        compute: str,
        activation: str,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        compute_mode(compute)
        check_activation(activation)
        if scale not in SCALES:
            raise ValueError(f'scale must be "tensor", "channel" or "group", not {scale!r}')
        if not isinstance(group_size, int) or group_size < 0 or (scale == "group") != (group_size > 0):
            raise ValueError(
                f'group_size must be positive with scale="group" and 0 without, not {group_size!r}'
            )
        self.plane_weights = plane_weights_of(levels)
        self.levels = levels
        self.group_size = group_size
        self.compute = compute
        self.activation = activation
        self.row_length = row_length
        planes = len(self.plane_weights)
        shape = [rows, (row_length + 7) // 8]
        scale_shape = {
            "tensor": [1],
            "channel": [rows],
            "group": [rows, -(-row_length // group_size) if group_size else 0],
        }
        self.register_buffer(
            "bits", torch.zeros([planes, *shape] if planes > 1 else shape, dtype=torch.uint8, device=device)
        )
        self.register_buffer("scale", torch.ones(scale_shape[scale], dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(rows, dtype=torch.float32, device=device) if bias else None)
        self.register_buffer("tiles", None, persistent=False)

    def _derive(self) -> Tensor | None:
        if self.bits.is_meta:
            return None
        return binary_tiles(self.bits, self.row_length)

    @property
    def packed(self) -> PackedWeight:
        """The buffers as one record."""
        return PackedWeight(
            self.bits, self.scale, self.bias, self.row_length, self.plane_weights, self.group_size, self.tiles
        )

    def prepare(self) -> Self:
        """Derives the kernels' layout from ``bits``."""
        with torch.inference_mode(
            False
        ):  # torch counts no writes to tensors made in it, and lets no gradient pass
            for name in ("bits", "scale", "bias"):
                made = self._buffers[name]
                if made is not None and made.is_inference():
                    self._buffers[name] = made.clone()
            self.tiles = self._derive()
        return self

    def set_weights(self, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Self:
        """Takes the tensors over (no copy of ``bits`` and ``scale``), and derives the layout."""
        for name, new in (("bits", bits), ("scale", scale)):
            old = getattr(self, name)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} must be {old.dtype} {list(old.shape)}, not {new.dtype} {list(new.shape)}"
                )
        shapes = [None if b is None else list(b.shape) for b in (bias, self.bias)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"bias must be {shapes[1]}, not {shapes[0]}")
        self.bits, self.scale = bits, scale
        if bias is not None:
            self.bias = bias.detach().to(torch.float32, copy=True)
        return self.prepare()

    @property
    def weight(self) -> Tensor:
        """W as fp32 [N, K], built at each access; for code that looks at a layer's weight, and for debugging."""
        return reference.dense_weight(self.packed, torch.float32)

    @property
    def scale_kind(self) -> str:
        """ "tensor", "channel" or "group"."""
        return "group" if self.group_size else ("tensor" if self.scale.numel() == 1 else "channel")

    def _activation_repr(self) -> str:
        return "" if self.activation == "none" else f", activation={self.activation}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rows = self.bits.shape[-2]
        either = (
            [] if self.group_size else [[1], [rows]]
        )  # scales per tensor and per channel may replace each other
        for name, wanted in (("bits", "torch.uint8"), ("scale", "floating"), ("bias", "floating")):
            new, old = state_dict.get(prefix + name), self._buffers[name]
            if not isinstance(new, Tensor) or old is None:
                continue
            shapes = [list(old.shape), *(either if name == "scale" else [])]
            if list(new.shape) not in shapes:  # before anything is copied
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: it must be {' or '.join(map(str, shapes))}, not "
                    f"{list(new.shape)}; this layer was not loaded"
                )
                return
            if not (new.dtype == torch.uint8 if name == "bits" else new.is_floating_point()):
                # copy_ would convert anything.
                error_msgs.append(
                    f"{prefix}{name} must be {wanted}, not {new.dtype}; this layer was not loaded"
                )
                return
        new = state_dict.get(prefix + "scale")
        if isinstance(new, Tensor) and new.shape != self.scale.shape:
            self.scale = self.scale.new_ones(new.shape)
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if any(prefix + name in state_dict for name in ("bits", "scale", "bias")):
            self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in ("scale", "bias")}
        super()._apply(fn, recurse)
        for name, old in before.items():  # scale and bias stay fp32 when a model is moved to bf16
            new = self._buffers[name]
            if new is not None and new.dtype != torch.float32 and not new.is_meta:
                setattr(self, name, old.to(device=new.device))  # type: ignore[union-attr]
        self.prepare()  # of the bits where they are now
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "tiles": None}  # derived again by __setstate__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


class BinaryLinear(BinaryModule):
    """y = activation(x W^T + b) with W [out_features, in_features] = scale * sum_i w_i (±1 plane i).

    One bit per weight and plane.

    Args:
        in_features: as in nn.Linear.
        out_features: as in nn.Linear.
        bias: as in nn.Linear.
        levels: 2 (binary), 3 (ternary), 4, 8, 16 or 17 uniform levels: 1, 2, 2, 3, 4 or 5 bit planes,
            of the weights w_i = 1, 2, 4, ..., and of an odd number of levels another one of weight 1.
        scale: "tensor" [1], "channel" [out_features] or "group" [out_features, ceil(in_features/group_size)].
        group_size: consecutive weights of a row that share a scale, with scale="group".
        compute: "auto" (which is "exact"), "exact", "bf16": x is rounded to bfloat16, or "int8": x is rounded per row
            to 8 bits; see :func:`quantopt.binary_linear`.
        activation: "none", "relu", "gelu" (by erf) or "silu".

    A new module has all weights -1 until a state_dict is loaded. For inference: gradients flow to x only.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        levels: int = 2,
        scale: str = "channel",
        group_size: int = 0,
        compute: str = "auto",
        activation: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, bias, levels, scale, group_size, compute, activation, device
        )
        self.in_features = in_features
        self.out_features = out_features
        self.prepare()

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute: str = "auto") -> Self:
        """Binarises a layer: W = a sgn(weight), a = mean|weight| of each row."""
        weight = linear.weight.detach()
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, compute=compute, device="meta"
        )
        module.set_weights(pack_signs(weight), weight.float().abs().mean(1), linear.bias)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor and isinstance(x, fx.Proxy):  # the first is half as dear as the second
            return leaf(self, x)  # type: ignore[no-any-return]
        # self.packed, in a fifth of its time: a module finds its buffers slowly, and a small layer takes 3 us in all.
        buffers = self._buffers
        fields = (
            buffers["bits"],
            buffers["scale"],
            buffers["bias"],
            self.in_features,
            self.plane_weights,
            self.group_size,
            buffers["tiles"],
        )
        return run_linear(x, tuple.__new__(PackedWeight, fields), self.compute, self.activation)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"levels={self.levels}, scale={self.scale_kind}{group}, compute={self.compute}{self._activation_repr()}"
        )


class BinaryOutProjection(BinaryLinear):
    """The out_proj of an nn.MultiheadAttention, which reads weight and bias of the layer and never calls it.

    It is packed in memory and in files, but its weight is built at each call of the attention. Weight and bias are
    given in ``dtype``, that of the float layer, which follows ``.to(dtype)`` of the model.
    """

    dtype = torch.float32

    @property
    def weight(self) -> Tensor:
        return super().weight.to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.to(self.dtype) if name == "bias" and value is not None else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
