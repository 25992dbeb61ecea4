"""The invariants of docs/algorithms.md (section 6), on the float64 reference."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from quantopt.reference import askew, baselines, levels, stam

GRIDS = (2, 3, 4, 8, 16)
coordinates = st.floats(-1.0, 1.0).filter(lambda t: t == 0 or abs(t) > 1e-9)
epsilons = st.floats(1e-6, 1.0)
rates = st.floats(0.0, 1.0)
directions = st.floats(-5.0, 5.0)
one = torch.ones((), dtype=torch.float64)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def velocity(t: float, d: float = 0.0, hi: float = 1.0, **options: float) -> float:
    settings = dict(lr=0.1, decay=0.0, epsilon=0.5, rate=0.1, cap=0.25) | options
    return float(askew.velocity_step(double(t * hi), double(d), one * hi, 2, **settings)) / hi


# ---- levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", GRIDS)
def test_projection_is_the_nearest_of_k_symmetric_levels(count: int) -> None:
    hi = one * 1.3
    w = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    all_levels = 1.3 * (2 * torch.arange(count, dtype=torch.float64) / (count - 1) - 1)
    nearest = (w[:, None] - all_levels).abs().min(dim=1).values
    q = levels.project(w, hi, count)
    torch.testing.assert_close((w - q).abs(), nearest, atol=1e-12, rtol=0)
    assert torch.unique((q * 1e9).round()).numel() == count
    torch.testing.assert_close(1.3 * (2 * levels.codes(w, hi, count).double() / (count - 1) - 1), q)


@pytest.mark.parametrize("count", GRIDS)
def test_projection_ties_go_away_from_zero_and_up_at_zero(count: int) -> None:
    hi = torch.tensor(float(count - 1), dtype=torch.float64)  # levels at odd or even integers, ties exact
    ties = torch.arange(-count + 2, count - 1, 2, dtype=torch.float64)
    expected = ties + torch.where(ties >= 0, 1.0, -1.0)
    assert torch.equal(levels.project(ties, hi, count), expected)


def test_a_b_bit_grid_is_a_sum_of_bit_planes() -> None:
    for bits in (1, 2, 3, 4):
        count = 2**bits
        w = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
        codes = levels.codes(w, one, count)
        planes = sum(2**i * (2.0 * ((codes >> i) & 1).double() - 1) for i in range(bits))
        torch.testing.assert_close(planes / (count - 1), levels.project(w, one, count))


def test_frozen_scale_follows_its_definition() -> None:
    w = torch.randn(5, 3, 7, dtype=torch.float64)
    assert torch.equal(levels.frozen_scale(w, "none"), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(levels.frozen_scale(w, "tensor"), w.std().reshape(1))
    torch.testing.assert_close(levels.frozen_scale(w, "channel"), w.reshape(5, -1).std(dim=1))
    groups = levels.frozen_scale(w, "group", 4)
    assert groups.shape == (5, 6)
    torch.testing.assert_close(groups[2, 1], w.reshape(5, -1)[2, 4:8].std())
    torch.testing.assert_close(groups[2, 5], w.reshape(5, -1)[2, 20:].abs().mean())  # one element
    constant = torch.full((4,), -3.0, dtype=torch.float64)
    torch.testing.assert_close(levels.frozen_scale(constant, "tensor"), double(3.0))  # no spread
    spread = levels.spread_over(groups, w, 4).reshape(5, -1)
    assert torch.equal(spread[:, 4], groups[:, 1]) and torch.equal(spread[:, 20], groups[:, 5])


# ---- AskewSGD ----------------------------------------------------------------------------------------------------


@given(t=coordinates, epsilon=epsilons)
def test_k_is_the_authors_formula_with_binary_levels(t: float, epsilon: float) -> None:
    assume(abs(t) > 1e-3 and abs(abs(t) - 1) > 1e-3)
    u = 1 - t * t
    assume(abs(u - math.sqrt(epsilon)) > 1e-6)
    alpha = 0.7
    authors = alpha * (epsilon - (t * t - 1) ** 2) / (4 * t * (t * t - 1))
    ours = math.copysign(1, t) * float(askew.restoring_speed(double(t), epsilon, alpha))
    assert ours == pytest.approx(authors, rel=1e-9)


@given(t=coordinates, d=directions, wd=st.floats(0.0, 0.1))
def test_epsilon_one_is_clamped_sgd(t: float, d: float, wd: float) -> None:
    expected = min(max(t - 0.1 * (d + wd * t), -1.0), 1.0)
    assert velocity(t, d, epsilon=1.0, decay=wd) == pytest.approx(expected, abs=1e-15)


@given(t=coordinates, d=directions, epsilon=epsilons, rate=rates, hi=st.floats(0.01, 10.0))
def test_infeasible_weights_move_outward_at_least_by_k_or_cap(
    t: float, d: float, epsilon: float, rate: float, hi: float
) -> None:
    u = (1 - abs(t)) * (1 + abs(t))
    assume(t != 0 and u > math.sqrt(epsilon) + 1e-9)
    k = rate * (u - epsilon / u) / (4 * abs(t))
    after = velocity(t, d, hi=hi, epsilon=epsilon, rate=rate)
    assert math.copysign(1, t) * (after - t) >= min(k, 0.25, 1 - abs(t)) - 1e-12
    assert abs(after) >= abs(t) - 1e-12
    assert abs(after) <= 1.0


@given(t=coordinates, epsilon=epsilons, rate=st.floats(0.01, 0.9))
def test_with_zero_gradient_h_shrinks_by_one_minus_r_and_t_never_passes_the_level(
    t: float, epsilon: float, rate: float
) -> None:
    u = (1 - abs(t)) * (1 + abs(t))
    assume(abs(t) > 0.05 and u > math.sqrt(epsilon) + 1e-9)
    after = velocity(t, epsilon=epsilon, rate=rate, cap=math.inf)
    assert abs(after) <= 1.0 and after * t > 0
    h, h_after = (epsilon - (1 - x * x) ** 2 for x in (t, after))
    step = abs(after) - abs(t)
    curvature = 6 * max(abs(t), abs(after)) ** 2 + 2  # |h''| / 2 along the step
    assert abs(h_after) <= abs(h) * (1 - rate) + curvature * step * step or h_after >= 0


@given(t=coordinates, d=directions, epsilon=epsilons)
def test_one_step_from_a_feasible_point_stays_within_its_length(t: float, d: float, epsilon: float) -> None:
    u = (1 - abs(t)) * (1 + abs(t))
    assume(u <= math.sqrt(epsilon))
    assert abs(velocity(t, d, epsilon=epsilon)) >= min(askew.t_star(epsilon) - 0.1 * abs(d), 1.0) - 1e-12


@given(
    t=coordinates,
    g=directions,
    epsilon=epsilons,
    rate=st.floats(0.0, 0.5),
    cap=st.sampled_from([0.05, 0.25, 0.5]),
    count=st.sampled_from(GRIDS),
)
def test_both_modes_are_equal_without_momentum_and_decay(
    t: float, g: float, epsilon: float, rate: float, cap: float, count: int
) -> None:
    hi, lr = one * 0.7, 0.2
    w = double(t * 0.7)
    a = askew.velocity_step(w, double(g), hi, count, lr=lr, decay=0.0, epsilon=epsilon, rate=rate, cap=cap)
    bent = askew.constrained_gradient(double(g), w, hi, count, lr=lr, epsilon=epsilon, rate=rate, cap=cap)
    b = askew.gradient_step(w, bent, hi, lr=lr, decay=0.0)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@given(t=st.floats(1.001, 4.0), g=directions, epsilon=st.floats(0.0, 1.0), count=st.sampled_from(GRIDS))
def test_beyond_the_outer_levels_the_gradient_is_left_as_it_is(
    t: float, g: float, epsilon: float, count: int
) -> None:
    """Although h < 0 from |t| = sqrt(1 + sqrt(e)) on; the clamp brings the weight back."""
    settings = dict(lr=0.2, epsilon=epsilon, rate=0.3, cap=0.25)
    for w in (double(1 + (t - 1) / (count - 1)), double(-1 - (t - 1) / (count - 1))):  # |t| in the outer cell
        assert torch.equal(askew.constrained_gradient(double(g), w, one, count, **settings), double(g))
        assert float(askew.gradient_step(w, double(g), one, lr=0.2, decay=0.0).abs()) <= 1.0


@given(t=st.floats(-2.0, 2.0), epsilon=st.floats(0.0, 1.0), count=st.sampled_from(GRIDS))
def test_memory_projects_onto_the_nearest_feasible_point(t: float, epsilon: float, count: int) -> None:
    hi = one * 0.9
    latent = double(t * 0.9)
    p = askew.feasible_projection(latent, latent, hi, count, epsilon=epsilon, rate=math.inf, cap=0.25)
    half, _, t_p = levels.cell(p, hi, count)
    assert float(t_p.abs()) >= askew.t_star(epsilon) - 1e-9
    _, mid_l, _ = levels.cell(latent, hi, count)
    feasible = torch.linspace(askew.t_star(epsilon), 1, 2001, dtype=torch.float64)
    candidates = torch.cat([mid_l + half * feasible, mid_l - half * feasible])
    assert float((p - latent).abs()) <= float((candidates - latent).abs().min()) + 1e-9


@given(
    before=coordinates, latent=st.floats(-2.0, 2.0), epsilon=st.floats(1e-6, 0.9), rate=st.floats(0.0, 1.0)
)
def test_limited_memory_grows_by_at_most_k_or_cap(
    before: float, latent: float, epsilon: float, rate: float
) -> None:
    u = (1 - abs(before)) * (1 + abs(before))
    assume(before != 0 and u > math.sqrt(epsilon) + 1e-9)
    k = rate * (u - epsilon / u) / (4 * abs(before))
    p = askew.feasible_projection(
        double(latent), double(before), one, 2, epsilon=epsilon, rate=rate, cap=0.25
    )
    assert abs(float(p)) <= abs(before) + min(k, 0.25) + 1e-12
    assert (float(p) >= 0) == (latent >= 0)


# ---- AskewSGD as printed -----------------------------------------------------------------------------------------

beyond = st.floats(1.001, 4.0) | st.floats(-4.0, -1.001)


def printed(
    t: float,
    d: float = 0.0,
    count: int = 2,
    constrain: str = "velocity",
    bound: float = math.inf,
    **options: float,
) -> float:
    """The step from coordinate ``t`` of the outermost cell on t's side, in coordinates of that cell."""
    settings = dict(epsilon=0.5, rate=0.1, cap=0.25, bound=bound) | options
    lr, hi = 0.1, one * 1.7
    half = 1.7 / (count - 1)
    mid = math.copysign(1.7 - half, t) if count > 2 else 0.0
    w, d = double(mid + half * t), double(half * d)
    if constrain == "velocity":
        after = askew.velocity_step(w, d, hi, count, lr=lr, decay=0.0, **settings)
    else:
        g = askew.constrained_gradient(d, w, hi, count, lr=lr, **settings)
        after = askew.gradient_step(w, g, hi, lr=lr, decay=0.0, bound=bound)
    return (float(after) - mid) / half


