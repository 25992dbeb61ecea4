"""The configuration of a transformers model as metadata of a GGUF file, and back."""

import re
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import MODEL_ARCH, GGUFValueType

from quantopt.gguf.container import Field, File
from quantopt.gguf.tokens import SPECIAL, TOKENS, id_key

ARCHITECTURE = "general.architecture"
_INTEGERS = (
    GGUFValueType.UINT8,
    GGUFValueType.UINT16,
    GGUFValueType.UINT32,
    GGUFValueType.UINT64,
    GGUFValueType.INT8,
    GGUFValueType.INT16,
    GGUFValueType.INT32,
    GGUFValueType.INT64,
)
_FLOATS = (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)
# Keys of an architecture, without its name, that are attributes of the configuration.
_SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_EPSILON = "attention.layer_norm_rms_epsilon"
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")
_BASE, _SCALING = "rope.freq_base", "rope.scaling."
_DEFAULT_BASE = 10000.0  # of llama.cpp
# Values of rope parameters that llama.cpp has too, when they are not written.
_ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1, "attention_factor": None}
_FULL = "full_attention"


class Architecture(NamedTuple):
    """What is particular to an architecture."""

    arch: MODEL_ARCH
    permuted: bool  # rows of q and k are in the order of interleaved rotary positions
    biases: bool  # llama.cpp reads biases of its linear layers


# By model_type of transformers, which is the name of the architecture in GGUF.
ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, permuted=True, biases=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, permuted=False, biases=False),
}


