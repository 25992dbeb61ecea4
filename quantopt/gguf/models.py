"""Whole models: Llama and Qwen3 of the transformers library with packed layers, as GGUF files and back."""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.tensor_mapping import TensorNameMap
from torch import Tensor, nn

from quantopt import extras
from quantopt.gguf import configs, tokens
from quantopt.gguf.blocks import LEVELS, Scales, exact_blocks
from quantopt.gguf.configs import ARCHITECTURES
from quantopt.gguf.container import Field, File, Written, write
from quantopt.gguf.layers import layer_of, read_float, written_float, written_layer
from quantopt.nn import BinaryLinear
from quantopt.nn.linear import BinaryModule
from quantopt.packing import describe
from quantopt.packing.contents import first_on_meta, memory_of
from quantopt.wrappers import unwrapped_model

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_SUFFIXES = (".weight", ".bias")
_TERNARY = ("TQ1_0", "TQ2_0")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    scales: Scales = "exact",
    ternary: str = "TQ2_0",
    float_type: str | None = None,
    unpacked: Collection[str] = (),
) -> None:
    """Writes a LlamaForCausalLM or Qwen3ForCausalLM with packed linear layers as a GGUF file for llama.cpp.

    Layers of 2 levels become Q1_0, of 3 levels ``ternary``. An embedding whose values such blocks hold exactly, as
    :func:`load` reads it from a file that has it in them, is stored in them too. A head that is the embedding, by
    weight or by blocks, is not stored: llama.cpp takes the embedding.

    Args:
        model: what :func:`quantopt.pack` returns; wrappers of frameworks are taken off.
        path: of the file, which is replaced whole or not at all.
        tokenizer: a GGUF file whose tokenizer is copied; "bytes": a token for each byte, for models of 256 tokens (byte
            0 begins and ends a text); None: none, so that llama.cpp takes token ids only; bos_token_id and
            eos_token_id of the configuration are kept.
        scales: "exact": all scales must be numbers of fp16; "round": they are rounded, as in :func:`to_blocks`.
        ternary: "TQ2_0" (faster) or "TQ1_0" (smaller).
        float_type: of the weights that are not packed: "F32", "F16", "BF16", "Q8_0" (rounded); None: as their dtype.
            Norms and biases are always F32.
        unpacked: names of packed layers that no block holds exactly; their float weights are written.

    Raises:
        TypeError: an argument of another kind.
        ValueError: nothing is packed, or layers are joined. Naming the layer or attribute and the remedy: a layer that
            no block holds, a configuration that llama.cpp does not compute, a tokenizer of another size.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if ternary not in _TERNARY:
        raise ValueError(f"ternary must be one of {', '.join(_TERNARY)}, not {ternary!r}")
    model = unwrapped_model(model)
    config: Any = getattr(model, "config", None)
    metadata = configs.metadata_of(config)
    if not type(model).__name__.endswith("ForCausalLM"):
        raise TypeError(
            f"model must be a {config.model_type} with its head (ForCausalLM), not {type(model).__name__}"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BinaryModule)}
    if isinstance(unpacked, str):
        raise TypeError(f"unpacked must be a collection of names, not the name {unpacked!r}")
    unpacked = frozenset(unpacked)
    if missing := sorted(unpacked - set(layers)):
        raise ValueError(f"unpacked names {missing[0]!r}, which is no packed layer of the model")
    describe(model)  # raises where nothing is packed, or layers are joined
    written = _Writer(model, layers, scales, ternary, float_type, unpacked).tensors()
    kinds = [item.kind.name for item in written.values() if item.kind.name in LEVELS]
    file_type = max(sorted(set(kinds)), key=kinds.count, default=None)
    number = LlamaFileType[f"MOSTLY_{file_type}"] if file_type else LlamaFileType.GUESSED
    metadata["general.file_type"] = Field(GGUFValueType.UINT32, int(number))
    write(path, metadata | tokens.metadata_of(tokenizer, config), written.items())


class _Writer:
    """The tensors of a model as they are stored."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, BinaryModule],
        scales: Scales,
        ternary: str,
        float_type: str | None,
        unpacked: frozenset[str],
    ) -> None:
        self.model, self.layers, self.scales = model, layers, scales
        self.ternary, self.float_type, self.unpacked = ternary, float_type, unpacked
        config: Any = model.config
        self.config = config
        self.names = TensorNameMap(ARCHITECTURES[config.model_type].arch, config.num_hidden_layers)

    def tensors(self) -> dict[str, Written]:
        result: dict[str, Written] = {}
        done: set[str] = set()
        state = self.model.state_dict()
        for key, value in state.items():
            name = key.rpartition(".")[0]
            layer = self.layers.get(name)
            if value.is_meta:
                raise ValueError(f"{key} is on the meta device: it has no values to save")
            if layer is None:
                if key == "lm_head.weight" and self.is_embedding(value):
                    continue
                result[self.name(key)] = self.float(key, value)
            elif name not in done:
                done.add(name)
                result |= self.layer(name, layer)
        head = result.get(_OUTPUT)
        embedding = result[_EMBEDDING]
        if head is not None and "lm_head" in done and head.kind == embedding.kind:
            if np.array_equal(head.data, embedding.data):
                del result[_OUTPUT]
        return result

    def is_embedding(self, head: Tensor) -> bool:
        embedding: Any = self.model.get_input_embeddings().weight  # type: ignore[operator]
        if memory_of(head) == memory_of(embedding.detach()):
            return True
        return bool(self.config.tie_word_embeddings) and torch.equal(head, embedding)

    def name(self, key: str) -> str:
        name: str | None = self.names.get_name(key, _SUFFIXES)
        if name is None:
            raise ValueError(
                f"the model has the tensor {key}, which {self.config.model_type} in GGUF does not have"
            )
        return name

    def float(self, key: str, value: Tensor) -> Written:
        if self.name(key) == _EMBEDDING:
            for kind in ("Q1_0", self.ternary):
                if (blocks := exact_blocks(value, kind)) is not None:
                    return Written(GGMLQuantizationType[kind], blocks)
        return written_float(self.in_order(key, value), self.float_type, key)

    def layer(self, name: str, layer: BinaryModule) -> dict[str, Written]:
        if not isinstance(layer, BinaryLinear):
            raise ValueError(f"{name} is a {type(layer).__name__}: GGUF holds packed linear layers only")
        key = f"{name}.weight"
        if name in self.unpacked:
            weight = self.float(key, layer.weight)
        else:
            kind = self.ternary if layer.levels == 3 else None
            weight = written_layer(layer, kind, self.scales, name)
            if (rows := _order(key, self.config)) is not None:
                weight = weight._replace(data=weight.data[rows.numpy()])
        result = {self.name(key): weight}
        if layer.bias is not None:
            result[self.name(f"{name}.bias")] = self.float(f"{name}.bias", layer.bias)
        return result

    def in_order(self, key: str, value: Tensor) -> Tensor:
        rows = _order(key, self.config)
        return value if rows is None else value.detach().cpu()[rows]


