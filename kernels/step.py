"""The fused optimizer step in Triton, for GPUs without the compiled CUDA kernels.

The equations are those of docs/algorithms.md in the order of operations of csrc/core, with exact divisions and square
roots and nothing contracted into fused multiply-add: the results are those of the compiled kernels bit for bit, but
for the sums behind moving levels.

A list of tensors takes few launches: a table of their pointers lies on the device, and a program finds its tensor and
its chunk there. The table is made once for the same pointers.
"""

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements at a time
CHUNK = 4096  # elements per program
ROW_BLOCK = 4096  # moving levels: rows up to this length are reduced and stepped while they are in registers
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
GAUSSIAN_STEP = {2: 2.0, 3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352}  # as in csrc/core/levels.h
STAM = ("splitting", "alternating")

# The columns of the table: addresses, then numbers.
COLUMNS = (
    "param", "grad", "momentum", "second", "latent", "scale", "before", "sigma", "partial",
    "numel", "row", "group", "scales_per_row", "sigma_row", "index", "first_program",
)  # fmt: skip
WIDTH = tl.constexpr(len(COLUMNS))
PARAM, GRAD, MOMENTUM, SECOND, LATENT, SCALE, BEFORE, SIGMA, PARTIAL = map(tl.constexpr, range(9))
NUMEL, ROW, GROUP, SCALES_PER_ROW, SIGMA_ROW, INDEX, FIRST_PROGRAM = map(tl.constexpr, range(9, 16))


# Of tl only what is no @triton.jit function itself: tests load this file a second time in the interpreter.

# ---- csrc/core, with the same names ------------------------------------------------------------------------------


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


@triton.jit
def cell_middle(w, hi, half, last, BINARY: tl.constexpr):
    if BINARY:
        middle = tl.where(w == w, 0.0, 0.0)
    else:
        j = maximum(minimum(tl.floor(tl.div_rn(w + hi, 2.0 * half)), last), 0.0)
        middle = (2.0 * j - last) * half
    return middle


@triton.jit
def project(w, hi, half, last, BINARY: tl.constexpr):
    """The nearest level."""
    if BINARY:
        level = with_sign_of(hi, w)
    else:
        mid = cell_middle(w, hi, half, last, BINARY)
        offset = w - mid
        away = tl.where(mid < 0.0, offset - 1.0, offset + 1.0)
        level = mid + with_sign_of(half, tl.where(offset == 0.0, away, offset))
    return level


@triton.jit
def restoring_step(distance, half, one, epsilon, rate, cap):
    """half min(k, cap) for an infeasible weight; infinite k at t = 0 becomes the cap."""
    u = (half - distance) * (half + distance) * tl.div_rn(one, half * half)
    gain = 0.25 * rate * half * half
    k = tl.div_rn(gain * (u * u - epsilon), distance * u + 1e-30)
    return minimum(k, cap * half)


@triton.jit
def at_least(x, offset, least, nearest):
    """x turned outward and no less than ``least`` where the weight is infeasible and has a side, t != 0."""
    distance = tl.abs(offset)
    bound = tl.where((distance > 0.0) & (distance < nearest), least, float("-inf"))
    return tl.where(nearest == 0.0, x, turned_by(offset, maximum(turned_by(offset, x), bound)))


@triton.jit
def relax(x, level, kappa, keep):
    relaxed = tl.where(kappa > 3.4e38, level, level + (x - level) * keep)
    return tl.where(kappa == 0.0, x, relaxed)


# ---- the numbers of a step, as float32 in one place on the device ------------------------------------------------

NUMBERS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "adam_eps", "decay", "shrink",
    "epsilon", "keep", "t_star", "rate", "cap", "bound", "kappa", "lam", "threshold",
)  # fmt: skip


def decay_before_step(rule: str, decoupled: bool) -> bool:
    """Weight decay of a latent is the same number in both forms; it acts before the step there."""
    return decoupled or rule == "askew_memory" or rule in STAM


def numbers(rule: str, hyper: Tensor, decoupled: bool) -> list[float]:
    """The NUMBERS from the op's ``hyper`` (csrc/core/hyper.h), computed in double precision."""
    lr, beta1, beta2, eps, weight_decay, epsilon, rate, cap, bound, kappa, lam, threshold = hyper.tolist()
    before = decay_before_step(rule, decoupled)
    shrink = 1 / (1 + lr * weight_decay) if rule == "splitting" else 1 - lr * weight_decay
    root_epsilon = math.sqrt(epsilon)
    t_star = math.sqrt(1 - root_epsilon) if root_epsilon <= 1 else math.nan
    return [
        lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, 0.0 if before else weight_decay, shrink if before else 1.0,
        epsilon, 1 / (1 + kappa), t_star, rate, cap, bound, kappa, lam, threshold,
    ]  # fmt: skip