def paper_velocity(w: float, d: float, eps: float, alpha: float, most: float) -> float:
    """The rule as the paper prints it, for levels -1 and 1."""
    if abs(w) <= 1:
        phi, slope = (w - 1) ** 2 * (w + 1) ** 2, 2 * (w - 1) * (w + 1) ** 2 + 2 * (w - 1) ** 2 * (w + 1)
    elif w > 1:
        phi, slope = (w - 1) ** 2, 2 * (w - 1)
    else:
        phi, slope = (w + 1) ** 2, 2 * (w + 1)
    psi, slope = eps - phi, -slope
    if psi > 0 or -slope * d >= -alpha * psi >= 0:
        return -d
    return min(max(-alpha * psi / slope, -most), most) if w != 0 else most


@given(w=coordinates | beyond, d=directions, epsilon=epsilons, rate=rates, cap=st.floats(0.05, 0.5))
def test_gradient_mode_is_the_rule_of_the_paper(
    w: float, d: float, epsilon: float, rate: float, cap: float
) -> None:
    """But for speeds between the cap and the least speed: the paper compares before it cuts to the cap."""
    lr = 0.1
    alpha, most = rate / lr, cap / lr
    after = printed(w, d, constrain="gradient", epsilon=epsilon, rate=rate, cap=cap)
    uncut = paper_velocity(w, d, epsilon, alpha, math.inf)
    expected = paper_velocity(w, d, epsilon, alpha, most)
    infeasible = abs(w) > 1 + math.sqrt(epsilon) or abs(w) < askew.t_star(epsilon)
    edge = min(abs(abs(w) - askew.t_star(epsilon)), abs(abs(w) - 1 - math.sqrt(epsilon)))
    assume(edge > 1e-6 and abs(abs(d) - abs(uncut)) > 1e-9)
    if infeasible and w != 0 and d * uncut < 0 and most <= abs(d) < abs(uncut):
        assert abs(expected) == most
        expected = -d
    assert after == pytest.approx(w + lr * expected, abs=1e-9)


