"""A text file as bytes: its training and validation part, random windows of the one, all of the other."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantopt.train.errors import InputError

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True)
class Text:
    """The bytes of a file, uint8, in two parts."""

    train: Tensor
    validation: Tensor

    def fingerprint(self) -> str:
        """Identifies the bytes and where they are divided."""
        digest = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        for part in (self.train, self.validation):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]

    def windows(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [count, length]: windows of the training part at random places, and the same one
        byte on."""
        starts = torch.randint(len(self.train) - length, (count, 1), generator=generator)
        window = self.train[starts + torch.arange(length + 1)].long()
        return window[:, :-1], window[:, 1:]

    def validation_windows(self, length: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), uint8 [n, length]: the validation part, cut into windows; what is left at its end is not
        used."""
        count = (len(self.validation) - 1) // length
        inputs, targets = self.validation[: count * length], self.validation[1 : count * length + 1]
        return inputs.view(count, length), targets.view(count, length)


def load(path: str, context: int, validation: float) -> Text:
    """The file at `path`, of which the last `validation` (a fraction) is held out.

    Raises InputError if it cannot be read, or if a part is shorter than a window of `context` bytes and the byte that
    follows it."""
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise InputError("--data", f"{path} cannot be read: {error.strerror or error}") from None
    held_out = round(len(contents) * validation)
    if min(held_out, len(contents) - held_out) < context + 1:
        raise InputError(
            "--data",
            f"{path} has {len(contents):,} bytes, of which {held_out:,} are for validation; both parts need at least "
            f"{context + 1:,}, a window of --context {context} and the byte behind it",
        )
    bytes_ = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
    first = len(contents) - held_out
    return Text(bytes_[:first], bytes_[first:])


def batches(inputs: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of at most `size` windows, int64."""
    for some, following in zip(inputs.split(size), targets.split(size), strict=True):
        yield some.long(), following.long()
