"""The update rules in Triton: the equations of docs/algorithms.md in the order of operations of csrc/core.

Divisions and square roots are correctly rounded and nothing is contracted into fused multiply-adds, so the results are
bit for bit those of the compiled kernels.

A new rule adds its function and its line in :func:`step`; one that changes the gradient or follows its weights with the
scale also a line in :func:`gradient` or :func:`point`. RULE is a name of quantopt.rules.RULES.
"""

import functools
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantopt.kernels.elements import read
from quantopt.reference.levels import GAUSSIAN_STEP
from quantopt.rules import HYPER

# ---- numbers -----------------------------------------------------------------------------------------------------

# The hyper-parameters in float64, and what the rules use, in float32: the same and what is derived from them. Names
# with an index in the tensors; a kernel holds the values.
Hyper = namedtuple("Hyper", HYPER)
Numbers = namedtuple(
    "Numbers",
    (
        *HYPER,
        "one_minus_beta1",
        "one_minus_beta2",
        "decay",  # weight_decay where it is part of the gradient or velocity, else 0
        "shrink",  # factor of the weights before the step; 1 where `decay` acts
        "keep",  # 1 / (1 + kappa): what is left of the distance to the level
        "t_star",  # sqrt(1 - sqrt(epsilon)): feasible from this |t| on
        "t_end",  # 1 + sqrt(epsilon): as printed, not feasible beyond this |t|
    ),
)
HYPER_COUNT = tl.constexpr(len(Hyper._fields))
COUNT = tl.constexpr(len(Numbers._fields))


@triton.jit
def load_tuple(ptr, LENGTH: tl.constexpr):
    values = ()
    for k in tl.static_range(LENGTH):
        values = values + (tl.load(ptr + k),)
    return values


@triton.jit
def load_numbers(ptr):
    return Numbers(*load_tuple(ptr, COUNT))


@triton.jit
def derive_numbers_kernel(
    numbers_ptr, hyper_ptr,
    lr: tl.float64, momentum: tl.float64, beta2: tl.float64, adam_eps: tl.float64, weight_decay: tl.float64,
    epsilon: tl.float64, rate: tl.float64, cap: tl.float64, bound: tl.float64, kappa: tl.float64, lam: tl.float64,
    threshold: tl.float64,
    RULE: tl.constexpr, DECAY_BEFORE_STEP: tl.constexpr,
):  # fmt: skip
    """The Numbers of the Hyper at hyper_ptr; where that is None, of the arguments, which need no copy to the device."""
    if hyper_ptr is None:
        h = Hyper(
            lr=lr, momentum=momentum, beta2=beta2, adam_eps=adam_eps, weight_decay=weight_decay, epsilon=epsilon,
            rate=rate, cap=cap, bound=bound, kappa=kappa, lam=lam, threshold=threshold,
        )  # fmt: skip
    else:
        h = Hyper(*load_tuple(hyper_ptr, HYPER_COUNT))
    decay = h.weight_decay
    shrink = 1.0
    if DECAY_BEFORE_STEP:
        decay = 0.0
        if RULE == "splitting":
            shrink = 1.0 / (1.0 + h.lr * h.weight_decay)
        else:
            shrink = 1.0 - h.lr * h.weight_decay
    numbers = Numbers(
        *h,
        one_minus_beta1=1.0 - h.momentum,
        one_minus_beta2=1.0 - h.beta2,
        decay=decay,
        shrink=shrink,
        keep=1.0 / (1.0 + h.kappa),
        t_star=tl.sqrt(1.0 - tl.sqrt(h.epsilon)),
        t_end=1.0 + tl.sqrt(h.epsilon),
    )
    for k in tl.static_range(COUNT):
        tl.store(numbers_ptr + k, numbers[k])


# ---- scalars and levels: csrc/core/scalar.h and levels.h ---------------------------------------------------------


@triton.jit
def minimum(x, bound):
    return tl.where(x > bound, bound, x)  # a NaN stays NaN