@given(
    t=beyond, epsilon=st.floats(0.0, 1.0), rate=st.floats(0.01, 1.0), count=st.sampled_from(GRIDS),
    constrain=st.sampled_from(["velocity", "gradient"]),
)  # fmt: skip
def test_with_zero_gradient_delta_falls_towards_the_root_of_e_and_never_below(
    t: float, epsilon: float, rate: float, count: int, constrain: str
) -> None:
    root, delta = math.sqrt(epsilon), abs(t) - 1
    after = printed(t, 0.0, count, constrain, epsilon=epsilon, rate=rate)
    assert after * t > 0
    if delta > root + 1e-9:
        assert root - 1e-9 <= abs(after) - 1 < delta
    elif delta < root - 1e-9:
        assert after == pytest.approx(t, abs=1e-12)


def test_weights_beyond_follow_e_to_their_level() -> None:
    t = 1.9
    for step in range(400):
        epsilon = 0.95 ** (step / 2)
        t = printed(t, epsilon=epsilon)
        assert t - 1 >= min(math.sqrt(epsilon), 0.9) - 1e-9
    assert t - 1 == pytest.approx(math.sqrt(epsilon), rel=0.2)


@given(
    t=beyond, d=directions, epsilon=st.floats(0.0, 1.0), rate=rates, count=st.sampled_from(GRIDS),
    constrain=st.sampled_from(["velocity", "gradient"]),
)  # fmt: skip
def test_infeasible_weights_beyond_move_inward_at_least_by_the_least_speed_or_cap(
    t: float, d: float, epsilon: float, rate: float, count: int, constrain: str
) -> None:
    delta = abs(t) - 1
    assume(abs(delta - math.sqrt(epsilon)) > 1e-9)
    after = printed(t, d, count, constrain, epsilon=epsilon, rate=rate)
    inward = math.copysign(1, -t) * (after - t)
    if delta > math.sqrt(epsilon):
        least = min(rate * (delta * delta - epsilon) / (2 * delta), 0.25)
        assert inward == pytest.approx(max(math.copysign(0.1, t) * d, least), abs=1e-9)
    else:
        assert after == pytest.approx(t - 0.1 * d, abs=1e-9)


