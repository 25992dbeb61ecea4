"""Packed models in transformers' save_pretrained and from_pretrained, and the anneal in its Trainer.

Importing this module registers the quantization method "quantopt" with transformers: `from_pretrained` of a packed
model needs it.
"""

import copy
import os
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantopt import extras

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"quantopt.integrations.transformers {extras.missing('transformers', why=error)}"
    ) from None

import safetensors

from quantopt.nn import BinaryConv2d, BinaryLinear, conv1d_to_linear
from quantopt.ops.inputs import compute_mode
from quantopt.optim import Anneal
from quantopt.packing import describe, pack, skeleton
from quantopt.packing.contents import key_of, memory_of, value_fault
from quantopt.packing.description import packed_layers
from quantopt.packing.layers import fault_of
from quantopt.selection import is_transposed
from quantopt.wrappers import unwrapped, unwrapped_model

__all__ = ["AnnealCallback", "QuantoptConfig", "QuantoptQuantizer", "prepare", "save_pretrained"]

METHOD = "quantopt"
VERSION = 1
_TENSORS = ("bits", "scale", "bias")
# A tensor of one byte under the name of the float weight. Without this module transformers would load a packed model
# with random weights in place of the packed layers and a warning; the shape of this tensor makes it an error.
_MARKER = "weight"


