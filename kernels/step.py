"""The fused optimizer step in Triton, for GPUs without the compiled CUDA kernels.

A list of tensors takes few launches: each program finds its tensor and its chunk in a table on the device. Rules and
bases are in rules.py, checks in step_arguments.py, tables in step_tables.py.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantopt.kernels.elements import (
    random_halves,
    random_halves_anywhere,
    read,
    stochastic_bfloat16,
    write,
)
from quantopt.kernels.rules import (
    Grid,
    Numbers,
    Weights,
    derive_numbers_kernel,
    direction,
    gradient,
    level_factor,
    load_numbers,
    load_tuple,
    make_grid,
    point,
    step,
)
from quantopt.kernels.step_arguments import DTYPES, check
from quantopt.kernels.step_tables import BLOCK, CHUNK, ROW_BLOCK, Row, Table, groups_in, plan_of
from quantopt.rules import HYPER, RULES, StepRecord

ROW_WIDTH = tl.constexpr(len(Row._fields))
LENGTH = tl.constexpr(Row._fields.index("length"))
GROUP = tl.constexpr(Row._fields.index("group"))
FIRST_PROGRAM = tl.constexpr(Row._fields.index("first_program"))
STATE_TENSOR = tl.constexpr(2**31)  # exp_avg_sq of tensor n takes the random numbers of tensor n + 2^31


# ---- the kernels -------------------------------------------------------------------------------------------------


@triton.jit
def find(table_ptr, count, program):
    """The address of the row whose programs this one belongs to: the last that begins not after it."""
    at = 0
    end = count
    while end - at > 1:
        middle = (at + end) // 2
        if tl.load(table_ptr + middle * ROW_WIDTH + FIRST_PROGRAM) <= program:
            at = middle
        else:
            end = middle
    return table_ptr + at * ROW_WIDTH


@triton.jit
def load_row(row_ptr):
    return Row(*load_tuple(row_ptr, ROW_WIDTH))


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def skipped(found_inf_ptr):
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0.0
    return skip


@triton.jit
def gradient_factor_of(grad_scale_ptr, sign):
    factor = sign
    if grad_scale_ptr is not None:
        factor = tl.div_rn(sign, tl.load(grad_scale_ptr))
    return factor


@triton.jit
def latent_limit_of(row, i, at, inside, h, HAS_LATENT_BOUND: tl.constexpr):
    """``at``: the index of the scale of each element."""
    limit = float("inf")
    if HAS_LATENT_BOUND:
        bound = tl.where(row.bound_length == 0, at, i // tl.maximum(row.bound_length, 1))
        limit = h.bound * tl.load(
            pointer(row.latent_bound, tl.float32, False) + bound, mask=inside, other=1.0
        )
    return limit


@triton.jit
def read_state(
    row, i, inside, factor,
    BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PARAM_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr,
    EXP_AVG_SQ_TYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(gradient, momentum buffer, second moment); the gradient in place of what there is not."""
    g = read(pointer(row.grad, PARAM_TYPE, ALIGNED), i, inside, WHOLE) * factor
    m = g
    v = g
    if HAS_MOMENTUM:
        m = read(pointer(row.momentum_buffer, MOMENTUM_TYPE, ALIGNED), i, inside, WHOLE)
    if BASE == "adam":
        v = read(pointer(row.exp_avg_sq, EXP_AVG_SQ_TYPE, ALIGNED), i, inside, WHOLE)
    return g, m, v