@given(
    t=coordinates, d=directions, epsilon=epsilons, rate=rates, count=st.sampled_from(GRIDS),
    constrain=st.sampled_from(["velocity", "gradient"]),
)  # fmt: skip
def test_inside_the_levels_the_clamp_alone_makes_the_difference(
    t: float, d: float, epsilon: float, rate: float, count: int, constrain: str
) -> None:
    assume(t != 0 and (count == 2 or abs(t) < 1))
    free = printed(t, d, count, constrain, epsilon=epsilon, rate=rate)
    clamped = printed(t, d, count, constrain, bound=1.0, epsilon=epsilon, rate=rate)
    outward = math.copysign(1, t) * free  # of the outermost cell, whose other side is the grid's inside
    if outward <= 1 and (count == 2 or free * t > -1) and abs(free) <= 1:
        assert clamped == free
    elif outward > 1:
        assert math.copysign(1, t) * clamped == pytest.approx(1.0, abs=1e-12)


@given(t=coordinates, epsilon=epsilons, rate=rates, cap=st.floats(0.0, 0.5))
def test_the_restoring_step_passes_no_level(t: float, epsilon: float, rate: float, cap: float) -> None:
    assert abs(printed(t, epsilon=epsilon, rate=rate, cap=cap)) <= 1 + 1e-12


@pytest.mark.parametrize("constrain", ["velocity", "gradient"])
@given(d=directions, epsilon=st.floats(0.0, 1.0), rate=rates)
def test_a_weight_in_the_middle_moves_up_by_the_cap(
    constrain: str, d: float, epsilon: float, rate: float
) -> None:
    expected = 0.25 if epsilon < 1 else -0.1 * d
    assert printed(0.0, d, 2, constrain, epsilon=epsilon, rate=rate) == pytest.approx(expected, abs=1e-12)


# ---- STAM --------------------------------------------------------------------------------------------------------


def splitting(x: float, d: float, kappa: float, count: int = 2, lr: float = 0.1, wd: float = 0.0) -> float:
    y = stam.box(double(x), one, lr=lr, weight_decay=wd)
    r, ex = stam.splitting_point(double(x), y, double(d), lr=lr)
    return float(stam.splitting_step(r, ex, one, count, kappa=kappa))