@triton.jit
def write_numbers_kernel(
    out_ptr, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, decay, shrink,
    epsilon, keep, t_star, rate, cap, bound, kappa, lam, threshold,
):  # fmt: skip
    tl.store(out_ptr, lr)
    tl.store(out_ptr + 1, beta1)
    tl.store(out_ptr + 2, one_minus_beta1)
    tl.store(out_ptr + 3, beta2)
    tl.store(out_ptr + 4, one_minus_beta2)
    tl.store(out_ptr + 5, adam_eps)
    tl.store(out_ptr + 6, decay)
    tl.store(out_ptr + 7, shrink)
    tl.store(out_ptr + 8, epsilon)
    tl.store(out_ptr + 9, keep)
    tl.store(out_ptr + 10, t_star)
    tl.store(out_ptr + 11, rate)
    tl.store(out_ptr + 12, cap)
    tl.store(out_ptr + 13, bound)
    tl.store(out_ptr + 14, kappa)
    tl.store(out_ptr + 15, lam)
    tl.store(out_ptr + 16, threshold)


@triton.jit
def derive_numbers_kernel(out_ptr, hyper_ptr, SPLITTING: tl.constexpr, DECAY_BEFORE_STEP: tl.constexpr):
    """What `numbers` computes, from the same twelve numbers on the device."""
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    weight_decay = tl.load(hyper_ptr + 4)
    epsilon = tl.load(hyper_ptr + 5)
    tl.store(out_ptr, lr.to(tl.float32))
    tl.store(out_ptr + 1, beta1.to(tl.float32))
    tl.store(out_ptr + 2, (1.0 - beta1).to(tl.float32))
    tl.store(out_ptr + 3, beta2.to(tl.float32))
    tl.store(out_ptr + 4, (1.0 - beta2).to(tl.float32))
    tl.store(out_ptr + 5, tl.load(hyper_ptr + 3).to(tl.float32))
    if DECAY_BEFORE_STEP:
        tl.store(out_ptr + 6, 0.0)
        if SPLITTING:
            tl.store(out_ptr + 7, (1.0 / (1.0 + lr * weight_decay)).to(tl.float32))
        else:
            tl.store(out_ptr + 7, (1.0 - lr * weight_decay).to(tl.float32))
    else:
        tl.store(out_ptr + 6, weight_decay.to(tl.float32))
        tl.store(out_ptr + 7, 1.0)
    tl.store(out_ptr + 8, epsilon.to(tl.float32))
    tl.store(out_ptr + 9, (1.0 / (1.0 + tl.load(hyper_ptr + 9))).to(tl.float32))
    tl.store(out_ptr + 10, tl.sqrt(1.0 - tl.sqrt(epsilon)).to(tl.float32))
    for k in tl.static_range(6):
        tl.store(out_ptr + 11 + k, tl.load(hyper_ptr + 6 + k).to(tl.float32))


