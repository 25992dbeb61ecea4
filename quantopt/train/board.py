"""`--tensorboard`: the curves of a run, and the histograms of its weights, for TensorBoard."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantopt import extras
from quantopt.train.directory import check_out
from quantopt.train.errors import InputError
from quantopt.train.measure import HISTOGRAM_BINS, HISTOGRAM_LIMIT


class Board:
    """Event files in a directory.

    A run that is continued writes all its points anew, and says so in the file: TensorBoard drops what the files before
    it have, whether that ended before the checkpoint or after it.
    """

    def __init__(self, directory: str) -> None:
        """Writes nothing yet. Raises InputError without tensorboard, or if nothing can be written to the directory."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard", extras.missing("tensorboard", why=error)) from None
        check_out(Path(directory), "--tensorboard")
        self._open = partial(SummaryWriter, directory, purge_step=0)
        self._writer: Any = None
        self._written = 0  # points

    def write(self, at: list[int], curves: Mapping[str, list[Any]], histograms: Tensor) -> None:
        """Writes the points that are not written yet. histograms: a row more, before training."""
        if self._writer is None:
            self._writer = self._open()
            self._histogram(histograms[0], 0)
        for i in range(self._written, len(at)):
            for name, values in curves.items():
                if values[i] is not None:
                    self._writer.add_scalar(name, values[i], at[i])
            self._histogram(histograms[i + 1], at[i])
        self._written = len(at)
        self._writer.flush()

    def _histogram(self, counts: Tensor, at: int) -> None:
        edges = torch.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1, dtype=torch.float64)
        middles, counts = (edges[1:] + edges[:-1]) / 2, counts.double().cpu()
        self._writer.add_histogram_raw(
            "weights / level",
            min=-HISTOGRAM_LIMIT,
            max=HISTOGRAM_LIMIT,
            num=float(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=at,
        )

    def close(self) -> None:
        """Ends the file, if there is one."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def opened(directory: str | None) -> Iterator[Callable[[Any], None] | None]:
    """Context of the event files of a run in `directory`: what writes the points of a Trainer that are not written yet.
    None for the directory None. Raises InputError as :class:`Board`."""
    if directory is None:
        yield None
        return
    board = Board(directory)
    try:
        yield lambda trainer: board.write(trainer.at, trainer.curves, trainer.histograms)
    finally:
        board.close()
