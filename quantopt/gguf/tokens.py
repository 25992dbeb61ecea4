"""The metadata of a tokenizer: copied from another file, a token for each byte, or none."""

import os
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, TokenType

from quantopt.gguf.container import Field, File

PREFIX = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
SPECIAL = ("bos", "eos")  # the tokens that a configuration names and a file too
_BYTES = 256


def id_key(name: str) -> str:
    """The key of the id of a special token."""
    return f"{PREFIX}ggml.{name}_token_id"


def metadata_of(tokenizer: str | os.PathLike[str] | None, config: Any) -> dict[str, Field]:
    """The fields of ``tokenizer``, which :func:`quantopt.gguf.save` describes, for the model of ``config``."""
    vocabulary = config.vocab_size
    if tokenizer is None:
        fields = {"tokenizer.ggml.model": Field(GGUFValueType.STRING, "no_vocab")}
        for name in SPECIAL:
            token = getattr(config, f"{name}_token_id", None)
            if isinstance(token, list | tuple):
                if len(token) > 1:
                    raise ValueError(
                        f"model.config.{name}_token_id is {token}, and a file without a tokenizer has one: keep one "
                        "of them in the configuration, or give tokenizer= a GGUF file"
                    )
                token = token[0] if token else None
            if token is not None:
                fields[id_key(name)] = Field(GGUFValueType.UINT32, int(token))
        return fields
    if tokenizer == "bytes":
        if vocabulary != _BYTES:
            raise ValueError(
                f'tokenizer="bytes" has 256 tokens, the model {vocabulary}: give a GGUF file or None'
            )
        for name in SPECIAL:
            if (token := getattr(config, f"{name}_token_id", None)) not in (None, 0):
                raise ValueError(
                    f'model.config.{name}_token_id is {token}: tokenizer="bytes" has byte 0 there; set it to 0 or None'
                )
        return _bytes()
    file = File(Path(tokenizer))
    fields = {key: field for key, field in file.metadata.items() if key.startswith(PREFIX)}
    if not fields:
        file.fail("it holds no tokenizer to copy")
    count = len(fields[TOKENS].value) if TOKENS in fields else vocabulary
    if count != vocabulary:
        raise ValueError(f"the tokenizer of {file.path} has {count} tokens, the model {vocabulary}")
    return fields


def _bytes() -> dict[str, Field]:
    """A byte-level BPE tokenizer without merges: the id of a token is the byte. Byte 0 begins and ends a text."""
    text, number = GGUFValueType.STRING, GGUFValueType.UINT32
    array = GGUFValueType.ARRAY
    return {
        "tokenizer.ggml.model": Field(text, "gpt2"),
        "tokenizer.ggml.pre": Field(text, "gpt-2"),
        TOKENS: Field(array, _byte_tokens(), text),
        "tokenizer.ggml.token_type": Field(array, [int(TokenType.NORMAL)] * _BYTES, GGUFValueType.INT32),
        "tokenizer.ggml.merges": Field(array, [], text),
        **{id_key(name): Field(number, 0) for name in SPECIAL},
        "tokenizer.ggml.add_bos_token": Field(GGUFValueType.BOOL, False),
    }


def _byte_tokens() -> list[str]:
    """The characters that stand for the bytes in GPT-2's vocabulary: printable ones for themselves, the others from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return [chr(byte if byte in printable else _BYTES + others.index(byte)) for byte in range(_BYTES)]
