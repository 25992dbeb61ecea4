"""Quantised layers one by one: what training did to each, and what the projection of that one alone costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantopt.optim import views
from quantopt.optim.base import LevelOptimizer
from quantopt.optim.sharded import local
from quantopt.train.checkpoint import check_number
from quantopt.train.measure import evaluate, reestimate_batch_norm, spread

_IMAGES = 1000

Flips = dict[str, list[int | None]]
"""Of each quantised weight, by its name, the sign flips at each point of the curves; None where an earlier version did
not count them."""


def _weights(optimizer: LevelOptimizer) -> Iterator[tuple[str, dict[str, Any], nn.Parameter]]:
    names = {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group["param_names"], strict=True)
    }
    for group, p in views.quantised_params(optimizer):
        yield names[id(p)], group, p


@torch.no_grad()
def metrics(optimizer: Any) -> dict[str, dict[str, Any]]:
    """`LevelOptimizer.metrics` of each quantised weight by itself, by its name. As there, sign flips are counted from
    the last call."""
    return {
        name: views.metrics(optimizer, {**group, "params": [p], "param_names": [name]})
        for name, group, p in _weights(optimizer)
    }


def totals(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`fraction_feasible` and `sign_flips` of all weights of :func:`metrics`."""
    weights = sum(row["numel"] for row in rows.values())
    inside = sum(row["fraction_feasible"] * row["numel"] for row in rows.values()) / weights
    return {"fraction_feasible": inside, "sign_flips": int(sum(row["sign_flips"] for row in rows.values()))}


def check_flips(saved: Any, names: Sequence[str], total: Sequence[int | None]) -> Flips:
    """The part `layer_flips` of a checkpoint, whose curve of sign flips is `total`. Raises ValueError unless it has a
    number for each of the weights `names` at each point, whose sum is the total there, or None for all of them; a
    checkpoint of an earlier version has None in place of the whole."""
    if saved is None:
        return {name: [None] * len(total) for name in names}
    if not isinstance(saved, dict) or saved.keys() != set(names):
        raise ValueError("layer_flips is not a dictionary of the quantised weights")
    for name, flips in saved.items():
        if not isinstance(flips, list) or len(flips) != len(total):
            raise ValueError(f"layer_flips of {name} is not one number for each of {len(total)} points")
        for count in flips:
            if count is not None:
                check_number(count, f"a number in layer_flips of {name}", 0, 2**63, kind=int)
    for flips, expected in zip(zip(*saved.values(), strict=True), total, strict=False):
        if set(flips) != {None} and (None in flips or sum(flips) != expected):
            raise ValueError(f"layer_flips are not {expected} together, as the curve of sign_flips has it")
    return {name: list(flips) for name, flips in saved.items()}


@torch.no_grad()
def measure(
    optimizer: LevelOptimizer, flips: Flips, quality: str, sample: str, quality_of: Callable[[], float]
) -> dict[str, Any]:
    """The part `layers` of a report.

    quality: "accuracy" (percent) or "loss" (nats per byte), which `quality_of()` gives of the network as it is. sample:
    in words, what it is measured on. `none` and `all` are the quality with no weight and with every weight projected;
    `alone` of a row is that with its weight projected and all others latent. `error` is |w - q| / |w| (2-norms) of the
    latent weight w and its projection q; `scale` the mean scale, `flips` the sign flips at each point of the curves.
    """
    rows = []
    for name, group, p in _weights(optimizer):
        w, q = local(views.operand(optimizer, p)), views.projected(optimizer, group, p)
        with views.swapped(optimizer, lambda g, other, p=p: _chosen(optimizer, g, other, p)):  # type: ignore[misc]
            alone = quality_of()
        rows.append(
            {
                "name": name,
                "shape": list(p.shape),
                "bits": group["bits"],
                "scale": float(local(optimizer.state[p]["scale"]).float().mean()),
                "scale_kind": str(group["scale"]),
                "flips": flips[name],
                "error": float((w - q).norm() / w.norm().clamp(min=1e-30)),
                "alone": alone,
            }
        )
    with optimizer.latent():
        none = quality_of()
    with optimizer.quantized():
        every = quality_of()
    return {"quality": quality, "sample": sample, "none": none, "all": every, "rows": rows}


def _chosen(
    optimizer: LevelOptimizer, group: dict[str, Any], p: nn.Parameter, projected: nn.Parameter
) -> torch.Tensor:
    return views.projected(optimizer, group, p) if p is projected else local(views.operand(optimizer, p))


@torch.no_grad()
def of_images(
    optimizer: LevelOptimizer,
    flips: Flips,
    model: nn.Module,
    train_images: torch.Tensor,
    augment: str,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
) -> dict[str, Any]:
    """:func:`measure` of a network of images, on 1000 test images at most, evenly spaced. Batch-norm statistics are
    estimated anew for each number, on as many training images. Leaves the network as it was."""
    chosen = spread(len(test_labels), _IMAGES).to(test_labels.device)
    images, labels = test_images[chosen], test_labels[chosen]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def accuracy() -> float:
        reestimate_batch_norm(model, train_images, augment, _IMAGES)
        return evaluate(model, images, labels)

    sample = f"{len(labels):,} of {len(test_labels):,} test images"
    table = measure(optimizer, flips, "accuracy", sample, accuracy)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return table
