"""The toys of the AskewSGD paper (Leconte, Schechtman, Moulines, AISTATS 2023), at its settings.

- logistic regression in 10 dimensions, whose true weights w* are signs: an optimizer for weights in {-1, +1} should
  find them, and end at the loss that full-precision training has at the vertices;
- two moons, classified by a 2-3-1 ReLU network without biases: its 9 weights make 512 binary networks, of which the
  best bounds what training can reach.

All runs of a method are trained at once: weights are [runs, ...], losses are summed over the runs, and with
scale="none" a step is elementwise, so that runs do not mix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import quantopt

DIMENSIONS = 10
HIDDEN = 3
WEIGHTS = 2 * HIDDEN + HIDDEN
TRAINING, TEST = 2000, 200  # points of the moons
UNIT = (
    1000 / TEST
)  # the paper's figures are 1000 times the mean loss of the test batch, divided by its points
LR = 1.0  # of the paper, of both problems
RATES = (
    "constant",
    "cosine",
)  # the paper's, and the rate falling to 0 by a cosine, the default of this package


class Settings(NamedTuple):
    """The sizes of a run; the defaults are those of the paper."""

    samples: int = 6000
    regressions: tuple[tuple[int, int], ...] = ((1000, 25), (100, 50))  # (batch, epochs)
    seeds: int = 20
    alpha: float = 1.0  # of the regression: not given
    runs: int = 50
    moons_epochs: int = 50
    moons_batch: int = 100
    moons_alpha: float = 4.0
    noise: float = 0.5  # not given: see `readings`
    noises: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    caps: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)  # not given: the tables have 0.5, of the authors' code
    draws: int = 5  # of the points of the moons; the table is of the first


class Problem(NamedTuple):
    """Points x [runs or 1, n, dimensions] with labels y [runs or 1, n] in {0, 1}, and the shapes of a run's weights."""

    x: Tensor
    y: Tensor
    shapes: tuple[tuple[int, ...], ...]


class Method(NamedTuple):
    """How a row of the tables trains: make(groups, lr, alpha, base) is its optimizer."""

    make: Callable[..., Any]
    printed: bool = False  # epsilon follows the paper's schedule
    bits: int = 1
    paper: str = ""  # the paper's test loss on two moons


def _printed(constrain: str, clamp: bool = False, cap: float = 0.5) -> Method:
    def make(groups: Any, lr: float, alpha: float, base: str) -> Any:
        return quantopt.AskewSGD(
            groups, lr, 0.0, base=base, constrain=constrain, clamp=clamp, rate=alpha * lr, cap=cap
        )

    return Method(make, printed=True, paper="" if clamp else "2.11 ± 0.01")


