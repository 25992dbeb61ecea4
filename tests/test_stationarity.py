"""The gradient mappings of STAM: zero at stationary points, and the slope that is fitted to them."""

import math

import pytest
import torch

from quantopt.train import stationarity
from quantopt.train.stationarity import Numbers, Settings, sign

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = stationarity.regression(6, 40)


def test_gradient_and_smoothness_of_the_problem():
    w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    problem = stationarity.problem_of(SMALL.rows.double())
    torch.sigmoid(-w @ problem.rows.T).mean(1).sum().backward()
    torch.testing.assert_close(problem.gradient(w.detach()), w.grad)
    every = torch.arange(40).expand(3, -1)
    torch.testing.assert_close(problem.gradient(w.detach(), every), w.grad)
    for _ in range(20):
        v = torch.randn(1, 6, dtype=torch.float64)
        step = 1e-3 * torch.randn(1, 6, dtype=torch.float64)
        change = (problem.gradient(v + step) - problem.gradient(v)).norm() / step.norm()
        assert change <= problem.smoothness * (1 + 1e-6)


@pytest.mark.parametrize("case", range(len(stationarity.CASES)))
def test_mappings_fall_without_noise(case):
    """With the gradients of all rows the forms go to a point where their own mapping, the first, is zero."""
    case = stationarity.CASES[case]
    problem = stationarity.problem_of(SMALL.rows)
    settings = Settings(seeds=4, batch=40, step=5.0)
    ordered = torch.arange(40).expand(4, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: ordered)
        squares = stationarity.squared_mappings(problem, case, 2000, settings)
    assert squares.shape == (len(case.mappings), 2000, 4)
    assert (squares[0, -1] < 1e-3 * squares[0, 0]).all()
    if case.form == "splitting":
        assert (squares[-1, -1] < 1e-3 * squares[-1, 0]).all()
    else:  # without its pull the alternating form goes to a stationary point of h, which is none of F
        assert (squares[-1, -1] > 1e-3 * squares[-1, 0]).all() == (len(case.mappings) == 2)


def test_mappings_of_known_points():
    # h is constant, 1/2, where each row has its opposite: F is stationary at its levels, and there alone.
    flat = stationarity.problem_of(torch.cat([SMALL.rows, -SMALL.rows]))
    level = sign(torch.randn(2, 6))
    numbers = Numbers(gamma=0.1, kappa=0.2, lam=0.3, penalty=0.36)
    mappings = (
        stationarity.alternating_mapping,
        stationarity.alternating_relaxed,
        stationarity.splitting_mapping,
        stationarity.splitting_residual,
    )
    for mapping in mappings:
        assert mapping(flat, level, numbers).abs().max() < 1e-6
        assert (mapping(flat, 0.7 * level, numbers).abs() > 1e-3).all()
    # lam (1 + kappa) = lambda makes the two of the alternating form one.
    u = 1.5 * torch.randn(2, 6)
    torch.testing.assert_close(
        stationarity.alternating_mapping(SMALL, u, numbers),
        stationarity.alternating_relaxed(SMALL, u, numbers),
    )
    # At a vertex against which the gradient pushes the weight, F is stationary in the box, though grad F is not zero.
    one = stationarity.problem_of(torch.ones(1, 6))
    top = torch.ones(1, 6)
    assert one.relaxed_gradient(top, 1.0).abs().min() > 1e-3
    assert torch.equal(stationarity.splitting_mapping(one, top, numbers), torch.zeros(1, 6))
    assert (stationarity.splitting_mapping(one, -top, numbers).abs() > 1e-3).all()
    # The residual is zero where x = y - gamma grad h(y) there: the dual variable holds the gradient.
    x = top - numbers.gamma * one.gradient(top)
    assert stationarity.splitting_residual(one, x, numbers).abs().max() < 1e-6


def test_slope_and_its_error():
    horizons = (10, 40, 90, 1000)
    t = torch.tensor(horizons, dtype=torch.float64)
    exact = torch.stack([c * t**-0.5 for c in (1.0, 3.0, 0.2)], dim=1)
    assert stationarity.slope(horizons, exact) == pytest.approx((-0.5, 0.0), abs=1e-9)
    spread = torch.stack([t**-0.4, t**-0.5, t**-0.6], dim=1)
    assert stationarity.slope(horizons, spread) == pytest.approx((-0.5, 0.1 / math.sqrt(3)), abs=1e-9)


def test_measurement_repeats():
    settings = Settings(dimensions=5, samples=20, seeds=3, horizons=(4, 16))
    first, second = stationarity.measure(settings), stationarity.measure(settings)
    assert first == second
    assert [len(row["least"]) for row in first["rows"]] == [2] * 6
    assert all(
        low <= mean for row in first["rows"] for low, mean in zip(row["least"], row["mean"], strict=True)
    )