@triton.jit
def write_state(
    row, i, inside, m, v,
    BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, EXP_AVG_SQ_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if HAS_MOMENTUM:
        write(pointer(row.momentum_buffer, MOMENTUM_TYPE, ALIGNED), i, m, inside, WHOLE)
    if BASE == "adam":
        write(pointer(row.exp_avg_sq, EXP_AVG_SQ_TYPE, ALIGNED), i, v, inside, WHOLE)


@triton.jit
def step_number(steps_ptr, row):
    return tl.load(steps_ptr + row.tensor_index).to(tl.int64).to(tl.uint32)


@triton.jit
def write_weights(
    row, param_ptr, i, inside, latent, weight, first, steps_ptr, seed,
    HAS_LATENT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if HAS_LATENT:
        write(pointer(row.latent, tl.float32, ALIGNED), i, latent, inside, WHOLE)
    if STOCHASTIC:
        index = row.tensor_index.to(tl.uint32)
        random = random_halves(first, step_number(steps_ptr, row), index, seed, BLOCK)
        weight = stochastic_bfloat16(weight, random)
    write(param_ptr, i, weight, inside, WHOLE)


@triton.jit
def scale_index(row, i, ONE_SCALE: tl.constexpr, SMALL: tl.constexpr):
    """Of the scale of each element."""
    if ONE_SCALE:
        at = 0
    else:
        if SMALL:  # 64-bit division takes several times as long
            length = row.length.to(tl.int32)
            channel = i.to(tl.int32) // length
            part = (i.to(tl.int32) - channel * length) // row.group.to(tl.int32)
        else:
            channel = i // row.length
            part = (i - channel * row.length) // row.group
        at = channel.to(tl.int64) * row.scales_per_row + part
    return at


@triton.jit
def load_grid(
    scale, at, inside, level_factor, intervals,
    BINARY: tl.constexpr, ONE_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    scale_ptr = pointer(scale, tl.float32, False)
    if ONE_SCALE or WHOLE:
        value = tl.load(scale_ptr + at)
    else:
        value = tl.load(scale_ptr + at, mask=inside, other=1.0)
    return make_grid(value, level_factor, intervals, BINARY)


@triton.jit
def step_block(
    row_ptr, h, first, factor, steps_ptr, corrections_ptr, seed, state_seed, level_factor, intervals,
    RULE: tl.constexpr, BASE: tl.constexpr, BINARY: tl.constexpr, QUANTISED: tl.constexpr,
    DYNAMIC_SCALE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, HAS_LATENT: tl.constexpr,
    HAS_LATENT_BOUND: tl.constexpr, STOCHASTIC: tl.constexpr, PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr, EXP_AVG_SQ_TYPE: tl.constexpr, ONE_SCALE: tl.constexpr, SMALL: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements [first, first + BLOCK) of one tensor."""
    row = load_row(row_ptr)  # here, as it takes many registers
    i = first + tl.arange(0, BLOCK)
    inside = i < row.numel
    g, m, v = read_state(
        row, i, inside, factor, BASE, HAS_MOMENTUM, PARAM_TYPE, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ALIGNED, WHOLE
    )
    param_ptr = pointer(row.param, PARAM_TYPE, ALIGNED)
    if HAS_LATENT:
        w = read(pointer(row.latent, tl.float32, ALIGNED), i, inside, WHOLE)
    else:
        w = read(param_ptr, i, inside, WHOLE)
    grid = Grid(1.0, 1.0, 0.0, BINARY)  # not used by a rule without levels
    before = grid
    at = 0
    if QUANTISED:
        at = scale_index(row, i, ONE_SCALE, SMALL)
        grid = load_grid(row.scale, at, inside, level_factor, intervals, BINARY, ONE_SCALE, WHOLE)
        before = grid
        if DYNAMIC_SCALE:
            before = load_grid(
                row.scale_before, at, inside, level_factor, intervals, BINARY, ONE_SCALE, WHOLE
            )
    limit = latent_limit_of(row, i, at, inside, h, HAS_LATENT_BOUND)
    x = Weights(w, grid, before, limit, h, param_ptr, i, inside, WHOLE)
    g = gradient(x, g, RULE)
    d, m, v = direction(g, m, v, corrections_ptr, row.tensor_index, h, BASE, HAS_MOMENTUM, NESTEROV)
    latent, weight = step(x, d, RULE)
    if EXP_AVG_SQ_TYPE == tl.bfloat16:
        index = row.tensor_index.to(tl.uint32) + STATE_TENSOR
        v = stochastic_bfloat16(
            v, random_halves(first, step_number(steps_ptr, row), index, state_seed, BLOCK)
        )
    write_state(row, i, inside, m, v, BASE, HAS_MOMENTUM, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ALIGNED, WHOLE)
    if h.lr != 0.0:
        write_weights(
            row, param_ptr, i, inside, latent, weight, first, steps_ptr, seed,
            HAS_LATENT, STOCHASTIC, ALIGNED, WHOLE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "seed", "state_seed"])
def step_kernel(
    table_ptr, numbers_ptr, steps_ptr, corrections_ptr, grad_scale_ptr, found_inf_ptr,
    count, sign, level_factor, intervals, seed, state_seed,
    RULE: tl.constexpr, BASE: tl.constexpr, BINARY: tl.constexpr, QUANTISED: tl.constexpr,
    DYNAMIC_SCALE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, HAS_LATENT: tl.constexpr,
    HAS_LATENT_BOUND: tl.constexpr, STOCHASTIC: tl.constexpr, PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr, EXP_AVG_SQ_TYPE: tl.constexpr, ONE_SCALE: tl.constexpr, SMALL: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per chunk, with the scales as they are."""
    if skipped(found_inf_ptr):
        return
    program = tl.program_id(0)
    row_ptr = find(table_ptr, count, program)
    row = load_row(row_ptr)
    h = load_numbers(numbers_ptr)
    factor = gradient_factor_of(grad_scale_ptr, sign)
    begin = tl.multiple_of((program - row.first_program) * CHUNK, CHUNK)
    for block in range(CHUNK // BLOCK):
        first = begin + block * BLOCK
        if first + BLOCK <= row.numel:
            step_block(
                row_ptr, h, first, factor, steps_ptr, corrections_ptr, seed, state_seed, level_factor, intervals,
                RULE, BASE, BINARY, QUANTISED, DYNAMIC_SCALE, HAS_MOMENTUM, NESTEROV, HAS_LATENT,
                HAS_LATENT_BOUND, STOCHASTIC, PARAM_TYPE, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ONE_SCALE, SMALL, ALIGNED,
                True, BLOCK,
            )  # fmt: skip
        elif first < row.numel:
            step_block(
                row_ptr, h, first, factor, steps_ptr, corrections_ptr, seed, state_seed, level_factor, intervals,
                RULE, BASE, BINARY, QUANTISED, DYNAMIC_SCALE, HAS_MOMENTUM, NESTEROV, HAS_LATENT,
                HAS_LATENT_BOUND, STOCHASTIC, PARAM_TYPE, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ONE_SCALE, SMALL, ALIGNED,
                False, BLOCK,
            )  # fmt: skip


@triton.jit
def add(x, y):
    return x + y


@triton.jit(do_not_specialize=["count", "state_seed"])
def group_kernel(
    table_ptr, numbers_ptr, steps_ptr, corrections_ptr, grad_scale_ptr, found_inf_ptr,
    count, sign, level_factor, intervals, state_seed,
    RULE: tl.constexpr, BASE: tl.constexpr, BINARY: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, HAS_LATENT_BOUND: tl.constexpr, PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr, EXP_AVG_SQ_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dynamic scales, with GROUPS groups of up to BLOCK elements per program: the mean of |point| becomes the scale,
    then the step. Without STEP: one program per BLOCK of a group, which only writes the sum of |point|."""
    if skipped(found_inf_ptr):
        return
    program = tl.program_id(0)
    row_ptr = find(table_ptr, count, program)
    row = load_row(row_ptr)
    h = load_numbers(numbers_ptr)
    factor = gradient_factor_of(grad_scale_ptr, sign)

    length = tl.load(
        row_ptr + LENGTH
    )  # not row.length: Triton 3.6 drops the multiple of what a function returns
    group = tl.load(row_ptr + GROUP)
    if ALIGNED:  # of 16 elements: what is inside changes 16 bytes at a time
        length = tl.multiple_of(length, 16)
        group = tl.multiple_of(group, 16)
    parts = (group + BLOCK - 1) // BLOCK  # 1 with STEP
    local = program - row.first_program
    first = local // parts
    within = ((local - first * parts) * BLOCK + tl.arange(0, BLOCK))[None, :]
    number = (first * GROUPS + tl.arange(0, GROUPS))[:, None]  # of the scale
    there = number < row.numel // row.length * row.scales_per_row
    channel = number // row.scales_per_row
    begin = (number - channel * row.scales_per_row) * group  # in its row
    inside = (within < group) & (begin + within < length) & there
    start = channel * length + begin
    i = start + within

    g, m, v = read_state(
        row, i, inside, factor, BASE, HAS_MOMENTUM, PARAM_TYPE, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ALIGNED, False
    )
    param_ptr = pointer(row.param, PARAM_TYPE, ALIGNED)
    w = read(pointer(row.latent, tl.float32, ALIGNED), i, inside, False)
    scale_ptr = pointer(row.scale, tl.float32, False) + number
    before = make_grid(tl.load(scale_ptr, mask=there, other=1.0), level_factor, intervals, BINARY)
    limit = latent_limit_of(row, start, number, there, h, HAS_LATENT_BOUND)
    x = Weights(w, before, before, limit, h, param_ptr, i, inside, False)
    g = gradient(x, g, RULE)
    d, m, v = direction(g, m, v, corrections_ptr, row.tensor_index, h, BASE, HAS_MOMENTUM, NESTEROV)
    total = tl.reduce(tl.where(inside, tl.abs(point(x, d, RULE)), 0.0), 1, add)[:, None]
    if STEP:
        elements = tl.where(there, tl.minimum(group, length - begin), 1)
        scale = (total.to(tl.float64) / elements.to(tl.float64)).to(tl.float32)
        scale = tl.where(there, scale, 1.0)
        grid = make_grid(scale, level_factor, intervals, BINARY)
        x = Weights(w, grid, before, limit, h, param_ptr, i, inside, False)
        latent, weight = step(x, d, RULE)
        if EXP_AVG_SQ_TYPE == tl.bfloat16:
            index = row.tensor_index.to(tl.uint32) + STATE_TENSOR
            v = stochastic_bfloat16(
                v, random_halves_anywhere(i, step_number(steps_ptr, row), index, state_seed)
            )
        write_state(row, i, inside, m, v, BASE, HAS_MOMENTUM, MOMENTUM_TYPE, EXP_AVG_SQ_TYPE, ALIGNED, False)
        if h.lr != 0.0:
            write(pointer(row.latent, tl.float32, ALIGNED), i, latent, inside, False)
            write(param_ptr, i, weight, inside, False)
            tl.store(scale_ptr, scale, mask=there)
    else:
        tl.store(pointer(row.partial_sums, tl.float32, False) + local + 0 * number, total)  # one


@triton.jit(do_not_specialize=["count"])
def scale_epilogue_kernel(
    table_ptr, numbers_ptr, found_inf_ptr, count, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per long group: its scale is saved as scale_before and becomes the mean of the sums of its parts."""
    if skipped(found_inf_ptr):
        return
    program = tl.program_id(0)
    row = load_row(find(table_ptr, count, program))
    number = program - row.first_program
    parts = (row.group + PART - 1) // PART
    sums_ptr = pointer(row.partial_sums, tl.float32, False) + number * parts
    total = tl.full([BLOCK], 0.0, tl.float64)
    first = 0
    while first < parts:
        part = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + part, mask=part < parts, other=0.0).to(tl.float64)
        first += BLOCK
    scale_ptr = pointer(row.scale, tl.float32, False) + number
    tl.store(pointer(row.scale_before, tl.float32, False) + number, tl.load(scale_ptr))
    if load_numbers(numbers_ptr).lr != 0.0:
        elements = tl.minimum(row.group, row.length - number % row.scales_per_row * row.group)
        tl.store(scale_ptr, (tl.reduce(total, 0, add) / elements.to(tl.float64)).to(tl.float32))


# ---- the op ------------------------------------------------------------------------------------------------------


def fused_step(record: StepRecord) -> None:
    """One step of every parameter of the record, in place.

    Few launches on the current stream; nothing waits for the device. ``hyper`` may lie on the CPU, where it is read
    now, or on the parameters' device, where it is read when the kernels run.

    Raises:
        ValueError, TypeError: where tensors do not fit each other; nothing has been changed then.
    """
    if not record.params:
        return
    device, hyper = record.params[0].device, record.hyper
    if hyper.device.type != "cpu" and hyper.device != device:
        raise ValueError(f"fused_step: hyper must be on the CPU or on {device}, not {hyper.device}")
    if hyper.dtype != torch.float64 or hyper.shape != (len(HYPER),):
        raise ValueError(f"fused_step: hyper must be {len(HYPER)} numbers in float64; use hyper_tensor")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        plan = plan_of(record, check)
        momentum_dtype = record.momentum_buffers[0].dtype if record.momentum_buffers else torch.float32
        exp_avg_sq_dtype = record.exp_avg_sqs[0].dtype if record.exp_avg_sqs else torch.float32
        counted, corrections = _count_step(record)
        shared: dict[str, Any] = {
            "numbers_ptr": _derived_numbers(record),
            "steps_ptr": counted,
            "state_seed": max(record.state_seed, 0),
            "corrections_ptr": corrections,
            "grad_scale_ptr": record.grad_scale,
            "found_inf_ptr": record.found_inf,
            "sign": -1.0 if record.maximize else 1.0,
            "level_factor": level_factor(record.levels) if record.scales else 1.0,
            "intervals": float(record.levels - 1),
            "RULE": record.rule,
            "BASE": record.base,
            "BINARY": record.levels == 2,
            "HAS_MOMENTUM": bool(record.momentum_buffers),
            "NESTEROV": record.nesterov,
            "HAS_LATENT_BOUND": bool(record.latent_bounds),
            "PARAM_TYPE": DTYPES[record.params[0].dtype],
            "MOMENTUM_TYPE": DTYPES[momentum_dtype],
            "EXP_AVG_SQ_TYPE": DTYPES[exp_avg_sq_dtype],
            "enable_fp_fusion": False,
        }
        for (aligned, block), table in plan.groups.items():
            groups = groups_in(block)
            _launch(
                group_kernel, table, shared, ALIGNED=aligned, STEP=True, GROUPS=groups, BLOCK=block,
                num_warps=_warps(groups * block),
            )  # fmt: skip
        for aligned, table in plan.parts.items():
            _launch(
                group_kernel, table, shared, ALIGNED=aligned, STEP=False, GROUPS=1, BLOCK=ROW_BLOCK,
                num_warps=_warps(ROW_BLOCK),
            )  # fmt: skip
        epilogue = {name: shared[name] for name in ("numbers_ptr", "found_inf_ptr")}
        for table in plan.long.values():
            _launch(scale_epilogue_kernel, table, epilogue, PART=ROW_BLOCK, BLOCK=BLOCK)
        for (aligned, one_scale, small), table in plan.chunks.items():
            _launch(
                step_kernel,
                table,
                shared,
                seed=max(record.seed, 0),
                QUANTISED=RULES[record.rule].quantised,
                DYNAMIC_SCALE=record.dynamic_scale,
                HAS_LATENT=bool(record.latents),
                STOCHASTIC=record.seed >= 0,
                ONE_SCALE=one_scale,
                SMALL=small,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                CHUNK=CHUNK,
            )


def _count_step(record: StepRecord) -> tuple[Tensor | None, Tensor | None]:
    """Counts up ``steps``; the numbers of the steps, and Adam's c1 / sqrt(c2) and c1 eps of each tensor."""
    if not record.steps:
        return None, None
    found_inf, hyper = record.found_inf, record.hyper
    torch._foreach_add_(
        list(record.steps), 1.0 if found_inf is None else (found_inf == 0).float().reshape(())
    )
    counted = torch.stack(list(record.steps)).reshape(-1)
    if record.base != "adam":
        return counted, None
    values = hyper if hyper.device == counted.device else hyper.tolist()
    c1, c2 = (1 - values[HYPER.index(name)] ** counted.double() for name in ("momentum", "beta2"))
    return counted, torch.stack([c1 / c2.sqrt(), c1 * values[HYPER.index("adam_eps")]], dim=1).float()


def _derived_numbers(record: StepRecord) -> Tensor:
    """The Numbers, in float32 on the parameters' device."""
    device, hyper = record.params[0].device, record.hyper
    numbers = torch.empty(len(Numbers._fields), device=device)
    on_device = hyper.device == device
    values = [0.0] * len(HYPER) if on_device else hyper.tolist()
    derive_numbers_kernel[(1,)](
        numbers,
        hyper if on_device else None,
        **dict(zip(HYPER, values, strict=True)),
        RULE=record.rule,
        # Weight decay of a latent is the same number in both forms; it acts before the step there.
        DECAY_BEFORE_STEP=record.decoupled or RULES[record.rule].latent,
        enable_fp_fusion=False,
    )
    return numbers


def _launch(kernel: Any, table: Table, shared: dict[str, Any], **options: Any) -> None:
    kernel[(table.programs,)](table_ptr=table.device, count=table.count, **shared, **options)


def _warps(block: int) -> int:
    return max(1, block // 256)