def _plain(optimizer: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def make(groups: Any, lr: float, alpha: float, base: str) -> Any:
        return optimizer(groups, lr, 0.0, 0.0, base=base, **options)  # no momentum, no weight decay

    return make


METHODS = {
    "float": Method(_plain(quantopt.AskewSGD), bits=0, paper="2.045"),
    "binaryconnect": Method(_plain(quantopt.BinaryConnect), paper="2.32 ± 0.11"),
    "askew printed, velocity": _printed("velocity"),
    "askew printed, gradient": _printed("gradient"),
    "askew clamped, velocity": _printed("velocity", clamp=True),
    "askew clamped, gradient": _printed("gradient", clamp=True),
    "askew with latent": Method(_plain(quantopt.AskewSGD, memory=True)),
    "stam alternating": Method(_plain(quantopt.STAM, form="alternating")),
    "stam splitting": Method(_plain(quantopt.STAM, form="splitting")),
}


def logits(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """[runs, n] of ReLU networks without biases, one per run: weights [runs, out, in] per hidden layer, then
    [runs, in]; x [runs, n, in]."""
    *hidden, last = weights
    for w in hidden:
        x = (x @ w.mT).relu()
    return (x @ last.unsqueeze(-1)).squeeze(-1)


def losses(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """[runs]: the mean logistic loss of each run over its points."""
    z = logits(weights, x)
    return F.binary_cross_entropy_with_logits(z, y.expand_as(z), reduction="none").mean(-1)


def vertices(weights: Sequence[Tensor]) -> list[Tensor]:
    """The nearest weights in {-1, +1}."""
    return [torch.where(w < 0, -1.0, 1.0) for w in weights]


class Trained(NamedTuple):
    """What training ends with, and the training losses [epochs + 1, runs] before it and after each epoch."""

    weights: list[Tensor]  # that the network runs with
    curve: Tensor  # of these weights
    projected: Tensor  # of their vertices


def orders(generators: Sequence[torch.Generator], n: int, batch: int) -> Iterator[Tensor]:
    """The batches of an epoch, [runs, batch] indices; each run has the order of its own generator."""
    order = torch.stack([torch.randperm(n, generator=g) for g in generators])
    return iter(order.split(batch, dim=1))


def train(
    method: Method,
    problem: Problem,
    *,
    runs: int,
    first: int = 0,
    epochs: int,
    batch: int,
    base: str,
    alpha: float,
    cosine: bool = False,
) -> Trained:
    """Trains runs first..first+runs-1 at once, from weights uniform in [-1, 1], at the rate 1 or at one that falls to 0
    by a cosine."""
    generators = [torch.Generator().manual_seed(first + run) for run in range(runs)]
    start = [[2 * torch.rand(shape, generator=g) - 1 for shape in problem.shapes] for g in generators]
    weights = [torch.stack(parts).requires_grad_() for parts in zip(*start, strict=True)]
    n = problem.x.shape[1]
    x, y = problem.x.expand(runs, -1, -1), problem.y.expand(runs, -1)
    row = torch.arange(runs)[:, None]
    total = epochs * -(-n // batch)
    groups = [{"params": weights, "bits": method.bits, "scale": "none"}]
    optimizer = method.make(groups, LR, alpha, base)
    anneal = quantopt.Anneal(optimizer, total, schedule="paper" if method.printed else None)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if cosine else None
    curve, projected = [], []

    def record() -> None:
        with torch.no_grad():
            curve.append(losses(weights, x, y))
            projected.append(losses(vertices(weights), x, y))

    record()
    for _ in range(epochs):
        for chosen in orders(generators, n, batch):
            optimizer.zero_grad()
            losses(weights, x[row, chosen], y[row, chosen]).sum().backward()
            optimizer.step()
            anneal.step()
            if rates is not None:
                rates.step()
        record()
    return Trained([w.detach() for w in weights], torch.stack(curve), torch.stack(projected))


# ---- logistic regression -------------------------------------------------------------------------------------


def regressions(samples: int, seeds: int) -> tuple[Problem, Tensor]:
    """(problem, w* [seeds, 10]): x uniform in [-1, 1]^10, w* uniform on the vertices, P(y = 1) = sigmoid(x.w*). Each
    seed has its own points."""
    points, labels, signs = [], [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)  # not the one of the training
        s = torch.randint(0, 2, (DIMENSIONS,), generator=generator) * 2.0 - 1
        x = 2 * torch.rand(samples, DIMENSIONS, generator=generator) - 1
        labels.append(torch.bernoulli(torch.sigmoid(x @ s), generator=generator))
        points.append(x)
        signs.append(s)
    return Problem(torch.stack(points), torch.stack(labels), ((DIMENSIONS,),)), torch.stack(signs)


def float_optimum(problem: Problem, steps: int = 10) -> Tensor:
    """[runs]: the least training loss of logistic regressions, by Newton's method."""
    x, y = problem.x.double(), problem.y.double()
    w = torch.zeros(len(x), x.shape[-1], dtype=torch.float64)
    for _ in range(steps):
        p = torch.sigmoid(logits([w], x))
        gradient = ((p - y)[..., None] * x).sum(1)
        curvature = (x * (p * (1 - p))[..., None]).mT @ x
        w = w - torch.linalg.solve(curvature, gradient)
    return losses([w], x, y)


def solve_regressions(settings: Settings) -> tuple[dict[str, Any], dict[str, dict[str, Trained]]]:
    """(what toys.json says, the trainings with each batch size and rate)."""
    problem, signs = regressions(settings.samples, settings.seeds)
    tables: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, dict[str, Trained]] = {}
    for rate in RATES:
        for batch, epochs in settings.regressions:
            title = f"batch {batch}, {epochs} epochs, {rate} rate"
            trained[title] = runs = {
                name: train(
                    method,
                    problem,
                    runs=settings.seeds,
                    epochs=epochs,
                    batch=batch,
                    base="sgd",
                    alpha=settings.alpha,
                    cosine=rate == "cosine",
                )
                for name, method in METHODS.items()
            }
            tables[title] = [_regression_row(name, run, runs["float"], signs) for name, run in runs.items()]
    return {
        "seeds": settings.seeds,
        "alpha": settings.alpha,
        "loss_float_optimum": float(float_optimum(problem).mean()),
        "rows": tables,
    }, trained


def _regression_row(name: str, run: Trained, at_float: Trained, signs: Tensor) -> dict[str, Any]:
    wrong = (vertices(run.weights)[0] != signs).sum(1)
    excess = 100 * (run.projected / at_float.projected[-1] - 1)  # above float at the vertices
    return {
        "method": name,
        "seeds_all_right": int((wrong == 0).sum()),
        "loss_vertices": float(run.projected[-1].mean()),
        "largest_excess_percent": float(excess[-1].max()),
        "late_excess_percent": float(excess[len(excess) // 2 :].mean()),
        "loss_network": float(run.curve[-1].mean()),
    }


# ---- two moons -----------------------------------------------------------------------------------------------


def moons(noise: float, draw: int = 0, standardised: bool = True) -> tuple[Problem, Problem]:
    """(training, test): two interleaved half circles, 2000 and 200 points; with ``standardised`` each coordinate has
    mean 0 and deviation 1 over the training points."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(TRAINING + TEST, noise=noise, random_state=draw)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    if standardised:
        x = (x - x[:TRAINING].mean(0)) / x[:TRAINING].std(0)
    shapes = ((HIDDEN, 2), (HIDDEN,))
    return Problem(x[None, :TRAINING], y[None, :TRAINING], shapes), Problem(
        x[None, TRAINING:], y[None, TRAINING:], shapes
    )


def binary_networks() -> list[Tensor]:
    """The weights of all 512 networks. Bit i of the index is set where the i-th of the weights, hidden layer first, is
    +1."""
    signs = (torch.arange(2**WEIGHTS)[:, None] >> torch.arange(WEIGHTS) & 1) * 2.0 - 1
    return [signs[:, : 2 * HIDDEN].reshape(-1, HIDDEN, 2), signs[:, 2 * HIDDEN :]]


def enumerate_networks(problem: Problem) -> Tensor:
    """[512]: the mean loss of every binary network."""
    return losses(binary_networks(), problem.x, problem.y)


def moons_losses(weights: Sequence[Tensor], test: Problem) -> Tensor:
    """[runs]: test losses in the unit of the paper's figures."""
    return UNIT * losses(weights, test.x, test.y)


def train_on_moons(
    method: Method, training: Problem, settings: Settings, *, cosine: bool = False, runs: int | None = None
) -> Trained:
    """Runs of a method by Adam, as the settings say."""
    return train(
        method,
        training,
        runs=settings.runs if runs is None else runs,
        epochs=settings.moons_epochs,
        batch=settings.moons_batch,
        base="adam",
        alpha=settings.moons_alpha,
        cosine=cosine,
    )


def readings(settings: Settings) -> list[dict[str, Any]]:
    """What the noise and the normalisation, which the paper does not give, make of its figures of float training and of
    the best network. Float: the mean of 10 runs at a rate that falls to 0."""
    rows = []
    for standardised in (False, True):
        for noise in settings.noises:
            training, test = moons(noise, standardised=standardised)
            best = UNIT * float(enumerate_networks(test).min())
            run = train_on_moons(
                METHODS["float"], training, settings, runs=min(10, settings.runs), cosine=True
            )
            reached = float(moons_losses(run.weights, test).mean())
            rows.append({"noise": noise, "standardised": standardised, "float": reached, "best": best})
    return rows


def _row(method: str, loss: Tensor, best: float) -> dict[str, Any]:
    return {
        "method": method,
        "mean": float(loss.mean()),
        "std": float(loss.std()),
        "median": float(loss.median()),
        "above_best": float(loss.mean()) - best,
        "runs_within_0.02": int((loss <= best + 0.02).sum()),
    }


def solve_moons(settings: Settings) -> tuple[dict[str, Any], dict[str, dict[str, Trained]]]:
    """(what toys.json says, the trainings with each rate)."""
    training, test = moons(settings.noise)
    on_test = UNIT * enumerate_networks(test)
    best = float(on_test.min())
    tables: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, dict[str, Trained]] = {}
    for rate in RATES:
        tables[rate], trained[f"{rate} rate"] = [], {}
        for name, method in METHODS.items():
            run = train_on_moons(method, training, settings, cosine=rate == "cosine")
            network, projected = (moons_losses(w, test) for w in (run.weights, vertices(run.weights)))
            if name == "float":
                tables[rate].append(_row(name, network, best))
            shown = "float at the vertices" if name == "float" else name
            tables[rate].append(_row(shown, projected, best))
            trained[f"{rate} rate"][name] = run
    return {
        "runs": settings.runs,
        "noise": settings.noise,
        "alpha": settings.moons_alpha,
        "best_of_512": best,
        "test_of_best_in_training": float(on_test[enumerate_networks(training).argmin()]),
        "readings": readings(settings),
        "rows": tables,
        "caps": [_cap_row(settings, training, test, cap) for cap in settings.caps],
        "other_points": [
            _other_points(settings, draw, standardised)
            for standardised in (True, False)
            for draw in range(standardised, settings.draws)
        ],
    }, trained


def _cap_row(settings: Settings, training: Problem, test: Problem, cap: float) -> dict[str, Any]:
    """AskewSGD as printed with another bound of the restoring step, at the constant rate."""
    row: dict[str, Any] = {"cap": cap}
    for constrain in ("velocity", "gradient"):
        weights = train_on_moons(_printed(constrain, cap=cap), training, settings).weights
        loss = moons_losses(vertices(weights), test)
        row |= {f"{constrain} mean": float(loss.mean()), f"{constrain} std": float(loss.std())}
    return row


def _other_points(settings: Settings, draw: int, standardised: bool) -> dict[str, Any]:
    """Two methods on other points, at the constant rate."""
    training, test = moons(settings.noise, draw, standardised)
    on_test = UNIT * enumerate_networks(test)
    row = {
        "draw": draw,
        "standardised": standardised,
        "best_of_512": float(on_test.min()),
        "test_of_best_in_training": float(on_test[enumerate_networks(training).argmin()]),
    }
    for name in ("binaryconnect", "askew printed, velocity"):
        loss = moons_losses(vertices(train_on_moons(METHODS[name], training, settings).weights), test)
        row |= {f"{name} mean": float(loss.mean()), f"{name} std": float(loss.std())}
    return row