def metadata_of(config: Any) -> dict[str, Field]:
    """The metadata of the model that ``config`` describes.

    Raises ValueError naming the attribute of ``config`` that the architecture in llama.cpp does not have."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"model.config.model_type must be one of {', '.join(ARCHITECTURES)}, not {kind!r}")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"model.config.hidden_act is {config.hidden_act!r}: {kind} in GGUF has silu")
    if any(layer != _FULL for layer in getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"model.config.layer_types has others than {_FULL}: {kind} in GGUF has no sliding windows"
        )
    if config.attention_bias and not ARCHITECTURES[kind].biases:
        raise ValueError(f"model.config.attention_bias is True: {kind} in llama.cpp reads no biases")
    number, real = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {key: Field(number, int(getattr(config, attribute) or 0)) for key, attribute in _SIZES.items()}
    fields["attention.key_length"] = fields["attention.value_length"] = Field(number, head)
    if ARCHITECTURES[kind].permuted:
        fields["rope.dimension_count"] = Field(number, head)
    fields[_EPSILON] = Field(real, float(config.rms_norm_eps))
    fields |= _rope_fields(config)
    result = {
        ARCHITECTURE: Field(GGUFValueType.STRING, kind),
        "general.type": Field(GGUFValueType.STRING, "model"),
        "general.quantization_version": Field(number, 2),
    }
    return result | {f"{kind}.{key}": field for key, field in fields.items()}


def _rope_fields(config: Any) -> dict[str, Field]:
    rope = config.rope_parameters
    known = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings"}
    for key, value in rope.items():
        if key not in known and (key not in _ROPE_DEFAULTS or value not in (None, _ROPE_DEFAULTS[key])):
            raise ValueError(
                f"model.config has the rope parameter {key}={value!r}, which is not written to GGUF"
            )
    kind = rope["rope_type"]
    fields = {_BASE: Field(GGUFValueType.FLOAT32, float(rope["rope_theta"]))}
    if kind == "default":
        return fields
    if kind not in ("linear", "yarn"):
        raise ValueError(f"model.config has rope_type={kind!r}: default, linear and yarn are written to GGUF")
    fields[f"{_SCALING}type"] = Field(GGUFValueType.STRING, kind)
    fields[f"{_SCALING}factor"] = Field(GGUFValueType.FLOAT32, float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        if original is None:
            raise ValueError("model.config: rope_type='yarn' needs original_max_position_embeddings")
        fields[f"{_SCALING}original_context_length"] = Field(GGUFValueType.UINT32, int(original))
    return fields


class _Reader:
    """Takes the keys of an architecture out of a file, one by one, so that what is left over is known."""

    def __init__(self, file: File, kind: str) -> None:
        self.file, self.kind = file, kind
        self.left = {
            key.removeprefix(f"{kind}."): field
            for key, field in file.metadata.items()
            if key.startswith(f"{kind}.")
        }

    def integer(self, key: str, default: int | None = None) -> int:
        field = self.left.pop(key, None)
        if field is None:
            if default is None:
                self.file.fail(f"the key {self.kind}.{key} is missing")
            return default
        if field.kind not in _INTEGERS or not 1 <= field.value < 2**31:
            self.file.fail(f"{self.kind}.{key} is {field.value!r}, not a positive integer")
        return int(field.value)

    def real(self, key: str, default: float | None = None) -> float:
        field = self.left.pop(key, None)
        if field is None:
            if default is None:
                self.file.fail(f"the key {self.kind}.{key} is missing")
            return default
        if field.kind not in _FLOATS or not 0 < field.value < float("inf"):
            self.file.fail(f"{self.kind}.{key} is {field.value!r}, not a positive number")
        # 1e-06 rather than 9.999999974752427e-07, which is the same float32
        return (
            float(str(np.float32(field.value))) if field.kind == GGUFValueType.FLOAT32 else float(field.value)
        )

    def text(self, key: str, default: str) -> str:
        field = self.left.pop(key, None)
        if field is not None and field.kind != GGUFValueType.STRING:
            self.file.fail(f"{self.kind}.{key} is {field.value!r}, not a string")
        return default if field is None else str(field.value)

    def rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.real(_BASE, _DEFAULT_BASE)}
        kind = self.text(f"{_SCALING}type", "none")
        self.left.pop(f"{_SCALING}finetuned", None)  # says how the model was made
        if kind == "none":
            return rope
        if kind not in ("linear", "yarn"):
            self.file.fail(f"{self.kind}.{_SCALING}type is {kind!r}: none, linear and yarn are read")
        rope |= {"rope_type": kind, "factor": self.real(f"{_SCALING}factor")}
        original = f"{_SCALING}original_context_length"
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.integer(original)
        self.left.pop(original, None)
        return rope


def architecture_of(file: File) -> str:
    """The name of the architecture. Raises GGUFFileError if it is none of :data:`ARCHITECTURES`."""
    field = file.metadata.get(ARCHITECTURE)
    kind = None if field is None else field.value
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        file.fail(f"{ARCHITECTURE} is {kind!r}: {', '.join(ARCHITECTURES)} are read")
    return kind


def settings_of(file: File) -> dict[str, Any]:
    """The arguments of the configuration of the model in ``file``: what its metadata says, checked against the names
    and shapes of its tensors. Raises GGUFFileError naming the key; a key of the architecture that is not known is
    refused, since the model may not compute the same without it."""
    kind = architecture_of(file)
    parts = file.metadata.get("split.count")
    if parts is not None and parts.value != 1:
        file.fail("it is one part of a split model: merge the parts with llama-gguf-split first")
    reader = _Reader(file, kind)
    embedding = file.stored("token_embd.weight").shape
    blocks = {m[1] for name in file.tensors if (m := re.match(r"blk\.(\d+)\.", name))}
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head = reader.integer("attention.key_length", max(1, hidden // heads))
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": head,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "vocab_size": reader.integer("vocab_size", embedding[0]),
        "max_position_embeddings": reader.integer("context_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "intermediate_size": reader.integer("feed_forward_length"),
        "rms_norm_eps": reader.real(_EPSILON),
        "rope_parameters": reader.rope(),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    if ARCHITECTURES[kind].biases:
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    for key in _SAME_AS_HEAD:
        if (length := reader.integer(key, head)) != head:
            file.fail(
                f"{kind}.{key} is {length} and the heads are {head} long, which transformers does not have"
            )
    if reader.left:
        file.fail(f"the key {kind}.{next(iter(reader.left))} is not supported")
    if embedding != (settings["vocab_size"], hidden):
        file.fail(
            f"token_embd.weight has the shape {list(embedding)}, not {[settings['vocab_size'], hidden]}"
        )
    if len(blocks) != settings["num_hidden_layers"]:
        file.fail(
            f"{kind}.block_count is {settings['num_hidden_layers']}, the tensors are of {len(blocks)} blocks"
        )
    if heads % settings["num_key_value_heads"] or head % 2:
        file.fail(f"{heads} heads of {head} on {settings['num_key_value_heads']} of keys do not fit")
    return settings | _token_ids(file, settings["vocab_size"])


def _token_ids(file: File, vocabulary: int) -> dict[str, int | None]:
    tokens = file.metadata.get(TOKENS)
    if tokens is not None and (not isinstance(tokens.value, list) or len(tokens.value) != vocabulary):
        file.fail(f"{TOKENS} does not have a token for each of the {vocabulary} rows of token_embd.weight")
    ids: dict[str, int | None] = {}
    for name in SPECIAL:
        field = file.metadata.get(id_key(name))
        if field is not None and (field.kind not in _INTEGERS or not 0 <= field.value < vocabulary):
            file.fail(f"{id_key(name)} is {field.value!r}, no token of {vocabulary}")
        ids[f"{name}_token_id"] = None if field is None else int(field.value)
    return ids
