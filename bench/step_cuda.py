"""The GPU table of `python bench/step.py --device cuda`.

Kernels (`flat` cases) are timed by CUDA events, whole optimizer steps over a model's parameters (`list` cases) by the
clock of the host from one synchronisation to the next. The peers of a case take turns; medians. Every function has
several buffers and uses another one at each call, so that the L2 cache does not serve. The limit of a flat case is
the device-to-device copy measured in the same turns: `copy` moves as many bytes per second as it can, and the ratio is
the share of that bandwidth that our step reaches.
"""

import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import missing, report, row, write_json
from step_problems import BETA, CAP, DECAY, DEFAULTS, EPSILON, GPT2, HYPER, LR, RATE, RESNET18
from torch import Tensor, nn

import quantopt
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.reference import askew, base
from quantopt.reference.step import fused_step as reference_step
from quantopt.rules import RULES, StepRecord
from quantopt.train.environment import device_name

Rows = list[dict[str, Any]]
Functions = dict[str, Sequence[Callable[[], object]]]  # each with one callable per buffer
DEVICE = "cuda"
MILLION = 10**6
COPY_BYTES = 2 * 10**9  # read and written by one copy


def seconds_on_device(functions: Functions, *, rounds: int = 15, minimum: float = 0.02) -> dict[str, float]:
    """Median seconds of one call of each function by CUDA events, the functions taking turns."""
    calls: dict[str, int] = {}
    for name, buffers in functions.items():
        for function in buffers:
            function()
        calls[name] = max(len(buffers), round(minimum / max(_timed(buffers, len(buffers)), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, buffers in functions.items():
            times[name].append(_timed(buffers, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(buffers: Sequence[Callable[[], object]], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for k in range(calls):
        buffers[k % len(buffers)]()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / calls


def seconds_of_steps(functions: Functions, *, rounds: int = 15, calls: int = 30) -> dict[str, float]:
    """Median seconds of one call of each function, host and device together, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for buffers in functions.values():
        for function in [*buffers, *buffers]:
            function()
    for _ in range(rounds):
        for name, buffers in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for k in range(calls):
                buffers[k % len(buffers)]()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- flat buffers


def flat_record(
    rule: str,
    n: int,
    dtype: torch.dtype,
    momentum_dtype: torch.dtype,
    shape: tuple[int, ...] = (),
    **options: Any,
) -> tuple[StepRecord, int]:
    """The step of one buffer, and the bytes that it reads and writes."""
    p = torch.randn(n, device=DEVICE).mul_(0.7).to(dtype).view(shape or n)
    g = torch.randn(n, device=DEVICE).mul_(0.1).to(dtype).view(shape or n)
    m = torch.zeros(shape or n, device=DEVICE, dtype=momentum_dtype)
    latent = RULES[rule].latent
    numbers = HYPER | DEFAULTS.get(rule, {})
    record = StepRecord(
        rule=rule,
        base="sgd",
        params=[p],
        grads=[g],
        momentum_buffers=[m],
        exp_avg_sqs=[],
        latents=[p.to(torch.float32, copy=True)] if latent else [],
        scales=[torch.ones(shape[0] if shape else 1, device=DEVICE)],
        latent_bounds=[],
        steps=[torch.zeros((), device=DEVICE)] if options.get("seed", -1) >= 0 else [],
        hyper=hyper_tensor(**numbers),
        **options,
    )
    size, momentum_size = p.element_size(), m.element_size()
    return record, n * (size + 2 * momentum_size + (8 + size if latent else 2 * size))


def buffers_for(n: int) -> int:
    return 2 if n >= 50 * MILLION else 8


def copies() -> list[Callable[[], object]]:
    source = torch.randn(COPY_BYTES // 8, device=DEVICE)
    targets = [torch.empty_like(source) for _ in range(2)]
    return [lambda t=t: t.copy_(source) for t in targets]  # type: ignore[misc]


def against_copy(
    case: str, rule: str, n: int, target: float | None, *, dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (), **options: Any,
) -> Rows:  # fmt: skip
    """Our kernel against the bandwidth of a copy, and the Triton kernel against ours."""
    count = 1 if n > 500 * MILLION else buffers_for(n)
    made = [flat_record(rule, n, dtype, momentum_dtype, shape, **options) for _ in range(count)]
    moved = made[0][1]
    functions: Functions = {
        "ours": [lambda r=r: fused_step(r, backend="cuda") for r, _ in made],  # type: ignore[misc]
        "copy": copies(),
    }
    if importlib.util.find_spec("triton") is not None:
        functions["triton"] = [
            lambda r=r: fused_step(r, backend="triton")  # type: ignore[misc]
            for r, _ in made
        ]
    times = seconds_on_device(functions)
    bandwidth = COPY_BYTES / times["copy"]
    more = {"gb_per_s": moved / times["ours"] / 1e9, "copy_gb_per_s": bandwidth / 1e9}
    rows = [row(case, "device-to-device copy bandwidth", times["ours"], moved / bandwidth, target, **more)]
    if "triton" in times:
        more = {"gb_per_s": moved / times["triton"] / 1e9}
        rows += [row(f"{case}, Triton", "our CUDA kernel", times["triton"], times["ours"], 0.95, **more)]
    return rows


def against_torch(n: int) -> Rows:
    """AskewSGD on a flat float32 buffer against the eager reference, torch.compile of it and fused SGD."""
    case = f"askew flat fp32 {n // MILLION}M"
    count = buffers_for(n)
    made = [flat_record("askew", n, torch.float32, torch.float32)[0] for _ in range(count)]
    hi = torch.ones((), device=DEVICE)

    @torch.compile
    def compiled(p: Tensor, g: Tensor, m: Tensor) -> None:
        d, m_new = base.sgd_direction(g, m, BETA, False)
        p.copy_(askew.velocity_step(p, d, hi, 2, lr=LR, decay=DECAY, epsilon=EPSILON, rate=RATE, cap=CAP))
        m.copy_(m_new)

    def sgd(record: StepRecord) -> Callable[[], object]:
        weight = nn.Parameter(record.params[0])
        weight.grad = record.grads[0]
        optimizer = torch.optim.SGD([weight], lr=LR, momentum=BETA, fused=True)
        optimizer.state[weight]["momentum_buffer"] = record.momentum_buffers[0]
        return lambda: optimizer.step()

    times = seconds_on_device(
        {
            "ours": [lambda r=r: fused_step(r, backend="cuda") for r in made],  # type: ignore[misc]
            "compiled": [
                lambda r=r: compiled(r.params[0], r.grads[0], r.momentum_buffers[0])  # type: ignore[misc]
                for r in made
            ],
            "sgd": [sgd(r) for r in made],
            "eager": [lambda r=r: reference_step(r) for r in made],  # type: ignore[misc]
        }
    )
    peers = (
        ("eager", "eager reference", 10.0),
        ("compiled", "torch.compile of the reference", 1.1),
        ("sgd", "torch.optim.SGD(fused=True)", 1.0),
    )
    return [row(case, peer, times["ours"], times[name], target) for name, peer, target in peers]


# ---- lists: whole Python steps


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter((torch.randn(s, device=DEVICE) * 0.05).to(dtype)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, device=DEVICE) * 0.01).to(dtype)
    return params


def whole_steps(case: str, shapes: Sequence[tuple[int, ...]], targets: dict[str, float], copies: int) -> Rows:
    """`opt.step()` of AskewSGD, every tensor quantised, on `copies` models by turns."""

    def steps(make: Callable[[list[nn.Parameter]], Any]) -> list[Callable[[], object]]:
        return [make(parameters(shapes, torch.float32)).step for _ in range(copies)]

    functions: Functions = {
        "ours": steps(lambda ps: quantopt.AskewSGD(ps, bits=1, lr=LR, weight_decay=DECAY, epsilon=EPSILON)),
        "SGD(fused=True)": steps(lambda ps: torch.optim.SGD(ps, lr=LR, momentum=BETA, fused=True)),
        "SGD(foreach=True)": steps(lambda ps: torch.optim.SGD(ps, lr=LR, momentum=BETA, foreach=True)),
    }
    if "bitsandbytes SGD" in targets and importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        functions["bitsandbytes SGD"] = steps(lambda ps: bitsandbytes.optim.SGD(ps, lr=LR, momentum=BETA))
    if "torchao PARQ" in targets and importlib.util.find_spec("torchao") is not None:
        functions["torchao PARQ"] = steps(_parq)
    times = seconds_of_steps(functions)
    return [
        row(case, peer, times["ours"], times[peer], target)
        if peer in times
        else missing(case, peer, "not installed", f"{peer.split()[0]} is not installed", target)
        for peer, target in targets.items()
    ]


def _parq(params: list[nn.Parameter]) -> Any:
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    sgd = torch.optim.SGD([{"params": params, "quant_bits": 1}], lr=LR, momentum=BETA, fused=True)
    prox = ProxPARQ(anneal_start=0, anneal_end=10**6, steepness=10)
    return QuantOptimizer(sgd, LSBQuantizer(), prox, warmup_steps=0)


# ---- the table


def cases() -> dict[str, Callable[[], Rows]]:
    bf16 = torch.bfloat16
    low: dict[str, Any] = dict(dtype=bf16, momentum_dtype=bf16, seed=1)
    wide: dict[str, Any] = dict(dtype=bf16, seed=1)
    lists = {"SGD(fused=True)": 1.5, "SGD(foreach=True)": 3.0}
    peers = {"bitsandbytes SGD": 2.0, "torchao PARQ": 20.0}
    made: dict[str, Callable[[], Rows]] = {}
    for label, n in (("100M", 100 * MILLION), ("1B", 1000 * MILLION)):
        for rule in ("askew", "splitting"):
            made[f"{rule} {label}"] = lambda rule=rule, label=label, n=n: against_copy(  # type: ignore[misc]
                f"{rule} flat fp32 {label}", rule, n, 0.95
            )
    return made | {
        "bf16 100M": lambda: against_copy(
            "askew flat bf16 100M, stochastic rounding", "askew", 100 * MILLION, 0.90, **low
        ),
        "bf16 1B": lambda: against_copy(
            "askew flat bf16 1B, stochastic rounding", "askew", 1000 * MILLION, 0.90, **low
        ),
        "bf16 wide 100M": lambda: against_copy(
            "askew flat bf16 100M, fp32 momentum, stochastic rounding", "askew", 100 * MILLION, 0.90, **wide
        ),
        "memory 100M": lambda: against_copy("askew_memory flat fp32 100M", "askew_memory", 100 * MILLION, None),
        "alternating 25000x4000": lambda: against_copy(
            "alternating 25000 rows of 4000, dynamic scales", "alternating", 100 * MILLION, None,
            shape=(25000, 4000), dynamic_scale=True,
        ),
        "alternating 1000x100000": lambda: against_copy(
            "alternating 1000 rows of 100000, dynamic scales", "alternating", 100 * MILLION, None,
            shape=(1000, 100000), dynamic_scale=True,
        ),
        "torch 100M": lambda: against_torch(100 * MILLION),
        "ResNet-18": lambda: whole_steps("ResNet-18 list, fp32", RESNET18, lists, 4),
        "GPT-2": lambda: whole_steps("GPT-2-small list, fp32", GPT2, lists | peers, 2),
    }  # fmt: skip


def main(json_path: str | None, only: Sequence[str] | None) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench/step.py --device cuda: torch sees no CUDA device")
    unknown = set(only or ()) - set(cases())
    if unknown:
        raise SystemExit(f"--only {sorted(unknown)}: the cases with --device cuda are {list(cases())}")
    name = device_name(DEVICE)
    json_path = json_path or f"bench/results/step-{name.replace(' ', '-')}.json"
    rows: Rows = []
    failed = False
    for case, measure in cases().items():
        if only is not None and case not in only:
            continue
        print(f"{case} ...", flush=True)
        try:
            rows += measure()
        except Exception:  # one case that fails does not lose the others
            traceback.print_exc()
            rows.append(missing(case, "", "failed", "see the log"))
            failed = True
        torch.cuda.empty_cache()
        write_json(rows, json_path, torch.get_num_threads(), device=DEVICE)
    report(rows, json_path, torch.get_num_threads(), device=DEVICE)
    if failed:
        raise SystemExit("a case failed: see above")