def load(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, compute: str = "auto"
) -> nn.Module:
    """The model in a GGUF file of the architecture llama or qwen3: a LlamaForCausalLM or Qwen3ForCausalLM.

    Linear layers stored as Q1_0, TQ1_0 and TQ2_0 are packed, with the very bits and scales of the file; the others, the
    embedding and the norms are dequantised to ``dtype``. A packed embedding is dequantised, and its values are those of
    the file in float32. Where the file has no output.weight the head is the embedding: tied if that is float, and
    packed if that is packed. The model is in evaluation mode.

    Args:
        path: of the file.
        dtype: of what is not packed.
        compute: of the packed layers, as in :func:`quantopt.pack`.

    Raises:
        GGUFFileError: (a ValueError) naming the file and what is wrong: it is damaged, of another architecture, or has
            keys or tensors that transformers' model does not compute with.
        ImportError: transformers is missing.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, not {dtype!r}")
    file = File(path)
    kind = configs.architecture_of(file)
    settings = configs.settings_of(file)
    packed_embedding = file.stored(_EMBEDDING).kind.name in LEVELS
    settings["tie_word_embeddings"] = _OUTPUT not in file.tensors and not packed_embedding
    model = _on_meta(file, kind, settings, dtype)
    config: Any = model.config
    sources = _sources(file, model, settings["tie_word_embeddings"])
    _check_shapes(file, model, sources)
    values: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        key = f"{name}.weight"
        if isinstance(module, nn.Linear) and key in sources and file.stored(sources[key]).kind.name in LEVELS:
            packed = layer_of(file, sources[key], sources.get(f"{name}.bias"), _inverse(key, config), compute)
            model.set_submodule(name, packed)
            continue
        for key in (f"{name}.{part}" for part in module._parameters):
            if key in sources:
                value, rows = read_float(file, sources[key]), _inverse(key, config)
                values[key] = (value if rows is None else value[rows]).to(dtype)
    model.load_state_dict(values, strict=False, assign=True)
    if settings["tie_word_embeddings"]:
        model.tie_weights()  # type: ignore[operator]
    inner: Any = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config)  # its buffers are in no file
    if (left := first_on_meta(model)) is not None:
        file.fail(f"the model's tensor {left} is not in the file")
    return model.eval()


def _on_meta(file: File, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            f"quantopt.gguf.load {extras.missing('transformers', why=error, extra='gguf')}"
        ) from None
    try:
        config = AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers and torch refuse what the file says with errors of many kinds
        file.fail(f"transformers makes no {kind} of its metadata: {error}")
    return model


def _sources(file: File, model: nn.Module, tied: bool) -> dict[str, str]:
    """{key of the model: name of the tensor in the file}. Raises GGUFFileError unless they are one to one."""
    config: Any = model.config
    names = TensorNameMap(ARCHITECTURES[config.model_type].arch, config.num_hidden_layers)
    sources: dict[str, str] = {}
    for key in model.state_dict():
        name = names.get_name(key, _SUFFIXES)
        if name == _OUTPUT and name not in file.tensors:
            if tied:
                continue
            name = _EMBEDDING
        if name is None or name not in file.tensors:
            file.fail(f"the tensor {name} for {key} is missing")
        sources[key] = name
    if extra := sorted(set(file.tensors) - set(sources.values())):
        way = ": rope factors are not read" if extra[0].startswith("rope_freqs") else ""
        file.fail(f"the tensor {extra[0]} is not of a {config.model_type} of transformers{way}")
    return sources


def _check_shapes(file: File, model: nn.Module, sources: dict[str, str]) -> None:
    for key, value in model.state_dict().items():
        if key in sources and (shape := file.stored(sources[key]).shape) != tuple(value.shape):
            file.fail(f"tensor {sources[key]} has the shape {list(shape)}, the model {list(value.shape)}")


def _order(key: str, config: Any) -> Tensor | None:
    """The order of the rows of ``key`` in a file: row i of the file is row order[i] of transformers. None: the same.

    transformers turns row i of a head with row i + head_dim / 2, llama.cpp's "llama" row 2 i with row 2 i + 1."""
    name = key.rpartition(".")[0]
    if not ARCHITECTURES[config.model_type].permuted or not name.endswith((".q_proj", ".k_proj")):
        return None
    heads = config.num_attention_heads if name.endswith(".q_proj") else config.num_key_value_heads
    return torch.arange(heads * config.head_dim).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def _inverse(key: str, config: Any) -> Tensor | None:
    """The order of the rows of transformers: row i of transformers is row inverse[i] of the file."""
    order = _order(key, config)
    return None if order is None else order.argsort()
