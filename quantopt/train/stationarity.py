"""How fast both forms of STAM become stationary: the least squared gradient mapping among T iterations, against T.

The problem is smooth and not convex, with rows a_i = y_i x_i:

    h(w) = mean_i sigmoid(-a_i.w):  |Hessian| <= L = lambda_max(A^T A / n) / (6 sqrt 3), as |sigmoid''| <= 1/(6 sqrt 3)
    F(w) = h(w) + lambda/2 |w - sgn w|^2,  lambda = L: the objective with relaxed binary weights

Gradients are those of minibatches of 8 rows drawn with replacement. The step size is that of the theorem, constant for
a horizon T: gamma = c / (L sqrt T), and kappa is held. The claim in the abstract of STAM's paper (arXiv 2204.11065),
eps^-4 iterations for a mapping of norm eps, is a squared mapping of T^(-1/2). Mappings take the full gradient of h:

    alternating   G(u) = grad h(w) + lam (u - sgn u),  w = (u + kappa sgn u) / (1 + kappa), the weights:
                  the gradient of (1 + kappa) h(w(u)) + lam/2 |u - sgn u|^2, the objective smoothed, and as
                  u - sgn u = (1 + kappa) (w - sgn w) also grad F(w) where lam (1 + kappa) = lambda
    splitting     G(y) = (y - clamp(y - s grad F(y), -1, 1)) / s,  s = 1 / (2 L), y = clamp(x, -1, 1), the weights:
                  zero where y is a stationary point of F in the box
    residual      R(x) = (y - z) / gamma, z = relax(2 y - x - gamma grad h(y)): the splitting's fixed-point residual
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quantopt


class Settings(NamedTuple):
    """The sizes of a measurement."""

    dimensions: int = 50
    samples: int = 500
    batch: int = 8
    seeds: int = 8  # of first weights and minibatches; the problem is one
    step: float = 2.0  # c
    horizons: tuple[int, ...] = (100, 200, 400, 800, 1600, 3200, 6400, 12800)


class Problem(NamedTuple):
    """h(w) = mean_i sigmoid(-rows_i.w)."""

    rows: Tensor  # [n, d]
    smoothness: float  # L

    def gradient(self, w: Tensor, chosen: Tensor | None = None) -> Tensor:
        """[seeds, d]: grad h at w [seeds, d], of all rows, or of those ``chosen`` [seeds, batch] for each seed."""
        if chosen is None:
            p = torch.sigmoid(-w @ self.rows.T)
            return -(p * (1 - p)) @ self.rows / len(self.rows)
        rows = self.rows[chosen]
        p = torch.sigmoid(-(rows @ w.unsqueeze(-1)).squeeze(-1))
        return -((p * (1 - p)).unsqueeze(-2) @ rows).squeeze(-2) / chosen.shape[1]

    def relaxed_gradient(self, w: Tensor, penalty: float) -> Tensor:
        """grad F at w, lambda = ``penalty``."""
        return self.gradient(w) + penalty * (w - sign(w))


def problem_of(rows: Tensor) -> Problem:
    """The problem of rows [n, d], with its smoothness."""
    largest = torch.linalg.eigvalsh(rows.T.double() @ rows.double() / len(rows))[-1]
    return Problem(rows, float(largest) / (6 * math.sqrt(3)))


def regression(dimensions: int, samples: int, seed: int = 0) -> Problem:
    """x Gaussian of covariance (4/d) I, w* a vertex, P(y = +1) = sigmoid(2 x.w*)."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 / math.sqrt(dimensions) * torch.randn(samples, dimensions, generator=generator)
    signs = sign(torch.rand(dimensions, generator=generator) - 0.5)
    y = 2 * torch.bernoulli(torch.sigmoid(2 * x @ signs), generator=generator) - 1
    return problem_of(y[:, None] * x)


def sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)


def relax(x: Tensor, kappa: float) -> Tensor:
    """(x + kappa sgn x) / (1 + kappa)."""
    return (x + kappa * sign(x)) / (1 + kappa)


class Numbers(NamedTuple):
    """The numbers of a training."""

    gamma: float
    kappa: float
    lam: float
    penalty: float  # lambda


LatentMapping = Callable[[Problem, Tensor, Numbers], Tensor]  # of the latent [seeds, d]


def alternating_mapping(problem: Problem, u: Tensor, numbers: Numbers) -> Tensor:
    """G(u) of the alternating form."""
    return problem.gradient(relax(u, numbers.kappa)) + numbers.lam * (u - sign(u))


def alternating_relaxed(problem: Problem, u: Tensor, numbers: Numbers) -> Tensor:
    """grad F at the weights of the alternating form."""
    return problem.relaxed_gradient(relax(u, numbers.kappa), numbers.penalty)


