"""Measurements of networks: accuracy, bytes, speed, histograms of weights."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import quantopt
from quantopt.reference.levels import spread_over
from quantopt.train import augment

HISTOGRAM_LIMIT = 2.5
HISTOGRAM_BINS = 101
_HISTOGRAM_POINTS = 201  # in a report

# Larger batches do not fit the caches of a CPU, smaller ones do not fill a GPU.
_EVALUATION_BATCH = {"cpu": 100, "cuda": 1000}
_STATISTICS_BATCH = 250
_STATISTICS_IMAGES = 20_000


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of `images` that `model`, in evaluation mode, classifies as `labels`. Leaves the mode as it was."""
    return 100 * int(right(model, images, labels)) / len(images)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Number (int64) of `images` that `model`, in evaluation mode, classifies as `labels`. Leaves the mode."""
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    size = _EVALUATION_BATCH[images.device.type]
    for batch, expected in zip(images.split(size), labels.split(size), strict=True) if len(images) else ():
        correct += (model(batch).argmax(1) == expected).sum()
    model.train(training)
    return correct


def reestimate_batch_norm(
    model: nn.Module, images: Tensor, mode: str = "none", most: int = _STATISTICS_IMAGES
) -> None:
    """Replaces the batch-norm statistics by averages over `images` at the present weights (torch's `update_bn`).

    mode: the augmentation of `images`. It must be that of training: with statistics of images that are not augmented
    the accuracy fell by 1 to 3 points (docs/experiments.md, 1). Uses `most` images at most, in equal batches; their
    order and shifts are random but the same at each call.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
    size = min(_STATISTICS_BATCH, len(order))
    whole = len(order) // size * size
    generator = torch.Generator(images.device).manual_seed(0)

    def batches() -> Iterator[Tensor]:
        for part in order[:whole].to(images.device).split(size):
            yield augment.apply(images[part], mode, generator)

    update_bn(batches(), model)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the state_dict of `model`; tensors that share memory count once."""
    tensors = {(t.data_ptr(), t.shape): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def weight_bytes(model: nn.Module, packed: nn.Module) -> tuple[int, int]:
    """Bytes of the weights of all layers that were packed: in `model`, and in `packed` (bits and scales)."""
    before = after = 0
    for name, layer in packed.named_modules():
        if isinstance(layer, quantopt.nn.BinaryLinear | quantopt.nn.BinaryConv2d):
            weight = model.get_submodule(name).get_parameter("weight")
            before += weight.numel() * weight.element_size()
            after += sum(t.numel() * t.element_size() for t in (layer.bits, layer.scale))
    return before, after


@torch.no_grad()
def images_per_second(
    networks: Sequence[Callable[[Tensor], object]], images: Tensor, most: int | None = None
) -> list[float]:
    """Images per second of each network, in evaluation mode: the median over up to ten batches, of `most` images at
    most.

    The networks take turns at each batch, so that other load on the machine affects all of them.
    """
    times: list[list[float]] = [[] for _ in networks]
    size = min(most or _EVALUATION_BATCH[images.device.type], len(images))
    for batch in (images[:size], *images.split(size)[:10]):  # the first is a warm-up
        if len(batch) < size:
            break
        for network, seconds in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(batch)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - start)
    return [size / statistics.median(seconds[1:]) for seconds in times]


@torch.no_grad()
def histogram(model: nn.Module, optimizer: Any | None) -> Tensor:
    """Counts [HISTOGRAM_BINS] of the weights that `optimizer` quantises, in units of their outer level, from
    -HISTOGRAM_LIMIT to HISTOGRAM_LIMIT. optimizer None: of all weights, in units of their standard deviation."""
    counts = torch.zeros(HISTOGRAM_BINS)
    for weight in model.parameters():
        if weight.dim() < 2:
            continue
        if optimizer is None:
            values = weight / weight.std()
        else:
            grid = optimizer.quantization(weight)
            if grid is None:
                continue
            values = weight / spread_over(grid.max_level, weight, grid.group_size)
        counts += torch.histc(values.float().cpu(), HISTOGRAM_BINS, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
    return counts


def spread(count: int, most: int) -> Tensor:
    """At most `most` of the indices 0..count-1, evenly spaced, with the first and the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def plain_histograms(histograms: Tensor) -> dict[str, Any]:
    """Rows of :func:`histogram`, before training and after each point of the curves, as a report has them: `counts` at
    the `points` 0, 1, ..., of which a long run has some, and the `limit` of weight / level."""
    points = spread(len(histograms), _HISTOGRAM_POINTS)
    counts = histograms[points.to(histograms.device)].long().tolist()
    return {"limit": HISTOGRAM_LIMIT, "points": points.tolist(), "counts": counts}


class Stopwatch:
    """Sums the time spent in `with` blocks; on a GPU that is the time between events of the stream. Inside a CUDA graph
    nothing is measured."""

    def __init__(self, device: torch.device, graphed: bool) -> None:
        self._cuda = device.type == "cuda"
        self._graphed = graphed
        self._marks: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        if not self._graphed:
            self._start = self._mark()

    def __exit__(self, *error: object) -> None:
        if not self._graphed:
            self._marks.append((self._start, self._mark()))

    def read(self) -> float:
        """Seconds since the last call."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in marks) / 1e3)
        return float(sum(end - start for start, end in marks))