@given(x=st.floats(-0.4, 0.4), d=directions)
def test_splitting_with_kappa_zero_inside_the_box_is_sgd(x: float, d: float) -> None:
    assert splitting(x, d, 0.0) == pytest.approx(x - 0.1 * d, abs=1e-15)


@given(x=st.floats(-1.5, 1.5), d=st.floats(-4.0, 4.0))
def test_splitting_with_infinite_kappa_gives_levels(x: float, d: float) -> None:
    y = min(max(x, -1.0), 1.0)
    ex = x - y
    assume(abs(ex) + 0.1 * abs(d) < 0.99)
    assume(abs(y - 0.1 * d - ex) > 1e-9)
    z = splitting(x, d, math.inf) - ex
    assert abs(z) == pytest.approx(1.0, abs=1e-12)
    if abs(y) == 1.0:  # from a level, a step shorter than hi keeps the sign
        assert z * y > 0


@pytest.mark.parametrize("count", GRIDS)
@given(code=st.integers(0, 15), kappa=st.one_of(st.floats(0.0, 1e6), st.just(math.inf)))
def test_a_level_is_a_fixed_point_of_the_splitting(count: int, code: int, kappa: float) -> None:
    level = 2 * (code % count) / (count - 1) - 1
    assert splitting(level, 0.0, kappa, count) == pytest.approx(level, abs=1e-12)


@given(x=st.floats(-0.999, 0.999), kappa=st.floats(0.0, 100.0), count=st.sampled_from(GRIDS))
def test_zero_gradient_shrinks_the_distance_by_one_plus_kappa(x: float, kappa: float, count: int) -> None:
    q = float(levels.project(double(x), one, count))
    assert splitting(x, 0.0, kappa, count) - q == pytest.approx((x - q) / (1 + kappa), abs=1e-12)


def test_a_is_the_best_binary_approximation() -> None:
    u = torch.randn(10, dtype=torch.float64)
    a = levels.mean_magnitude(u)
    ours = (u - a * levels.sign(u)).norm()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=torch.float64)
    best_a = (signs @ u / 10).clamp(min=0)
    best = (u - best_a[:, None] * signs).norm(dim=1).min()
    assert float(ours) == pytest.approx(float(best), rel=1e-12)


@given(u=st.floats(-2.0, 2.0), kappa=st.one_of(st.floats(0.0, 1e3), st.just(math.inf)))
def test_the_relaxed_weight_has_the_projection_of_its_latent(u: float, kappa: float) -> None:
    p = stam.alternating_weight(double(u), one * 0.5, 2, kappa=kappa)
    assert torch.equal(levels.project(p, one * 0.5, 2), levels.project(double(u), one * 0.5, 2))


@given(u=st.floats(-2.0, 2.0), d=directions)
def test_alternating_with_nothing_on_is_sgd(u: float, d: float) -> None:
    after = stam.alternating_step(double(u), double(d), one, 2, lr=0.1, weight_decay=0.0, lam=0.0, limit=None)
    assert float(after) == pytest.approx(u - 0.1 * d, abs=1e-15)
    assert torch.equal(stam.alternating_weight(after, one, 2, kappa=0.0), after)


def test_lam_pulls_the_latent_towards_its_level() -> None:
    u = double(0.3, -0.3)
    after = stam.alternating_step(
        u, torch.zeros_like(u), one, 2, lr=0.1, weight_decay=0.0, lam=0.5, limit=None
    )
    torch.testing.assert_close(after, u + 0.1 * 0.5 * (double(1, -1) - u))


# ---- baselines ---------------------------------------------------------------------------------------------------


@given(p=st.floats(-2.0, 2.0), threshold=st.floats(0.0, 2.0), count=st.sampled_from(GRIDS))
def test_prox_moves_by_the_threshold_and_no_further_than_the_level(
    p: float, threshold: float, count: int
) -> None:
    q = float(levels.project(double(p), one, count))
    after = float(baselines.prox(double(p), one, count, threshold=threshold))
    assert abs(after - p) == pytest.approx(min(threshold, abs(p - q)), abs=1e-12)
    assert abs(after - q) <= abs(p - q) + 1e-12


def test_stochastic_signs_have_the_right_mean() -> None:
    u = torch.tensor([-2.0, -0.5, 0.0, 0.4, 1.0]).repeat(20000, 1)
    mean = baselines.stochastic_sign(u).mean(dim=0)
    torch.testing.assert_close(mean, torch.tensor([-1.0, -0.5, 0.0, 0.4, 1.0]), atol=0.03, rtol=0)