@register_quantization_config(METHOD)
class QuantoptConfig(QuantizationConfigMixin):
    """How the layers of a model are packed: ``quantization_config`` of a packed model, in config.json too.

    A user makes one for a float model whose weights lie on levels (stored inside ``opt.quantized()``), to pack it as
    it is loaded: ``from_pretrained(directory, quantization_config=QuantoptConfig())`` does what
    :func:`quantopt.pack` does without an optimizer. :func:`prepare` makes that of a packed model.

    Args:
        compute: of the layers that are packed as they are loaded: "auto" (which is "exact"), "exact", "bf16" or "int8".
        modules_to_not_convert: names of modules that are not packed as they are loaded, with all that is in them,
            ends of names ("lm_head"), or regular expressions of their beginnings, as elsewhere in transformers. Of a
            packed model: the layers that are not packed.
        layers: "layers" of the description of a packed model (:func:`quantopt.packing.describe`). Layers that differ in
            their names alone may be one entry of a list, {"names": [...], ...}, as config.json has it.
        folded: "folded" of the description.
        conv1d_to_linear: whether :func:`quantopt.nn.conv1d_to_linear` was called on the model that was saved; then it
            is on the one that is made.
        version: of this format.

    Raises ValueError for a value out of range, TypeError for an argument of another kind.
    """

    def __init__(
        self,
        compute: str = "auto",
        modules_to_not_convert: list[str] | None = None,
        layers: Mapping[str, Any] | list[dict[str, Any]] | None = None,
        folded: Mapping[str, str] | None = None,
        conv1d_to_linear: bool = False,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        compute_mode(compute)
        if version != VERSION:
            raise ValueError(f"version={version!r} of the quantization config: this quantopt reads {VERSION}")
        names = modules_to_not_convert
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise TypeError(f"modules_to_not_convert must be a list of names, not {names!r}")
        self.quant_method = quant_method
        self.version = version
        self.compute = compute
        self.modules_to_not_convert = None if names is None else list(names)
        self.layers = _by_name(layers or {})
        self.folded = dict(folded or {})
        self.conv1d_to_linear = bool(conv1d_to_linear)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: layers that differ in their names alone are one entry."""
        return {**super().to_dict(), "layers": _grouped(self.layers)}


def _grouped(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, fields in layers.items():
        groups.setdefault(repr(fields), {"names": [], **fields})["names"].append(name)
    return list(groups.values())


def _by_name(layers: Mapping[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(layers, Mapping):
        return dict(layers)
    result: dict[str, Any] = {}
    for group in layers:
        if not isinstance(group, Mapping) or not isinstance(group.get("names"), list):
            raise ValueError(f'layers of the quantization config: {group!r} has no list "names"')
        fields = {key: value for key, value in group.items() if key != "names"}
        for name in group["names"]:
            if name in result:
                raise ValueError(f"layers of the quantization config: {name!r} is there twice")
            result[name] = fields
    return result


@register_quantizer(METHOD)
class QuantoptQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a packed model."""

    quantization_config: QuantoptConfig

    def __init__(self, quantization_config: QuantoptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._names: dict[str, str] = {}  # {name of a packed layer in the files: the same in the model}
        if self.pre_quantized and not quantization_config.layers:
            raise ValueError(
                "the model's quantization config describes no packed layers: write it with "
                "quantopt.integrations.transformers.save_pretrained(packed, directory)"
            )
        if not self.pre_quantized and quantization_config.layers:
            raise ValueError(
                "quantization_config describes packed layers, and the model in the directory is not packed; pass "
                "QuantoptConfig() to pack it as it is loaded"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of it

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.conv1d_to_linear:
            conv1d_to_linear(model)
        if not self.pre_quantized:
            return
        self._names = _names_in(model, config.layers)
        folded = _names_in(model, config.folded)
        skeleton(
            model,
            {
                "layers": {own: config.layers[name] for name, own in self._names.items()},
                "folded": {own: config.folded[name] for name, own in folded.items()},
            },
        )
        _untie(model)
        files = [str(file) for file in kwargs.get("checkpoint_files") or ()]
        self._check_names(model, [file for file in files if file.endswith(".safetensors")])
        names = {*self._names, *self._names.values()}
        markers = {rf"(^|\.){re.escape(key_of(name, _MARKER))}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *markers,
        }

    def _check_names(self, model: Any, files: Iterable[str]) -> None:
        """Raises ValueError if a file has a tensor of a packed layer that the layer does not have."""
        packed, prefix = set(self._names.values()), model.base_model_prefix + "."
        for file in files:
            with safetensors.safe_open(file, framework="pt") as opened:
                kinds = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}
            for key, kind in kinds.items():
                name, _, tensor = key.rpartition(".")
                own = _name_in(packed, name, prefix)
                if own is None or tensor == _MARKER:
                    continue
                layer = model.get_submodule(own)
                if tensor == "bits" and kind != "U8":
                    raise ValueError(
                        f"{file}: tensor {key} of a packed layer is {kind}, not U8: the file is damaged"
                    )
                if layer._buffers.get(tensor) is None:
                    has = ", ".join(part for part in _TENSORS if layer._buffers.get(part) is not None)
                    raise ValueError(
                        f"{file}: tensor {key} is none of the packed layer {name}, which has {has}: config.json and "
                        "the tensors are of different models. Save the packed model again with "
                        "quantopt.integrations.transformers.save_pretrained"
                    )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._pack(model)
        layers = packed_layers(dict(model.named_modules()))
        for name, layer in layers.items() if self.pre_quantized else ():
            for key in _TENSORS:
                tensor = layer._buffers[key]
                # transformers marks what it has read, and fills the rest with random numbers or leaves it empty.
                if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(
                        f"tensor {key_of(name, key)} of a packed layer was not in the files, or not in the shape that "
                        f"config.json describes, {list(tensor.shape)}: config.json and the tensors are of different "
                        "models. Save the packed model again with quantopt.integrations.transformers.save_pretrained"
                    )
            layer.prepare()
        if fault := value_fault(layers, {}, model.state_dict()):
            raise ValueError(f"{model.config.name_or_path}: {fault}: the file is damaged")

    def _pack(self, model: Any) -> None:
        """Packs, in place, the layers of a float model whose weights lie on levels."""
        config = self.quantization_config
        packed: Any = pack(model, compute=config.compute)
        description = describe(packed)
        left = config.modules_to_not_convert
        description["layers"] = {
            name: fields
            for name, fields in description["layers"].items()
            if should_convert_module(name, left)
        }
        if not description["layers"]:
            raise ValueError(
                f"modules_to_not_convert={left!r} leaves out every layer whose weights lie on levels"
            )
        skeleton(model, description)
        for name in description["layers"]:
            layer, values = model.get_submodule(name), packed.get_submodule(name)
            layer.set_weights(values.bits, values.scale, values.bias)
        _untie(model)
        config.__dict__.update(_config_of(model).__dict__)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes; the description in ``model.config`` is renewed, since it writes that next."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # it writes the adapter alone
        model = unwrapped_model(model)
        self.quantization_config = model.config.quantization_config = _config_of(model)
        layers = packed_layers(dict(model.named_modules(remove_duplicate=False)))
        state: dict[str, Tensor] = dict(model.state_dict())
        if fault := value_fault(layers, {}, state):
            raise ValueError(f"{fault}, which from_pretrained refuses")
        seen = set()
        for name in layers:
            for key in _TENSORS:
                if (tensor := state.get(key_of(name, key))) is not None:
                    if memory_of(tensor) in seen:  # which transformers refuses in buffers
                        state[key_of(name, key)] = tensor.clone()
                    seen.add(memory_of(tensor))
            state[key_of(name, _MARKER)] = torch.zeros(1, dtype=torch.uint8)
        return state, {}


def _name_in(names: Container[str], name: str, prefix: str) -> str | None:
    """``name``, or what it is with or without the prefix of the model without its head, whichever is in ``names``."""
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)


def _names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """{name in the files: name in ``model``} of modules.

    Files of a model with a head may be loaded without it, and the other way round: names differ by the prefix then, and
    what is in the head is left out. Raises ValueError for a module that the model lacks."""
    modules, prefix = dict(model.named_modules(remove_duplicate=False)), model.base_model_prefix + "."
    others = type(model).__name__ not in (model.config.architectures or ())
    with_head = any(name.startswith(prefix) for name in names)
    result = {}
    for name in names:
        if (own := _name_in(modules, name, prefix)) is not None:
            result[name] = own
        elif not others or not with_head or name.startswith(prefix):
            raise ValueError(
                f"the quantization config describes a packed layer {name}, which {type(model).__name__} does not have: "
                f"load it as {(model.config.architectures or ['the class that was saved'])[0]}"
            )
    return result


def _untie(model: Any) -> None:
    """Packed layers have memory of their own: takes them out of what transformers ties."""
    packed = packed_layers(dict(model.named_modules(remove_duplicate=False)))
    for target, source in list(model.all_tied_weights_keys.items()):
        if {target.rpartition(".")[0], source.rpartition(".")[0]} & packed.keys():
            del model.all_tied_weights_keys[target]
    if isinstance(model.get_output_embeddings(), BinaryLinear | BinaryConv2d):
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def _config_of(packed: Any) -> QuantoptConfig:
    description = describe(packed)
    # The layers that could be packed, and were not.
    left = [name for name, module in packed.named_modules() if not fault_of(module)]
    return QuantoptConfig(
        modules_to_not_convert=left,
        layers=description["layers"],
        folded=description["folded"],
        conv1d_to_linear=_without_conv1d(packed),
    )


def _without_conv1d(packed: Any) -> bool:
    """Whether Conv1D that the class of the model makes are Linear in ``packed``."""
    with torch.device("meta"):
        as_made = dict(type(packed)(copy.deepcopy(packed.config)).named_modules())
    turned = [
        type(module) is nn.Linear
        for name, module in packed.named_modules()
        if name in as_made and is_transposed(as_made[name]) and not isinstance(module, BinaryLinear)
    ]
    if any(turned) and not all(turned):
        raise ValueError(
            "some of the model's Conv1D are Linear and others are not, so that from_pretrained could not make it: call "
            "quantopt.nn.conv1d_to_linear on the whole model, before the optimizer is made"
        )
    return any(turned)


def prepare(packed: nn.Module) -> Any:
    """Makes a packed model of transformers one that its ``save_pretrained`` writes and ``from_pretrained`` reads.

    Args:
        packed: what :func:`quantopt.pack` made of a PreTrainedModel. It is changed: it gets a ``quantization_config``
            (:class:`QuantoptConfig`) and the quantizer, as if it were loaded.

    Returns ``packed``, without what wraps it. Once prepared, a model describes its packed layers anew whenever it is
    saved. A packed output layer is no longer tied to the embedding, and ``config.tie_word_embeddings`` says so.

    Raises TypeError for what is no PreTrainedModel, ValueError if nothing in it is packed.
    """
    packed = unwrapped_model(packed)
    if not isinstance(packed, PreTrainedModel):
        raise TypeError(
            f"packed must be a PreTrainedModel of transformers, not {type(packed).__name__}: quantopt.save writes "
            "others"
        )
    model: Any = packed
    vars(model).pop("save_pretrained", None)  # the refusal of quantopt.pack
    config = _config_of(model)
    model.hf_quantizer = QuantoptQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    _untie(model)
    return model


def save_pretrained(packed: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """``prepare(packed).save_pretrained(directory, **options)``: see :func:`prepare`.

    ``AutoModelForCausalLM.from_pretrained(directory)`` (any class of transformers that has the layers) then gives the
    packed model, where this module is imported. Where it is not, that is an error of mismatched shapes of the packed
    layers' weights. Raises ValueError for values that a packed layer cannot have (not finite, negative scales).
    """
    prepare(packed).save_pretrained(directory, **options)


class AnnealCallback(TrainerCallback):
    """:class:`quantopt.Anneal` in transformers' Trainer, over the steps of the training.

    ``Trainer(..., optimizers=(opt, None), callbacks=[AnnealCallback()])``. The position is part of the optimizer's
    state, so that ``trainer.train(resume_from_checkpoint=True)`` goes on where the checkpoint was.

    With each training loss that the Trainer logs go the value that is annealed (epsilon, kappa or reg_strength) and
    ``opt.metrics()``: fraction_feasible, sign_flips (since the log before), distance, scale; with several quantised
    groups each name ends with "_" and the index of the group. ``trainer.state.log_history`` has them, and so has every
    callback behind this one. Those that ``report_to`` names come before it: pass them as callbacks behind it instead.

    Args:
        total_steps: of the anneal; None: the steps of the training.
        options: ``schedule`` and the settings of :class:`quantopt.Anneal`.

    Raises, as the training begins, what Anneal raises: TypeError for another optimizer, ValueError for unknown
    settings; and ValueError where the learning rate's scheduler has an Anneal too.
    """

    def __init__(self, total_steps: int | None = None, **options: Any) -> None:
        self.total_steps = total_steps
        self.options = options
        self.anneal: Anneal | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _holds_anneal(kwargs.get("lr_scheduler")):
            raise ValueError(
                "AnnealCallback: the scheduler of the Trainer has an Anneal already; leave it out of optimizers=, or "
                "leave out the callback"
            )
        total = state.max_steps if self.total_steps is None else self.total_steps
        first = 0 if state.global_step == 0 else None  # a training that begins, with a used optimizer too
        self.anneal = Anneal(unwrapped(kwargs["optimizer"]), total, last_step=first, **self.options)
        if state.global_step == 0:
            self.anneal.optimizer.metrics()  # sign flips are counted from here

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.anneal is not None:
            self.anneal.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.anneal is None or logs is None or "loss" not in logs:
            return
        values = self._values(self.anneal)
        logs.update(values)
        state.log_history[-1].update(values)

    @staticmethod
    def _values(anneal: Anneal) -> dict[str, float]:
        groups = anneal.optimizer.param_groups
        rows = {i: row for i, row in enumerate(anneal.optimizer.metrics()) if row["bits"] != 0}
        values: dict[str, float] = {}
        for i, row in rows.items():
            annealed = anneal.schedule(groups[i], 0, anneal.total_steps)
            end = f"_{i}" if len(rows) > 1 else ""
            values |= {f"{key}{end}": float(groups[i][key]) for key in annealed}
            values |= {f"{key}{end}": value for key, value in row.items() if key not in ("bits", "numel")}
        return values


def _holds_anneal(scheduler: Any) -> bool:
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    return any(isinstance(one, Anneal) for one in (scheduler, *getattr(scheduler, "_schedulers", ())))