# ---- memory ------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def read(ptr, i, inside, WHOLE: tl.constexpr):
    """As float32. Without a mask a whole block is read 16 bytes at a time."""
    if WHOLE:
        x = tl.load(ptr + i)
    else:
        x = tl.load(ptr + i, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def write(ptr, i, x, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + i, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + i, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 on uint32 counters with a 64-bit key."""
    seed = seed.to(tl.uint64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def stochastic_bfloat16(x, first, step, index, seed, BLOCK: tl.constexpr):
    """csrc/core/rounding.h with the random halves of csrc/core/philox.h; `first` is a multiple of 8."""
    blocks = first // 8 + tl.arange(0, BLOCK // 8)
    low = blocks.to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, low, high, step + 0 * low, index + 0 * low)
    # the words in order 0..3 along the last dimension, then their halves
    words = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (0, 2, 1))
    random = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    special = tl.where(size > 0x7F800000, 0x7FC00000, tl.where(size == 0x7F800000, size, 0x7F7F0000))
    rounded = tl.where(size < 0x7F7F0000, bits + random, bits & 0x80000000 | special)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def find(table_ptr, count, program):
    """The row of the table whose programs this one belongs to: the last that begins not after it."""
    at = 0
    end = count
    while end - at > 1:
        middle = (at + end) // 2
        if tl.load(table_ptr + middle * WIDTH + FIRST_PROGRAM) <= program:
            at = middle
        else:
            end = middle
    return table_ptr + at * WIDTH


# ---- the base direction and the rules ----------------------------------------------------------------------------


@triton.jit
def base_direction(
    g, m, v, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, correction1, correction2,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """(d, m, v)"""
    d = g
    if ADAM:
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g * g
        d = tl.div_rn(tl.div_rn(m, correction1), tl.sqrt_rn(tl.div_rn(v, correction2)) + adam_eps)
    elif HAS_MOMENTUM:
        m = beta1 * m + g
        d = m
        if NESTEROV:
            d = g + beta1 * m
    return d, m, v


@triton.jit
def stam_point(x, d, hi, half, last, limit, lr, shrink, lam, RULE: tl.constexpr, BINARY: tl.constexpr):
    """What the moving level is the mean magnitude of: r (splitting) or the new u (alternating)."""
    if RULE == "splitting":
        y = maximum(minimum(x * shrink, hi), -hi)
        point = y - lr * d - (x - y)
    else:
        point = x * shrink - lr * d
        pulled = point + lr * lam * (project(x, hi, half, last, BINARY) - x)
        point = tl.where(lam != 0.0, pulled, point)
        point = maximum(minimum(point, limit), -limit)
    return point


@triton.jit
def stam_step(
    x, d, hi_before, half_before, hi, half, last, limit, lr, shrink, kappa, keep, lam,
    RULE: tl.constexpr, BINARY: tl.constexpr,
):  # fmt: skip
    """(the new latent, the weight)"""
    point = stam_point(x, d, hi_before, half_before, last, limit, lr, shrink, lam, RULE, BINARY)
    if RULE == "splitting":
        y = maximum(minimum(x * shrink, hi_before), -hi_before)
        latent = relax(point, project(point, hi, half, last, BINARY), kappa, keep) + (x - y)
        weight = maximum(minimum(latent * shrink, hi), -hi)
    else:
        latent = point
        weight = relax(latent, project(latent, hi, half, last, BINARY), kappa, keep)
    return latent, weight


@triton.jit
def step_block(
    row_ptr, first, factor, steps_ptr, corrections_ptr, seed, level_factor, intervals,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, decay, shrink,
    epsilon, keep, t_star, rate, cap, bound, kappa, lam, threshold,
    RULE: tl.constexpr, BINARY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ADAM: tl.constexpr, HAS_LATENT: tl.constexpr, HAS_SIGMA: tl.constexpr, STOCHASTIC: tl.constexpr,
    PARAM_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, ONE_SCALE: tl.constexpr, SMALL: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements [first, first + BLOCK) of one tensor. HAS_LATENT: of the rule, or master weights."""
    i = first + tl.arange(0, BLOCK)
    inside = i < tl.load(row_ptr + NUMEL)
    param_ptr = pointer(row_ptr, PARAM, PARAM_TYPE, ALIGNED)
    latent_ptr = pointer(row_ptr, LATENT, tl.float32, ALIGNED)
    g = read(pointer(row_ptr, GRAD, PARAM_TYPE, ALIGNED), i, inside, WHOLE) * factor
    if HAS_LATENT:
        w = read(latent_ptr, i, inside, WHOLE)
    else:
        w = read(param_ptr, i, inside, WHOLE)
    m = g
    v = g
    momentum_ptr = pointer(row_ptr, MOMENTUM, MOMENTUM_TYPE, ALIGNED)
    second_ptr = pointer(row_ptr, SECOND, tl.float32, ALIGNED)
    if HAS_MOMENTUM:
        m = read(momentum_ptr, i, inside, WHOLE)
    correction1 = 1.0
    correction2 = 1.0
    index = tl.load(row_ptr + INDEX)
    if ADAM:
        v = read(second_ptr, i, inside, WHOLE)
        correction1 = tl.load(corrections_ptr + 2 * index)
        correction2 = tl.load(corrections_ptr + 2 * index + 1)

    # The grid: hi = level_factor sigma, half = hi / (K - 1).
    last = intervals - 1.0
    if RULE != "base":
        scale_ptr = pointer(row_ptr, SCALE, tl.float32, False)
        before_ptr = pointer(row_ptr, BEFORE, tl.float32, False)
        if ONE_SCALE:
            at = 0
        else:
            row = tl.load(row_ptr + ROW)
            group = tl.load(row_ptr + GROUP)
            if SMALL:  # 64-bit division takes several times as long
                element = i.to(tl.int32)
                channel = element // row.to(tl.int32)
                part = (element - channel * row.to(tl.int32)) // group.to(tl.int32)
            else:
                channel = i // row
                part = (i - channel * row) // group
            at = channel.to(tl.int64) * tl.load(row_ptr + SCALES_PER_ROW) + part
        if ONE_SCALE or WHOLE:
            hi = tl.load(scale_ptr + at) * level_factor
        else:
            hi = tl.load(scale_ptr + at, mask=inside, other=1.0) * level_factor
        half = tl.div_rn(hi, intervals)
        one = 0.0 * half + 1.0
        nearest = t_star * half  # a weight is feasible from this distance on

    if RULE == "base" or RULE == "prox":
        g = g + decay * w
    elif RULE == "askew_gradient":
        w = w * shrink
        offset = w - cell_middle(w, hi, half, last, BINARY)
        safe_lr = tl.where(lr != 0.0, lr, 1.0)
        least = tl.div_rn(restoring_step(tl.abs(offset), half, one, epsilon, rate, cap), safe_lr)
        g = tl.where(lr != 0.0, -at_least(-g, offset, least, nearest), g)

    d, m, v = base_direction(
        g, m, v, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, correction1, correction2,
        HAS_MOMENTUM, NESTEROV, ADAM,
    )  # fmt: skip
    if HAS_MOMENTUM:
        write(momentum_ptr, i, m, inside, WHOLE)
    if ADAM:
        write(second_ptr, i, v, inside, WHOLE)

    if RULE == "base":
        latent = w * shrink - lr * d
        weight = latent
    elif RULE == "askew":
        w = w * shrink
        velocity = -lr * (d + decay * w)
        offset = w - cell_middle(w, hi, half, last, BINARY)
        least = restoring_step(tl.abs(offset), half, one, epsilon, rate, cap)
        latent = maximum(minimum(w + at_least(velocity, offset, least, nearest), hi), -hi)
        weight = latent
    elif RULE == "askew_gradient":
        latent = maximum(minimum(w - lr * (d + decay * w), hi), -hi)
        weight = latent
    elif RULE == "askew_memory":
        limit = bound * hi
        latent = maximum(minimum(w * shrink - lr * d, limit), -limit)
        middle = cell_middle(latent, hi, half, last, BINARY)
        offset = latent - middle
        distance = maximum(minimum(tl.abs(offset), half), nearest)
        if rate <= 3.4028234663852886e38:
            before = read(param_ptr, i, inside, WHOLE)
            reached = tl.abs(before - cell_middle(before, hi, half, last, BINARY))
            farthest = reached + restoring_step(reached, half, one, epsilon, rate, cap)
            distance = tl.where(reached < nearest, minimum(distance, farthest), distance)
        weight = middle + tl.where(offset >= 0.0, 1.0, -1.0) * distance
    elif RULE == "prox":
        p = w * shrink - lr * d
        q = project(p, hi, half, last, BINARY)
        gap = p - q
        relaxed = q + with_sign_of(maximum(tl.abs(gap) - threshold, 0.0), gap)
        latent = tl.where(threshold > 3.4e38, q, relaxed)  # also of an infinite p
        weight = latent
    else:
        limit = float("inf")
        if HAS_SIGMA:
            sigma_ptr = pointer(row_ptr, SIGMA, tl.float32, False)
            limit = bound * tl.load(sigma_ptr + i // tl.load(row_ptr + SIGMA_ROW), mask=inside, other=1.0)
        if ONE_SCALE or WHOLE:
            hi_before = tl.load(before_ptr + at) * level_factor
        else:
            hi_before = tl.load(before_ptr + at, mask=inside, other=1.0) * level_factor
        half_before = tl.div_rn(hi_before, intervals)
        latent, weight = stam_step(
            w, d, hi_before, half_before, hi, half, last, limit, lr, shrink, kappa, keep, lam, RULE, BINARY
        )

    if HAS_LATENT:
        write(latent_ptr, i, latent, inside, WHOLE)
    if STOCHASTIC:
        step = tl.load(steps_ptr + index).to(tl.int64).to(tl.uint32)
        weight = stochastic_bfloat16(weight, first, step, index.to(tl.uint32), seed, BLOCK)
    write(param_ptr, i, weight, inside, WHOLE)


@triton.jit(do_not_specialize=["count", "seed"])
def step_kernel(
    table_ptr, numbers_ptr, steps_ptr, corrections_ptr, grad_scale_ptr, found_inf_ptr,
    count, gradient_factor, level_factor, intervals, seed,
    RULE: tl.constexpr, BINARY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ADAM: tl.constexpr, HAS_LATENT: tl.constexpr, HAS_SIGMA: tl.constexpr, STOCHASTIC: tl.constexpr,
    PARAM_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, ONE_SCALE: tl.constexpr, SMALL: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per chunk, with the levels as they are."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    program = tl.program_id(0)
    row_ptr = find(table_ptr, count, program)
    factor = gradient_factor
    if grad_scale_ptr is not None:
        factor = tl.div_rn(gradient_factor, tl.load(grad_scale_ptr))
    numel = tl.load(row_ptr + NUMEL)
    begin = (program - tl.load(row_ptr + FIRST_PROGRAM)) * CHUNK
    begin = tl.multiple_of(begin, CHUNK)
    lr = tl.load(numbers_ptr)
    beta1 = tl.load(numbers_ptr + 1)
    one_minus_beta1 = tl.load(numbers_ptr + 2)
    beta2 = tl.load(numbers_ptr + 3)
    one_minus_beta2 = tl.load(numbers_ptr + 4)
    adam_eps = tl.load(numbers_ptr + 5)
    decay = tl.load(numbers_ptr + 6)
    shrink = tl.load(numbers_ptr + 7)
    epsilon = tl.load(numbers_ptr + 8)
    keep = tl.load(numbers_ptr + 9)
    t_star = tl.load(numbers_ptr + 10)
    rate = tl.load(numbers_ptr + 11)
    cap = tl.load(numbers_ptr + 12)
    bound = tl.load(numbers_ptr + 13)
    kappa = tl.load(numbers_ptr + 14)
    lam = tl.load(numbers_ptr + 15)
    threshold = tl.load(numbers_ptr + 16)
    for block in range(CHUNK // BLOCK):
        first = begin + block * BLOCK
        if first + BLOCK <= numel:
            step_block(
                row_ptr, first, factor, steps_ptr, corrections_ptr, seed, level_factor, intervals,
                lr, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, decay, shrink,
                epsilon, keep, t_star, rate, cap, bound, kappa, lam, threshold,
                RULE, BINARY, HAS_MOMENTUM, NESTEROV, ADAM, HAS_LATENT, HAS_SIGMA, STOCHASTIC,
                PARAM_TYPE, MOMENTUM_TYPE, ONE_SCALE, SMALL, ALIGNED, True, BLOCK,
            )  # fmt: skip
        elif first < numel:
            step_block(
                row_ptr, first, factor, steps_ptr, corrections_ptr, seed, level_factor, intervals,
                lr, beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps, decay, shrink,
                epsilon, keep, t_star, rate, cap, bound, kappa, lam, threshold,
                RULE, BINARY, HAS_MOMENTUM, NESTEROV, ADAM, HAS_LATENT, HAS_SIGMA, STOCHASTIC,
                PARAM_TYPE, MOMENTUM_TYPE, ONE_SCALE, SMALL, ALIGNED, False, BLOCK,
            )  # fmt: skip


# ---- moving levels -----------------------------------------------------------------------------------------------


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def stam_read(
    row_ptr, i, inside, factor, beta1,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(latent, direction, momentum)"""
    g = read(pointer(row_ptr, GRAD, PARAM_TYPE, ALIGNED), i, inside, False) * factor
    x = read(pointer(row_ptr, LATENT, tl.float32, ALIGNED), i, inside, False)
    m = g
    if HAS_MOMENTUM:
        m = read(pointer(row_ptr, MOMENTUM, MOMENTUM_TYPE, ALIGNED), i, inside, False)
    d, m, _ = base_direction(g, m, g, beta1, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, HAS_MOMENTUM, NESTEROV, False)
    return x, d, m


@triton.jit(do_not_specialize=["count"])
def row_kernel(
    table_ptr, numbers_ptr, grad_scale_ptr, found_inf_ptr, count, gradient_factor, level_factor, intervals,
    RULE: tl.constexpr, BINARY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    HAS_SIGMA: tl.constexpr, PARAM_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: the mean of |point| becomes the level, then the step. Without STEP: one program per BLOCK
    of a row, which writes the sum of |point| alone."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    program = tl.program_id(0)
    row_ptr = find(table_ptr, count, program)
    factor = gradient_factor
    if grad_scale_ptr is not None:
        factor = tl.div_rn(gradient_factor, tl.load(grad_scale_ptr))
    lr = tl.load(numbers_ptr)
    beta1 = tl.load(numbers_ptr + 1)
    shrink = tl.load(numbers_ptr + 7)
    keep = tl.load(numbers_ptr + 9)
    bound = tl.load(numbers_ptr + 13)
    kappa = tl.load(numbers_ptr + 14)
    lam = tl.load(numbers_ptr + 15)

    length = tl.load(row_ptr + ROW)
    if ALIGNED:  # rows of a multiple of 16 elements: what is inside changes 16 bytes at a time
        length = tl.multiple_of(length, 16)
    parts = (length + BLOCK - 1) // BLOCK
    local = program - tl.load(row_ptr + FIRST_PROGRAM)
    row = local // parts
    within = (local - row * parts) * BLOCK + tl.arange(0, BLOCK)
    inside = within < length
    i = row * length + within
    x, d, m = stam_read(
        row_ptr, i, inside, factor, beta1, HAS_MOMENTUM, NESTEROV, PARAM_TYPE, MOMENTUM_TYPE, ALIGNED
    )
    last = intervals - 1.0
    scale_ptr = pointer(row_ptr, SCALE, tl.float32, False)
    hi_before = tl.load(scale_ptr + row) * level_factor
    half_before = tl.div_rn(hi_before, intervals)
    limit = float("inf")
    if HAS_SIGMA:
        sigma_ptr = pointer(row_ptr, SIGMA, tl.float32, False)
        limit = bound * tl.load(sigma_ptr + i // tl.load(row_ptr + SIGMA_ROW), mask=inside, other=1.0)
    point = stam_point(x, d, hi_before, half_before, last, limit, lr, shrink, lam, RULE, BINARY)
    total = tl.reduce(tl.where(inside, tl.abs(point), 0.0), 0, add)
    if STEP:
        scale = (total.to(tl.float64) / length.to(tl.float64)).to(tl.float32)
        hi = scale * level_factor
        half = tl.div_rn(hi, intervals)
        latent, weight = stam_step(
            x, d, hi_before, half_before, hi, half, last, limit, lr, shrink, kappa, keep, lam, RULE, BINARY
        )
        if HAS_MOMENTUM:
            write(pointer(row_ptr, MOMENTUM, MOMENTUM_TYPE, ALIGNED), i, m, inside, False)
        write(pointer(row_ptr, LATENT, tl.float32, ALIGNED), i, latent, inside, False)
        write(pointer(row_ptr, PARAM, PARAM_TYPE, ALIGNED), i, weight, inside, False)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(pointer(row_ptr, PARTIAL, tl.float32, False) + local, total)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(table_ptr, found_inf_ptr, count, PART: tl.constexpr, BLOCK: tl.constexpr):
    """One program per long row: its level goes to `before`, the mean of its parts' sums takes its place."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    program = tl.program_id(0)
    row_ptr = find(table_ptr, count, program)
    row = program - tl.load(row_ptr + FIRST_PROGRAM)
    length = tl.load(row_ptr + ROW)
    parts = (length + PART - 1) // PART
    partial_ptr = pointer(row_ptr, PARTIAL, tl.float32, False) + row * parts
    total = tl.full([BLOCK], 0.0, tl.float64)
    first = 0
    while first < parts:
        part = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + part, mask=part < parts, other=0.0).to(tl.float64)
        first += BLOCK
    scale_ptr = pointer(row_ptr, SCALE, tl.float32, False) + row
    tl.store(pointer(row_ptr, BEFORE, tl.float32, False) + row, tl.load(scale_ptr))
    tl.store(scale_ptr, (tl.reduce(total, 0, add) / length.to(tl.float64)).to(tl.float32))


# ---- tables ------------------------------------------------------------------------------------------------------


class Table:
    """Rows of COLUMNS on the device, for the tensors of one launch."""

    def __init__(self, rows: list[dict[str, int]], programs: list[int], device: torch.device) -> None:
        first = 0
        numbers = []
        for row, count in zip(rows, programs, strict=True):
            numbers.append([first if name == "first_program" else row[name] for name in COLUMNS])
            first += count
        self.count = len(rows)
        self.programs = first
        self.host = _STAGING.take(self.count, device)  # kept: a captured copy reads it at every replay
        self.host.copy_(torch.tensor(numbers, dtype=torch.int64))
        self.device = self.host.to(device, non_blocking=True)


class _Staging:
    """Pinned memory from which tables are copied without waiting. It is made before it is needed, as memory cannot be
    pinned while a CUDA graph is captured; nor can the kernels be loaded then, so a step comes before the capture."""

    BLOCK, RESERVE = 8192, 2048  # rows

    def __init__(self) -> None:
        self.block = torch.empty(0, len(COLUMNS), dtype=torch.int64)
        self.used = 0

    def take(self, rows: int, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.empty(rows, len(COLUMNS), dtype=torch.int64)
        room = self.block.shape[0] - self.used
        if room < rows or (room < rows + self.RESERVE and not torch.cuda.is_current_stream_capturing()):
            size = max(self.BLOCK, rows + self.RESERVE)
            self.block = torch.empty(size, len(COLUMNS), dtype=torch.int64, pin_memory=True)
            self.used = 0
        self.used += rows
        return self.block[self.used - rows : self.used]


_STAGING = _Staging()


class Plan:
    """The tables of one list of tensors: by chunk, and for moving levels by row and by part of a long row."""

    def __init__(self, lists: dict[str, Sequence[Tensor]], group_size: int, moving_levels: bool) -> None:
        device = lists["param"][0].device
        chunks: dict[tuple[bool, bool, bool], list[dict[str, int]]] = {}
        rows: dict[tuple[bool, int], list[dict[str, int]]] = {}
        long: dict[bool, list[dict[str, int]]] = {}
        parts = levels = 0
        for index, param in enumerate(lists["param"]):
            if param.numel() == 0:
                continue
            row = _row_of(lists, index, group_size)
            aligned = all(row[name] % 16 == 0 for name in COLUMNS[:5])
            if moving_levels:
                aligned_rows = aligned and row["row"] % 16 == 0
                if row["row"] <= ROW_BLOCK:
                    block = max(triton.next_power_of_2(row["row"]), 128)
                    rows.setdefault((aligned_rows, block), []).append(row)
                    continue
                row["partial"], row["before"] = parts, levels  # places in the workspace, addresses below
                parts += _parts_of(row)
                levels += _rows_of(row)
                long.setdefault(aligned_rows, []).append(row)
            one_scale = row["row"] == row["numel"]
            chunks.setdefault((aligned, one_scale, row["numel"] < 2**31), []).append(row)
        self.workspace = torch.empty(parts + levels, device=device)
        for group in long.values():
            for row in group:
                row["partial"] = self.workspace.data_ptr() + 4 * row["partial"]
                row["before"] = self.workspace.data_ptr() + 4 * (parts + row["before"])

        def tables(groups: dict[Any, list[dict[str, int]]], programs: Callable[[dict[str, int]], int]) -> Any:
            return {
                key: Table(group, [programs(row) for row in group], device) for key, group in groups.items()
            }

        self.chunks: dict[tuple[bool, bool, bool], Table] = tables(chunks, _chunks_of)
        self.rows: dict[tuple[bool, int], Table] = tables(rows, _rows_of)
        self.parts: dict[bool, Table] = tables(long, _parts_of)
        self.long: dict[bool, Table] = tables(long, _rows_of)


def _chunks_of(row: dict[str, int]) -> int:
    return -(-row["numel"] // CHUNK)


def _rows_of(row: dict[str, int]) -> int:
    return row["numel"] // row["row"]


def _parts_of(row: dict[str, int]) -> int:
    return _rows_of(row) * -(-row["row"] // ROW_BLOCK)


def _row_of(lists: dict[str, Sequence[Tensor]], index: int, group_size: int) -> dict[str, int]:
    row = {name: tensors[index].data_ptr() if tensors else 0 for name, tensors in lists.items()}
    param = lists["param"][index]
    numel = param.numel()
    scale = lists["scale"][index] if lists["scale"] else None
    whole = scale is None or scale.numel() == 1
    length = numel if whole else numel // (param.shape[0] if param.dim() else 1)
    group = group_size if scale is not None and scale.dim() == 2 and not whole else length
    return row | {
        "before": row["scale"],
        "partial": 0,
        "numel": numel,
        "row": length,
        "group": group,
        "scales_per_row": -(-length // group),
        "sigma_row": numel // lists["sigma"][index].numel() if lists["sigma"] else numel,
        "index": index,
    }


_PLANS: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
# A graph may be replayed as long as the process lives: its tables stay where they are.
_CAPTURED: set[Plan] = set()
_KEPT = 64


def _plan(lists: dict[str, Sequence[Tensor]], group_size: int, moving_levels: bool) -> Plan:
    """The plan of these tensors: that of an earlier step, if they lie where they lay then."""
    device = lists["param"][0].device
    on_gpu = device.type == "cuda"
    key = (
        tuple([t.data_ptr() for tensors in lists.values() for t in tensors]),
        tuple([p.shape for p in lists["param"]]),
        tuple([t.shape for name in ("scale", "sigma") for t in lists[name]]),
        group_size,
        moving_levels,
        (device.index, torch.cuda.current_stream(device).cuda_stream) if on_gpu else None,
    )
    plan = _PLANS.pop(key, None)
    if plan is None:
        plan = Plan(lists, group_size, moving_levels)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            _CAPTURED.add(plan)  # filled only when the graph runs: of no use to others
            return plan
    elif on_gpu and torch.cuda.is_current_stream_capturing():
        _CAPTURED.add(plan)
    _PLANS[key] = plan
    while len(_PLANS) > _KEPT:
        _PLANS.popitem(last=False)
    return plan


# ---- the op ------------------------------------------------------------------------------------------------------


@functools.cache
def level_factor(levels: int) -> float:
    """hi / sigma, multiplied in single precision as the C++ kernels do."""
    return float(torch.tensor((levels - 1) / 2) * torch.tensor(GAUSSIAN_STEP[levels]))


def _check(
    rule: str, lists: dict[str, Sequence[Tensor]], steps: Sequence[Tensor], hyper: Tensor, stochastic: bool
) -> None:
    params = lists["param"]
    required = ["grad"]
    required += [] if rule == "base" else ["scale"]
    required += ["latent"] if rule == "askew_memory" or rule in STAM else []
    for name, tensors in lists.items():
        if len(tensors) != len(params) and (tensors or name in required):
            raise ValueError(f"fused_step: {name}s has {len(tensors)} tensors for {len(params)} parameters")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True) if tensors else ()):
            if tensor.device != params[0].device:
                raise ValueError(f"fused_step: {name}s[{i}] is on {tensor.device}, not {params[0].device}")
            if name in ("scale", "sigma"):
                continue
            if tensor.shape != param.shape or (tensor.stride() != param.stride() and param.numel() > 1):
                raise ValueError(f"fused_step: {name}s[{i}] has another shape or layout than its parameter")
            own = tensors[0].dtype if name == "momentum" else torch.float32
            if tensor.dtype != (params[0].dtype if name in ("param", "grad") else own):
                raise TypeError(f"fused_step: {name}s[{i}] has dtype {tensor.dtype}")
    for tensor in (params[0], *lists["momentum"][:1]):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"fused_step: the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}"
            )
    if (lists["second"] or stochastic) and len(steps) != len(params):
        raise ValueError(f"fused_step: steps has {len(steps)} tensors for {len(params)} parameters")
    if hyper.device.type != "cpu" and hyper.device != params[0].device:
        raise ValueError(f"fused_step: hyper must be on the CPU or on {params[0].device}, not {hyper.device}")


def fused_step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],
    seconds: Sequence[Tensor],
    latents: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    *,
    levels: int = 2,
    group_size: int = 0,
    moving_levels: bool = False,
    nesterov: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
    seed: int = -1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of every parameter, in place; the arguments of the operator ``quantopt::fused_step``.

    Few launches on the current stream; nothing waits for the device. ``hyper`` may lie on the CPU, where it is read
    now, or on the parameters' device, where it is read when the kernels run.

    Raises:
        ValueError, TypeError: where tensors do not fit each other; nothing has been changed then.
    """
    if not params:
        return
    lists = {
        "param": params, "grad": grads, "momentum": momentums, "second": seconds, "latent": latents,
        "scale": scales, "sigma": sigmas,
    }  # fmt: skip
    _check(rule, lists, steps, hyper, seed >= 0)
    device = params[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        plan = _plan(lists, group_size, moving_levels)
        out = torch.empty(len(NUMBERS), device=device)
        if hyper.device.type == "cpu" and device.type != "cpu":
            write_numbers_kernel[(1,)](out, *numbers(rule, hyper, decoupled))
        else:
            before = decay_before_step(rule, decoupled)
            derive_numbers_kernel[(1,)](
                out, hyper, SPLITTING=rule == "splitting", DECAY_BEFORE_STEP=before, enable_fp_fusion=False
            )
        counted = corrections = None
        if steps:
            torch._foreach_add_(
                list(steps), 1.0 if found_inf is None else (found_inf == 0).float().reshape(())
            )
            counted = torch.stack(list(steps)).reshape(-1)
        if seconds:
            assert counted is not None
            betas = hyper[1:3].to(device) if hyper.device == device else hyper[1:3].tolist()
            powers = [beta ** counted.double() for beta in betas]
            corrections = (1 - torch.stack(powers, dim=1)).float()
        shared: dict[str, Any] = {
            "numbers_ptr": out,
            "grad_scale_ptr": grad_scale,
            "found_inf_ptr": found_inf,
            "gradient_factor": -1.0 if maximize else 1.0,
            "level_factor": level_factor(levels) if rule != "base" else 1.0,
            "intervals": float(levels - 1),
            "RULE": rule,
            "BINARY": levels == 2,
            "HAS_MOMENTUM": bool(momentums),
            "NESTEROV": nesterov,
            "HAS_SIGMA": bool(sigmas),
            "PARAM_TYPE": DTYPES[params[0].dtype],
            "MOMENTUM_TYPE": DTYPES[momentums[0].dtype] if momentums else tl.float32,
            "enable_fp_fusion": False,
        }

        def of(table: Table) -> dict[str, Any]:
            return {"table_ptr": table.device, "count": table.count}

        for (aligned, block), table in plan.rows.items():
            row_kernel[(table.programs,)](
                **of(table), **shared, ALIGNED=aligned, STEP=True, BLOCK=block, num_warps=_warps(block)
            )
        for aligned, table in plan.parts.items():
            row_kernel[(table.programs,)](
                **of(table),
                **shared,
                ALIGNED=aligned,
                STEP=False,
                BLOCK=ROW_BLOCK,
                num_warps=_warps(ROW_BLOCK),
            )
        for table in plan.long.values():
            finish_kernel[(table.programs,)](
                **of(table), found_inf_ptr=found_inf, PART=ROW_BLOCK, BLOCK=BLOCK
            )
        for (aligned, one_scale, small), table in plan.chunks.items():
            step_kernel[(table.programs,)](
                **of(table),
                **shared,
                steps_ptr=counted,
                corrections_ptr=corrections,
                seed=max(seed, 0),
                ADAM=bool(seconds),
                HAS_LATENT=bool(latents),
                STOCHASTIC=seed >= 0,
                ONE_SCALE=one_scale,
                SMALL=small,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                CHUNK=CHUNK,
            )


def _warps(block: int) -> int:
    return max(1, block // 256)