@triton.jit
def maximum(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def with_sign_of(magnitude, x):
    return tl.where(x >= 0.0, magnitude, tl.where(x < 0.0, -magnitude, x))


@triton.jit
def turned_by(s, x):
    """x, or -x where the sign bit of s is set."""
    return tl.where(s.to(tl.int32, bitcast=True) < 0, -x, x)


LEVELS = (2, *GAUSSIAN_STEP)


@functools.cache
def level_factor(levels: int) -> float:
    """hi / scale, multiplied in single precision as csrc/core does."""
    return 1.0 if levels == 2 else float(torch.tensor((levels - 1) / 2) * torch.tensor(GAUSSIAN_STEP[levels]))


class Grid(NamedTuple):
    """Levels of elements that share a scale, or of each element."""

    hi: Any  # outer level
    half_step: Any  # half the distance of two levels
    last: Any  # K - 2, the index of the last cell
    binary: Any  # constexpr: K = 2


@triton.jit
def make_grid(scale, level_factor, intervals, BINARY: tl.constexpr):
    """hi = level_factor scale; intervals = K - 1."""
    hi = scale * level_factor
    return Grid(hi, tl.div_rn(hi, intervals), intervals - 1.0, BINARY)


@triton.jit
def cell_middle(w, grid):
    if grid.binary:
        middle = tl.where(w == w, 0.0, 0.0)
    else:
        j = tl.floor(tl.div_rn(w + grid.hi, 2.0 * grid.half_step))
        middle = (2.0 * maximum(minimum(j, grid.last), 0.0) - grid.last) * grid.half_step
    return middle


@triton.jit
def project(w, grid):
    """The nearest level."""
    if grid.binary:
        level = with_sign_of(grid.hi, w)
    else:
        mid = cell_middle(w, grid)
        offset = w - mid
        away = tl.where(mid < 0.0, offset - 1.0, offset + 1.0)
        level = mid + with_sign_of(grid.half_step, tl.where(offset == 0.0, away, offset))
    return level


# ---- base directions: csrc/core/base.h ---------------------------------------------------------------------------


@triton.jit
def sgd_direction(g, m, h, NESTEROV: tl.constexpr):
    """(d, m)"""
    m = h.momentum * m + g
    d = m
    if NESTEROV:
        d = g + h.momentum * m
    return d, m


@triton.jit
def adam_direction(g, m, v, root_factor, root_offset, h):
    """(d, m, v)"""
    m = h.momentum * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    d = tl.div_rn(m, root_factor * tl.sqrt_rn(v) + root_offset)
    return d, m, v


@triton.jit
def direction(
    g, m, v, corrections_ptr, tensor_index, h, BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr
):  # fmt: skip
    """(d, m, v). At corrections_ptr: c1 / sqrt(c2) and c1 eps of each tensor."""
    d = g
    if BASE == "adam":
        root_factor = tl.load(corrections_ptr + 2 * tensor_index)
        root_offset = tl.load(corrections_ptr + 2 * tensor_index + 1)
        d, m, v = adam_direction(g, m, v, root_factor, root_offset, h)
    elif HAS_MOMENTUM:
        d, m = sgd_direction(g, m, h, NESTEROV)
    return d, m, v


# ---- the rules ---------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """A block of elements of one tensor, as a rule sees it."""

    w: Any  # the latent, the master weights, or the parameter itself
    grid: Any  # levels after the step
    before: Any  # levels before it: other ones where the scale is dynamic
    latent_limit: Any  # largest |latent| of the alternating rule; infinite: none
    h: Any  # Numbers
    param_ptr: Any  # what follows is for network_weight
    i: Any
    inside: Any
    whole: Any


@triton.jit
def network_weight(x):
    """What the network ran with. It is read here, as few rules need it."""
    return read(x.param_ptr, x.i, x.inside, x.whole)


@triton.jit
def decayed_gradient(x, g):
    return g + x.h.decay * x.w


@triton.jit
def base_step(x, d):
    return x.w * x.h.shrink - x.h.lr * d


@triton.jit
def restoring_step(distance, x):
    """half min(k, cap) for an infeasible weight; infinite k at t = 0 becomes the cap."""
    half = x.grid.half_step
    u = (half - distance) * (half + distance) * tl.div_rn(1.0, half * half)
    gain = 0.25 * x.h.rate * half * half
    k = tl.div_rn(gain * (u * u - x.h.epsilon), distance * u + 1e-30)
    return minimum(k, x.h.cap * half)


@triton.jit
def at_least(v, offset, least, x):
    """v turned outward and no less than ``least`` where the weight is infeasible and has a side, t != 0."""
    nearest = x.h.t_star * x.grid.half_step  # feasible from this distance on
    distance = tl.abs(offset)
    bound = tl.where((distance > 0.0) & (distance < nearest), least, float("-inf"))
    return tl.where(nearest == 0.0, v, turned_by(offset, maximum(turned_by(offset, v), bound)))


@triton.jit
def returning_step(distance, x):
    """half min(r (delta^2 - e) / (2 delta), cap) of a weight beyond t_end half."""
    half = x.grid.half_step
    beyond = distance - half  # half delta
    end = x.h.epsilon * half * half
    return minimum(tl.div_rn(0.5 * x.h.rate * (beyond * beyond - end), beyond), x.h.cap * half)


@triton.jit
def as_printed(v, offset, least, most, x):
    """What the printed form adds to :func:`at_least`: v inward and no less than ``least`` beyond the feasible set, and
    ``most`` in the middle of a cell."""
    distance = tl.abs(offset)
    bound = tl.where(distance > x.h.t_end * x.grid.half_step, least, float("-inf"))
    v = -turned_by(offset, maximum(-turned_by(offset, v), bound))
    middle = (distance == 0.0) & (x.h.t_star * x.grid.half_step > 0.0)
    return tl.where(middle, maximum(minimum(v, most), most), v)  # NaN for NaN


@triton.jit
def velocity_step(x, d):
    """AskewSGD, constrain = "velocity"."""
    w = x.w * x.h.shrink
    v = -x.h.lr * (d + x.h.decay * w)
    offset = w - cell_middle(w, x.grid)
    v = at_least(v, offset, restoring_step(tl.abs(offset), x), x)
    if x.h.bound > 3.4028234663852886e38:
        w = w + as_printed(v, offset, returning_step(tl.abs(offset), x), x.h.cap * x.grid.half_step, x)
    else:
        w = clamp(w + v, x.grid.hi)
    return w


@triton.jit
def constrained_gradient(x, g):
    """AskewSGD, constrain = "gradient"; at lr = 0 there is no constraint."""
    lr = tl.where(x.h.lr != 0.0, x.h.lr, 1.0)
    w = x.w * x.h.shrink
    offset = w - cell_middle(w, x.grid)
    v = at_least(-g, offset, tl.div_rn(restoring_step(tl.abs(offset), x), lr), x)
    if x.h.bound > 3.4028234663852886e38:
        least = tl.div_rn(returning_step(tl.abs(offset), x), lr)
        v = as_printed(v, offset, least, tl.div_rn(x.h.cap * x.grid.half_step, lr), x)
    return tl.where(x.h.lr != 0.0, -v, g)


@triton.jit
def gradient_step(x, d):
    w = x.w * x.h.shrink
    w = w - x.h.lr * (d + x.h.decay * w)
    if x.h.bound <= 3.4028234663852886e38:
        w = clamp(w, x.grid.hi)
    return w


@triton.jit
def latent_step(x, d):
    """AskewSGD, memory = True."""
    limit = x.h.bound * x.grid.hi
    return maximum(minimum(x.w * x.h.shrink - x.h.lr * d, limit), -limit)


@triton.jit
def feasible_projection(x, latent):
    half = x.grid.half_step
    nearest = x.h.t_star * half
    middle = cell_middle(latent, x.grid)
    offset = latent - middle
    distance = maximum(minimum(tl.abs(offset), half), nearest)
    if x.h.rate <= 3.4028234663852886e38:  # limited speed
        p = network_weight(x)
        reached = tl.abs(p - cell_middle(p, x.grid))
        farthest = reached + restoring_step(reached, x)
        distance = tl.where(reached < nearest, minimum(distance, farthest), distance)
    return middle + tl.where(offset >= 0.0, 1.0, -1.0) * distance


@triton.jit
def relax(x, point, level):
    kappa = x.h.kappa
    relaxed = tl.where(kappa > 3.4e38, level, level + (point - level) * x.h.keep)
    return tl.where(kappa == 0.0, point, relaxed)


@triton.jit
def clamp(w, hi):
    return maximum(minimum(w, hi), -hi)


@triton.jit
def box(x, latent, hi):
    return clamp(latent * x.h.shrink, hi)


@triton.jit
def differentiated_at(x):
    """The y of the splitting: what the network ran with, where weight decay made it with the lr of the step before."""
    y = box(x, x.w, x.before.hi)
    if x.param_ptr.dtype.element_ty == tl.float32:  # the rounding of others would add up in x - y
        if x.h.weight_decay != 0.0:
            y = clamp(network_weight(x), x.before.hi)
    return y


@triton.jit
def splitting_point(x, d):
    """STAM, form = "splitting": r."""
    y = differentiated_at(x)
    return y - x.h.lr * d - (x.w - y)


@triton.jit
def splitting_step(x, d):
    y = differentiated_at(x)
    ex = x.w - y
    r = y - x.h.lr * d - ex
    return relax(x, r, project(r, x.grid)) + ex


@triton.jit
def alternating_step(x, d):
    """STAM, form = "alternating": the new u."""
    u = x.w * x.h.shrink - x.h.lr * d
    pulled = u + x.h.lr * x.h.lam * (project(x.w, x.before) - x.w)
    u = tl.where(x.h.lam != 0.0, pulled, u)
    return maximum(minimum(u, x.latent_limit), -x.latent_limit)


@triton.jit
def prox_step(x, d):
    """ProxQuant."""
    p = base_step(x, d)
    q = project(p, x.grid)
    gap = p - q
    relaxed = q + with_sign_of(maximum(tl.abs(gap) - x.h.threshold, 0.0), gap)
    return tl.where(x.h.threshold > 3.4e38, q, relaxed)  # also of an infinite p


# ---- dispatch ----------------------------------------------------------------------------------------------------


@triton.jit
def gradient(x, g, RULE: tl.constexpr):
    """What the rule makes of the gradient before the base direction."""
    if RULE == "none" or RULE == "prox":
        g = decayed_gradient(x, g)
    elif RULE == "askew_gradient":
        g = constrained_gradient(x, g)
    return g


@triton.jit
def point(x, d, RULE: tl.constexpr):
    """What a dynamic scale is the mean magnitude of; x.grid is not known yet."""
    if RULE == "splitting":
        r = splitting_point(x, d)
    else:
        tl.static_assert(RULE == "alternating", "this rule has no dynamic scale")
        r = alternating_step(x, d)
    return r


@triton.jit
def step(x, d, RULE: tl.constexpr):
    """(the latent, the weight); the same where the rule has no latent."""
    if RULE == "none":
        latent = base_step(x, d)
        weight = latent
    elif RULE == "askew":
        latent = velocity_step(x, d)
        weight = latent
    elif RULE == "askew_gradient":
        latent = gradient_step(x, d)
        weight = latent
    elif RULE == "askew_memory":
        latent = latent_step(x, d)
        weight = feasible_projection(x, latent)
    elif RULE == "splitting":
        latent = splitting_step(x, d)
        weight = box(x, latent, x.grid.hi)
    elif RULE == "alternating":
        latent = alternating_step(x, d)
        weight = relax(x, latent, project(latent, x.grid))
    else:
        tl.static_assert(RULE == "prox", "unknown rule")
        latent = prox_step(x, d)
        weight = latent
    return latent, weight