def splitting_mapping(problem: Problem, x: Tensor, numbers: Numbers) -> Tensor:
    """G(y) of the splitting."""
    y, s = x.clamp(-1, 1), 1 / (2 * problem.smoothness)
    return (y - (y - s * problem.relaxed_gradient(y, numbers.penalty)).clamp(-1, 1)) / s


def splitting_residual(problem: Problem, x: Tensor, numbers: Numbers) -> Tensor:
    """R(x) of the splitting."""
    y = x.clamp(-1, 1)
    return (y - relax(2 * y - x - numbers.gamma * problem.gradient(y), numbers.kappa)) / numbers.gamma


class Case(NamedTuple):
    """A form with its numbers, and what is measured of it: rows of the table."""

    form: str
    numbers: Callable[[float, float], Numbers]  # of gamma and L
    mappings: Mapping[str, LatentMapping]


KAPPA = 0.1  # where it is the same for every horizon

CASES = (
    Case(
        "alternating",
        lambda gamma, L: Numbers(gamma, KAPPA, L / (1 + KAPPA), L),
        {"alternating, lam (1 + kappa) = L: G": alternating_mapping},
    ),
    Case(
        "alternating",
        lambda gamma, L: Numbers(gamma, KAPPA, 0.0, L),
        {
            "alternating, lam = 0: G = grad h(w)": alternating_mapping,
            "alternating, lam = 0: grad F(w)": alternating_relaxed,
        },
    ),
    Case(
        "splitting",
        lambda gamma, L: Numbers(gamma, L * gamma, 0.0, L),
        {
            "splitting, kappa = L gamma: G": splitting_mapping,
            "splitting, kappa = L gamma: R": splitting_residual,
        },
    ),
    Case(
        "splitting",
        lambda gamma, L: Numbers(gamma, KAPPA, 0.0, KAPPA / gamma),
        {"splitting, kappa = 0.1: G, lambda = kappa / gamma": splitting_mapping},
    ),
)


def squared_mappings(problem: Problem, case: Case, horizon: int, settings: Settings, seed: int = 0) -> Tensor:
    """[mappings, horizon, seeds]: the squared norms at each iteration, before its step."""
    gamma = settings.step / (problem.smoothness * math.sqrt(horizon))
    numbers = case.numbers(gamma, problem.smoothness)
    generator = torch.Generator().manual_seed(seed)
    dimensions = problem.rows.shape[1]
    weights = nn.Parameter(2 * torch.rand(settings.seeds, dimensions, generator=generator) - 1)
    optimizer = quantopt.STAM(
        [weights],
        gamma,
        0.0,
        0.0,
        form=case.form,
        kappa=numbers.kappa,
        lam=numbers.lam,
        bits=1,
        scale="none",
    )
    latent = weights.detach().clone()
    squares = []
    for _ in range(horizon):
        squares.append(
            torch.stack([f(problem, latent, numbers).square().sum(-1) for f in case.mappings.values()])
        )
        chosen = torch.randint(len(problem.rows), (settings.seeds, settings.batch), generator=generator)
        weights.grad = problem.gradient(weights.detach(), chosen)
        optimizer.step()
        latent = optimizer.state[weights]["latent"]
    return torch.stack(squares, dim=1)


def slope(horizons: Sequence[int], values: Tensor) -> tuple[float, float]:
    """(slope, its standard error) of log values [horizons, seeds] against log T: least squares for each seed, then the
    mean over the seeds and their deviation / sqrt(seeds)."""
    t = torch.tensor(horizons, dtype=torch.float64).log()
    t = t - t.mean()
    slopes = (t[:, None] * values.double().log()).sum(0) / t.square().sum()
    return float(slopes.mean()), float(slopes.std() / math.sqrt(len(slopes)))


def measure(settings: Settings) -> dict[str, Any]:
    """What toys.json says: for each row the least and the mean squared mapping at every horizon (means over the seeds),
    with their slopes."""
    problem = regression(settings.dimensions, settings.samples)
    rows = []
    for case in CASES:
        trainings = [squared_mappings(problem, case, horizon, settings) for horizon in settings.horizons]
        for index, name in enumerate(case.mappings):
            row: dict[str, Any] = {"row": name}
            for kind, of in (("least", lambda q: q.min(0).values), ("mean", lambda q: q.mean(0))):
                values = torch.stack([of(squares[index]) for squares in trainings])
                row[kind] = values.mean(1).tolist()
                row[f"{kind}_slope"], row[f"{kind}_slope_error"] = slope(settings.horizons, values)
            rows.append(row)
    return {**settings._asdict(), "smoothness": problem.smoothness, "rows": rows}
