"""Tables of the tensors of a step, on the device, from which each program of a kernel finds its tensor and its chunk.

They are made once for the same tensors.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantopt.rules import StepRecord

BLOCK = 1024  # elements at a time
CHUNK = 4096  # elements per program
# Dynamic scales: groups up to this length are reduced and stepped while they are in registers.
ROW_BLOCK = 4096


class Row(NamedTuple):
    """One tensor in a table, as int64: its addresses (0: there is no such tensor) and its sizes."""

    param: int
    grad: int
    momentum_buffer: int
    exp_avg_sq: int
    latent: int
    scale: int
    scale_before: int  # that of the step before; the address of `scale` where the scale is not dynamic
    latent_bound: int
    partial_sums: int  # dynamic scales: sums of the parts of long groups
    numel: int
    length: int  # elements per row of a scale, or of a row of scales
    group: int  # elements per scale; of the last of a row, there may be fewer
    scales_per_row: int
    bound_length: int  # elements per latent bound; 0: one for each scale
    tensor_index: int  # of the tensor in its list, for steps and random numbers
    first_program: int

    @property
    def scales(self) -> int:
        return self.numel // self.length * self.scales_per_row

    @property
    def parts(self) -> int:
        """Parts of up to ROW_BLOCK elements that all groups have."""
        return self.scales * -(-self.group // ROW_BLOCK)

    @property
    def block(self) -> int:
        """A power of two from the elements of a group on."""
        return max(int(triton.next_power_of_2(self.group)), 16)

    @property
    def whole_vectors(self) -> bool:
        """Whether 16 elements from the start of a group on are all in it or none."""
        return self.length % 16 == 0 and self.group % 16 == 0

    @property
    def chunks(self) -> int:
        return -(-self.numel // CHUNK)


def _row(record: StepRecord, index: int) -> Row:
    def address(tensors: Sequence[Tensor]) -> int:
        return tensors[index].data_ptr() if tensors else 0

    param = record.params[index]
    numel = param.numel()
    scale = record.scales[index] if record.scales else None
    one_scale = scale is None or scale.numel() == 1
    length = numel if one_scale else numel // (param.shape[0] if param.dim() else 1)
    grouped = scale is not None and scale.dim() == 2 and not one_scale
    group = min(record.group_size, length) if grouped else length
    bounds = record.latent_bounds
    bound_per_scale = (
        bool(bounds) and bounds[index].dim() == 2 and bounds[index].shape == record.scales[index].shape
    )
    return Row(
        param=param.data_ptr(),
        grad=address(record.grads),
        momentum_buffer=address(record.momentum_buffers),
        exp_avg_sq=address(record.exp_avg_sqs),
        latent=address(record.latents),
        scale=address(record.scales),
        scale_before=address(record.scales),
        latent_bound=address(bounds),
        partial_sums=0,
        numel=numel,
        length=length,
        group=group,
        scales_per_row=-(-length // group),
        bound_length=0 if bound_per_scale else numel // bounds[index].numel() if bounds else numel,
        tensor_index=index,
        first_program=0,
    )


def groups_in(block: int) -> int:
    """The groups of up to ``block`` elements that a program reduces and steps."""
    return max(1, BLOCK // block)


class _Staging:
    """Pinned memory from which tables are copied without waiting.

    Memory cannot be pinned while a CUDA graph is captured, so some is always in reserve. Kernels cannot be loaded then
    either, so a step must precede the capture.
    """

    BLOCK, RESERVE = 8192, 2048  # rows

    def __init__(self) -> None:
        self.block = torch.empty(0, len(Row._fields), dtype=torch.int64)
        self.used = 0

    def take(self, rows: int, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.empty(rows, len(Row._fields), dtype=torch.int64)
        room = self.block.shape[0] - self.used
        if room < rows or (room < rows + self.RESERVE and not torch.cuda.is_current_stream_capturing()):
            size = max(self.BLOCK, rows + self.RESERVE)
            self.block = torch.empty(size, len(Row._fields), dtype=torch.int64, pin_memory=True)
            self.used = 0
        self.used += rows
        return self.block[self.used - rows : self.used]


_STAGING = _Staging()


class Table:
    """The tensors of one launch; ``programs`` of each row: how many programs it takes."""

    def __init__(self, rows: list[Row], programs: Callable[[Row], int], device: torch.device) -> None:
        self.count = len(rows)
        self.programs = 0
        numbered = []
        for row in rows:
            numbered.append(row._replace(first_program=self.programs))
            self.programs += programs(row)
        self.host = _STAGING.take(
            self.count, device
        )  # not released: a captured copy reads it at every replay
        self.host.copy_(torch.tensor(numbered, dtype=torch.int64))
        self.device = self.host.to(device, non_blocking=True)


class Plan:
    """The tables of a record: by chunk, and for dynamic scales by group and by part of a long group. A row without
    groups is one.

    Keys of ``chunks``: aligned to 16 bytes?, one scale?, less than 2^31 elements?; of ``groups``: aligned?, elements of
    a block; of ``parts`` and ``long``: aligned?.
    """

    def __init__(self, record: StepRecord) -> None:
        device = record.params[0].device
        # Tensors that no longer exist: others may lie at their addresses, with other shapes or dtypes.
        self.dead: list[weakref.ref[Tensor]] = []
        self.watched = [weakref.ref(tensor, self.dead.append) for tensor in _watched(record)]
        chunks: dict[tuple[bool, bool, bool], list[Row]] = {}
        short: dict[tuple[bool, int], list[Row]] = {}
        long: dict[bool, list[Row]] = {}
        self.workspaces: list[Tensor] = []
        for index, param in enumerate(record.params):
            if param.numel() == 0:
                continue
            row = _row(record, index)
            aligned = all(
                address % 16 == 0
                for address in (row.param, row.grad, row.momentum_buffer, row.exp_avg_sq, row.latent)
            )
            if record.dynamic_scale and row.group <= ROW_BLOCK:
                short.setdefault((aligned and row.whole_vectors, row.block), []).append(row)
                continue
            if record.dynamic_scale:
                workspace = torch.empty(row.parts + row.scales, device=device)
                self.workspaces.append(workspace)
                address = workspace.data_ptr()
                row = row._replace(partial_sums=address, scale_before=address + 4 * row.parts)
                long.setdefault(aligned and row.whole_vectors, []).append(row)
            one_scale = row.group == row.numel
            chunks.setdefault((aligned, one_scale, row.numel < 2**31), []).append(row)

        def tables(groups: dict[Any, list[Row]], programs: Callable[[Row], int]) -> Any:
            return {key: Table(group, programs, device) for key, group in groups.items()}

        self.chunks: dict[tuple[bool, bool, bool], Table] = tables(chunks, lambda row: row.chunks)
        self.groups: dict[tuple[bool, int], Table] = tables(
            short, lambda row: -(-row.scales // groups_in(row.block))
        )
        self.parts: dict[bool, Table] = tables(long, lambda row: row.parts)
        self.long: dict[bool, Table] = tables(long, lambda row: row.scales)


def _watched(record: StepRecord) -> list[Tensor]:
    """All tensors but the gradients, which may be new ones at every step."""
    return [
        *record.params, *record.momentum_buffers, *record.exp_avg_sqs, *record.latents, *record.scales,
        *record.latent_bounds,
    ]  # fmt: skip


_PLANS: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
# A graph may be replayed as long as the process lives: its tables stay where they are.
_CAPTURED: set[Plan] = set()
_LIMIT = 64  # of plans


def plan_of(record: StepRecord, check: Callable[[StepRecord], None]) -> Plan:
    """The plan of an earlier step with the same tensors in the same places, else a new one, after ``check(record)``."""
    params, grads = record.params, record.grads
    device = params[0].device
    on_gpu = device.type == "cuda"
    key = (
        record.rule,
        record.base,
        record.levels,
        record.group_size,
        record.dynamic_scale,
        record.seed >= 0,
        record.state_seed >= 0,
        torch.cuda.current_stream(device).cuda_stream if on_gpu else None,
        *map(len, record[2:10]),  # the lists
        *map(Tensor.data_ptr, _watched(record)),
        *map(Tensor.data_ptr, grads),
        # What lies there may have got another layout: Tensor.data was assigned, or the gradients are new ones.
        params[0].dtype,
        *map(Tensor.size, params),
        *map(Tensor.stride, params),
        *[grad.dtype for grad in grads[:1]],
        *map(Tensor.size, grads),
        *map(Tensor.stride, grads),
    )
    plan = _PLANS.get(key)
    if plan is not None and not plan.dead:
        if on_gpu and torch.cuda.is_current_stream_capturing():
            _CAPTURED.add(plan)
        return plan
    check(record)
    plan = Plan(record)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _CAPTURED.add(plan)  # filled only when the graph runs: of no use to others
        return plan
    _PLANS[key] = plan
    while len(_PLANS) > _LIMIT:
        _PLANS.popitem(last=False)
    return plan
