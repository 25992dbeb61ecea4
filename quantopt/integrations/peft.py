"""LoRA of peft over packed linear layers: the packed weights stay as they are, the adapters train.

y = activation(x W^T + b) + s B A x, with W of the packed layer (:class:`quantopt.nn.BinaryLinear`), A [r, in_features]
and B [out_features, r] (Hu et al., "LoRA", 2021). Gradients flow through W to x.
"""

from typing import Any, NoReturn

from torch import nn

from quantopt import extras

try:
    from peft import LoraConfig
    from peft.tuners import lora
except ImportError as error:
    raise ImportError(f"quantopt.integrations.peft {extras.missing('peft', why=error)}") from None

from quantopt.nn import BinaryLinear

__all__ = ["PackedLora", "register"]

# Others compute the first adapters from the layer's weight, and most of them take those off it.
_INIT = (True, False, "gaussian")


class PackedLora(lora.Linear):
    """A packed linear layer with LoRA adapters, which peft makes with a configuration that is :func:`register`-ed.

    Plain LoRA: variants (DoRA, ...) and an ``init_lora_weights`` that changes the base weight are a ValueError.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.init_lora_weights not in _INIT:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} computes with the weight of the layer, which is "
                f"packed here and cannot change: use one of {_INIT}"
            )
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise ValueError(f"packed layers take plain LoRA, without variants: {error}") from None
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError(
            "a packed layer has levels for weights, which W + s B A is not on: an adapter cannot be merged into it. "
            "Keep the adapter beside the layer, or call unload() for the model without it"
        )


def register(config: LoraConfig) -> LoraConfig:
    """Has peft put adapters on packed linear layers where ``config`` names them; returns ``config``.

    ``get_peft_model(packed, register(LoraConfig(target_modules=[...])))``; and, since peft does not save it,
    ``PeftModel.from_pretrained(packed, directory, config=register(LoraConfig.from_pretrained(directory)))``. Layers
    that are not packed get peft's own adapters.

    Raises TypeError for another configuration, ValueError for target_modules="all-linear", by which peft means
    nn.Linear alone, and for a bias that would be trained. ``modules_to_save`` is for layers that are not packed: those
    have no parameters.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a LoraConfig of peft, not {type(config).__name__}")
    if config.target_modules == "all-linear":
        raise ValueError(
            'target_modules="all-linear" leaves out packed layers: name them, e.g. ["q_proj", "v_proj"]'
        )
    if config.bias != "none":
        raise ValueError(
            f'bias={config.bias!r}: biases of packed layers are not trained; use bias="none", or ordinary peft '
            "for layers that are not packed"
        )
    config._register_custom_module({BinaryLinear: PackedLora})
    return config
