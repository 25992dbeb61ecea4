"""Speed of the fused optimizer step against torch's optimizers, torch.compile of the reference, and the reference.

    python bench/step.py [--device cuda] [--threads N] [--json FILE] [--only CASE ...]

One process, one device, the peers of a case interleaved, medians. `flat` cases are one buffer, on which all peers work
(where three large arrays lie relative to each other is worth 20 % on some machines); `list` cases are whole
optimizer steps over a model's parameters. `probe` is the memory limit: our base rule (p, g and m read, p and m
written, two multiplications), which moves the same bytes per parameter as the rule; with a latent, the base rule and a
copy of the latent. A peer is timed only if its first step moves the weights as it should: the rows of others say what
they did instead.
"""

import argparse
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import compare, missing, report, row
from peers_step import add_deepspeed, check_same
from step_problems import BETA, CAP, DECAY, DEFAULTS, EPSILON, GPT2, HYPER, LR, RATE, RESNET18
from torch import Tensor, nn

import quantopt
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.optim import step as group_step
from quantopt.reference import askew, base, stam
from quantopt.reference.step import fused_step as reference_step
from quantopt.rules import RULES, StepRecord

# Bytes moved per parameter, what is read and written once each: docs/kernels.md has the table.
BYTES = {"askew": 20, "askew_memory": 24, "splitting": 24}
LIST_BYTES = {torch.float32: 20, torch.bfloat16: 10}  # AskewSGD, momentum of the parameters' type
OF_PROBE = 0.95


def compiled_reference(rule: str, epsilon: float) -> Callable[..., None]:
    """torch.compile of the rule on flat tensors, in place: the strongest pure-PyTorch form."""
    hi = torch.tensor(1.0)

    def step_askew(p: Tensor, g: Tensor, m: Tensor, _: Tensor) -> None:
        d, m_new = base.sgd_direction(g, m, BETA, False)
        p.copy_(askew.velocity_step(p, d, hi, 2, lr=LR, decay=DECAY, epsilon=epsilon, rate=RATE, cap=CAP))
        m.copy_(m_new)

    def step_memory(p: Tensor, g: Tensor, m: Tensor, latent: Tensor) -> None:
        d, m_new = base.sgd_direction(g, m, BETA, False)
        new = askew.latent_step(latent, d, hi, lr=LR, weight_decay=DECAY, bound=2.0)
        p.copy_(askew.feasible_projection(new, p, hi, 2, epsilon=epsilon, rate=float("inf"), cap=CAP))
        latent.copy_(new)
        m.copy_(m_new)

    def step_splitting(p: Tensor, g: Tensor, m: Tensor, x: Tensor) -> None:
        d, m_new = base.sgd_direction(g, m, BETA, False)
        r, ex = stam.splitting_point(x, stam.box(x, hi, lr=LR, weight_decay=0.0), d, lr=LR)
        new = stam.splitting_step(r, ex, hi, 2, kappa=0.1)
        p.copy_(stam.box(new, hi, lr=LR, weight_decay=0.0))
        x.copy_(new)
        m.copy_(m_new)

    functions = {"askew": step_askew, "askew_memory": step_memory, "splitting": step_splitting}
    return torch.compile(functions[rule])


def flat(rule: str, n: int, eager: bool = False, epsilon: float = EPSILON) -> list[dict[str, Any]]:
    weight = nn.Parameter(torch.randn(n))
    weight.grad = torch.randn(n)
    weight.data *= 0.7
    weight.grad *= 0.1
    p, g, m, latent = weight.detach(), weight.grad, torch.zeros(n), torch.empty(0)
    if rule != "askew":
        latent = p.clone()
    latents = [] if rule == "askew" else [latent]
    numbers = HYPER | {"epsilon": epsilon} | DEFAULTS.get(rule, {})
    empty: list[Tensor] = []
    record = StepRecord(
        rule, "sgd", [p], [g], [m], empty, latents, [torch.ones(1)], empty, empty, hyper_tensor(**numbers)
    )
    base_step = record._replace(rule="none", scales=empty, hyper=hyper_tensor(lr=LR, momentum=BETA))
    if latents:  # at kappa = 0 a copy of the latent
        base_step = record._replace(rule="alternating", hyper=hyper_tensor(lr=LR, momentum=BETA))
    sgd = torch.optim.SGD([weight], lr=LR, momentum=BETA, fused=True)
    sgd.state[weight]["momentum_buffer"] = m
    compiled = compiled_reference(rule, epsilon)
    check_same(
        "torch.compile of the reference",
        compiled,
        lambda p, g, m, latent: fused_step(
            record._replace(params=[p], grads=[g], momentum_buffers=[m], latents=[latent] if latents else [])
        ),
        [p, g, m, latent],
    )
    if why := fault(sgd, [weight]):
        raise SystemExit(f"SGD(fused=True): {why}")
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: fused_step(record),
        "compiled": lambda: compiled(p, g, m, latent),
        "sgd": sgd.step,
        "probe": lambda: fused_step(base_step),
    }
    times = compare(functions, min_time=1.0)
    if eager:  # hundreds of times slower: a few rounds of its own
        copy = StepRecord(*([t.clone() for t in a] if isinstance(a, list) else a for a in record))
        alone = {"ours": functions["ours"], "eager": lambda: reference_step(copy)}
        times["eager"] = compare(alone, min_time=0.0, repeat=3, warmup=1)["eager"]
    case = f"{rule} flat fp32 {n >> 20}M" + (" at e = 1" if epsilon == 1 else "")
    rate = {"gb_per_s": BYTES[rule] * n / times["ours"] / 1e9}
    compiled_target = {1: 1.5, 16: 1.6, 64: 1.35}[n >> 20] if rule == "askew" else 1.5
    if epsilon == 1:
        compiled_target = None
    rows = [
        row(case, "torch.compile of the reference", times["ours"], times["compiled"], compiled_target, **rate)
    ]
    rows += [row(case, "torch.optim.SGD(fused=True)", times["ours"], times["sgd"])]
    rows += [row(case, "probe (memory limit)", times["ours"], times["probe"], OF_PROBE)]
    if eager:
        rows += [row(case, "eager reference", times["ours"], times["eager"], 25)]
    return rows


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter((torch.randn(s) * 0.05).to(dtype)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape) * 0.01).to(dtype)
    return params


def following(base: str) -> list[dict[str, Any]]:
    """Binary levels that follow the weights, STAM alternating on 16M weights: a mean per group against one per row."""
    shape: list[tuple[int, ...]] = [(4096, 4096)]
    options: dict[str, Any] = dict(bits=1, lr=LR, kappa=0.1, base=base)
    scales: dict[str, dict[str, Any]] = {
        "channel": dict(scale="channel"),
        "group 128": dict(scale="group", group_size=128),
        "group 32": dict(scale="group", group_size=32),
    }
    times = compare(
        {
            name: quantopt.STAM(parameters(shape, torch.float32), **options, **kind).step
            for name, kind in scales.items()
        },
        min_time=1.0,
    )
    return [
        row(f"alternating {base} fp32 16M, {name}", "a mean per row", times[name], times["channel"], 1 / 1.3)
        for name in scales
        if name != "channel"
    ]


def on_base(rule: str, base: str) -> list[dict[str, Any]]:
    """A rule on Adam or on a given direction, as after Muon, against the memory limit: the base step without levels
    (with a latent, STAM at kappa = 0). Adam's bytes are SGD's and those of v, which is copied."""
    n = 16 << 20
    p, g, v = torch.randn(n), torch.randn(n) * 0.1, torch.rand(n)
    latents = [p.clone()] if RULES[rule].latent else []
    empty: list[Tensor] = []
    steps = [torch.ones(1)] if base == "adam" else []
    momentum = [torch.zeros(n)] if base == "adam" else []
    record = StepRecord(
        rule, base, [p], [g], momentum, [v] if base == "adam" else [], latents, [torch.ones(1)], empty, steps,
        hyper_tensor(**(HYPER | {"beta2": 0.999, "adam_eps": 1e-8} | DEFAULTS.get(rule, {}))),
    )  # fmt: skip
    numbers = hyper_tensor(lr=LR, momentum=BETA if base == "adam" else 0.0)
    limit = record._replace(base="sgd", exp_avg_sqs=[], steps=[], hyper=numbers)
    limit = limit._replace(rule="alternating") if latents else limit._replace(rule="none", scales=[])
    copy = torch.empty(n)

    def probe() -> None:
        fused_step(limit)
        if base == "adam":
            copy.copy_(v)

    times = compare({"ours": lambda: fused_step(record), "probe": probe}, min_time=1.0)
    case = f"{rule} on {base} fp32 16M"
    return [row(case, "probe (memory limit)", times["ours"], times["probe"], OF_PROBE)]


def fault(opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> str | None:
    """What is wrong with the first step of torch's SGD or Adam without weight decay, or None."""
    before = [p.detach().clone() for p in params]
    opt.step()
    right = total = 0
    for p, w in zip(params, before, strict=True):
        g = p.grad.float()
        d = g.sign() if "betas" in opt.defaults else g  # Adam
        moved = w.float() - opt.param_groups[0]["lr"] * d
        near = (p.detach().float() - moved).abs() <= 2 * torch.finfo(p.dtype).eps * moved.abs() + 1e-6
        right += int((near & ((p.detach() != w) | (moved.to(p.dtype) == w))).sum())
        total += p.numel()
    return (
        None
        if right > 0.99 * total
        else f"its first step is right for {100 * right / total:.0f} % of the weights"
    )


def whole_step(
    case: str,
    shapes: list[tuple[int, ...]],
    targets: dict[str, float],
    dtype: torch.dtype = torch.float32,
    adam: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """`opt.step()` of AskewSGD or AskewAdam, every tensor quantised, against torch's optimizers on the same list.

    "probe": ours without levels, round to nearest."""
    numbers: dict[str, Any] = dict(lr=1e-3) if adam else dict(lr=LR)
    ours = quantopt.AskewAdam if adam else quantopt.AskewSGD
    step = ours(
        parameters(shapes, dtype), bits=1, weight_decay=DECAY, epsilon=EPSILON, **numbers, **options
    ).step
    functions: dict[str, Callable[[], object]] = {"ours": step}
    rows = []
    theirs: Any = torch.optim.Adam if adam else torch.optim.SGD
    for kind in ("fused", "foreach"):
        params = parameters(shapes, dtype)
        opt = theirs(params, **numbers, **({} if adam else {"momentum": BETA}), **{kind: True})
        peer = f"{theirs.__name__}({kind}=True)"
        if why := fault(opt, params):
            rows.append(missing(case, peer, "failed", why))
        else:
            functions[peer] = opt.step
    if adam:
        rows += add_deepspeed(case, parameters(shapes, dtype), numbers["lr"], fault, functions)
    if "torch.compile of the reference" in targets:
        functions["torch.compile of the reference"] = compiled_list(shapes, dtype)
    if "probe" in targets:
        limit = options | {"rounding": "master" if options.get("memory") else "nearest"}
        functions["probe"] = ours(parameters(shapes, dtype), bits=0, **numbers, **limit).step
    times = compare(functions, min_time=1.0)
    rate = {} if adam else {"gb_per_s": LIST_BYTES[dtype] * sum(map(math.prod, shapes)) / times["ours"] / 1e9}
    return rows + [
        row(case, peer, times["ours"], times[peer], targets.get(peer), **rate)
        for peer in times
        if peer != "ours"
    ]


def compiled_list(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Callable[[], None]:
    params = parameters(shapes, dtype)
    weights, grads = [p.detach().view(-1) for p in params], [p.grad.view(-1) for p in params]
    momentums = [torch.zeros_like(w) for w in weights]
    his = [torch.full((), float(w.float().std()) if w.numel() > 1 else 1.0) for w in weights]

    def step_one(w: Tensor, g: Tensor, m: Tensor, hi: Tensor) -> None:
        d, m_new = base.sgd_direction(g.float(), m.float(), BETA, False)
        v = askew.velocity_step(w.float(), d, hi, 2, lr=LR, decay=DECAY, epsilon=EPSILON, rate=RATE, cap=CAP)
        w.copy_(v)
        m.copy_(m_new)

    # A graph for each number of elements: one of the whole list takes minutes to compile, and one of any number takes
    # five times as long as these.
    torch._dynamo.config.recompile_limit = len(weights)
    compiled = torch.compile(step_one, dynamic=False)
    first = [weights[0], grads[0], momentums[0], his[0]]
    check_same("torch.compile of the reference", compiled, step_one, first)

    def step() -> None:
        for w, g, m, hi in zip(weights, grads, momentums, his, strict=True):
            compiled(w, g, m, hi)

    return step


def paths() -> list[dict[str, Any]]:
    """The step of 62 small tensors where no plan finds the gradients, against the step with one. The reference path is
    timed without the arithmetic of the reference: what is left are the lists."""
    shapes = [(256,)] * 62
    options: dict[str, Any] = dict(lr=LR, weight_decay=DECAY, epsilon=EPSILON)
    plan = quantopt.AskewSGD(parameters(shapes, torch.float32), bits=1, **options)
    reference = quantopt.AskewSGD(parameters(shapes, torch.float32), bits=1, backend="reference", **options)
    sharded = quantopt.AskewSGD(sharded_parameters(shapes), bits=1, **options)

    def without_arithmetic() -> None:
        group_step.fused_step = lambda *_: None
        reference.step()
        group_step.fused_step = fused_step

    times = compare(
        {"with a plan": plan.step, "reference": without_arithmetic, "DTensor": sharded.step}, min_time=1.0
    )
    return [
        row(f"62 tensors of 256, {path} path", "with a plan", times[path], times["with a plan"], 1 / 3)
        for path in ("reference", "DTensor")
    ]


def mesh_of_one() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def offloaded() -> list[dict[str, Any]]:
    """The step of FSDP2 shards that CPUOffloadPolicy keeps on the CPU: four matrices of 2048x2048."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = mesh_of_one()

    def parameters_of_shards() -> list[nn.Parameter]:
        model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
        fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        model(torch.randn(4, 2048)).square().mean().backward()
        return list(model.parameters())

    options: dict[str, Any] = {"bits": 1, "lr": 1e-3, "epsilon": EPSILON}
    functions: dict[str, Callable[[], object]] = {
        "AskewAdam": quantopt.AskewAdam(parameters_of_shards(), **options).step,
        "AskewAdam, latent": quantopt.AskewAdam(parameters_of_shards(), memory=True, **options).step,
    }
    adam = torch.optim.Adam(parameters_of_shards(), lr=1e-3, fused=True)
    times = compare(functions | {"adam": adam.step}, min_time=1.0)
    return [
        row(f"{name}, FSDP2 shards on the CPU, fp32 16M", "Adam(fused=True)", times[name], times["adam"], 1.0)
        for name in functions
    ]


def sharded_parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """DTensors on a mesh of this process alone."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, params = mesh_of_one(), []
    for p in parameters(shapes, torch.float32):
        sharded = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        sharded.grad = DTensor(p.grad, sharded._spec, requires_grad=False)  # one layout object, as in FSDP2
        params.append(sharded)
    return params


def parq_row() -> list[dict[str, Any]]:
    """torchao's PARQ QuantOptimizer on one 4096x4096 weight; the row is left out where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: its row is left out (pip install torchao)")
        return []
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    shape = [(4096, 4096)]
    ours = quantopt.AskewSGD(parameters(shape, torch.float32), bits=1, lr=LR, epsilon=EPSILON)
    sgd = torch.optim.SGD(
        [{"params": parameters(shape, torch.float32), "quant_bits": 1}], lr=LR, momentum=BETA, fused=True
    )
    prox = ProxPARQ(anneal_start=0, anneal_end=10**6, steepness=10)
    parq = QuantOptimizer(sgd, LSBQuantizer(), prox, warmup_steps=0)
    weight = sgd.param_groups[0]["params"][0]
    before = weight.detach().clone()
    parq.step()
    if (moved := float((weight.detach() != before).float().mean())) < 0.99:
        raise SystemExit(f"torchao PARQ: its first step moves {moved:.1%} of the weights: no peer")
    times = compare({"ours": ours.step, "parq": parq.step}, min_time=2.0, repeat=5)
    return [row("4096x4096 fp32, 1 bit, whole step", "torchao PARQ", times["ours"], times["parq"], 40)]


def cases() -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """The table's cases by name."""
    compiled, fused_sgd, fused_adam = "torch.compile of the reference", "SGD(fused=True)", "Adam(fused=True)"
    low: dict[str, Any] = dict(dtype=torch.bfloat16, momentum_dtype="bfloat16")
    gpt2 = "GPT-2 list, bf16"

    def adam(case: str, shapes: list[tuple[int, ...]], target: float, **options: Any) -> list[dict[str, Any]]:
        return whole_step(f"AskewAdam, {case}", shapes, {fused_adam: target}, adam=True, **options)

    return {
        "askew 1M": lambda: flat("askew", 1 << 20, eager=True),
        "askew 16M": lambda: flat("askew", 16 << 20, eager=True),
        "askew 64M": lambda: flat("askew", 64 << 20),
        # All weights feasible, as in the first 70 % of a training: no row of the table, but most of the steps.
        "askew 16M open": lambda: flat("askew", 16 << 20, epsilon=1.0),
        "askew_memory 16M": lambda: flat("askew_memory", 16 << 20),
        "splitting 16M": lambda: flat("splitting", 16 << 20),
        **{
            f"{rule} {base} 16M": functools.partial(on_base, rule, base)
            for base in ("adam", "given")
            for rule in ("askew", "askew_memory", "alternating")
        },
        "following sgd 16M": lambda: following("sgd"),
        "following adam 16M": lambda: following("adam"),
        "ResNet-18": lambda: whole_step("ResNet-18 list, fp32", RESNET18, {compiled: 1.7, "probe": OF_PROBE}),
        "GPT-2 nearest": lambda: whole_step(
            gpt2, GPT2, {compiled: 3.3, "probe": OF_PROBE}, rounding="nearest", **low
        ),
        "GPT-2 stochastic": lambda: whole_step(
            f"{gpt2}, stochastic rounding", GPT2, {"probe": 0.8}, rounding="stochastic", **low
        ),
        "adam 1M": lambda: adam("fp32 1M", [(1 << 20,)], 1.0),
        "adam 16M": lambda: adam("fp32 16M", [(16 << 20,)], 1.0),
        "adam latent 16M": lambda: adam("latent, fp32 16M", [(16 << 20,)], 0.95, memory=True),
        "adam GPT-2 master": lambda: adam(f"{gpt2}, master weights", GPT2, 0.95, rounding="master", **low),
        "adam GPT-2 latent": lambda: adam(f"{gpt2}, latent", GPT2, 0.95, memory=True, **low),
        "adam GPT-2 nearest": lambda: adam(gpt2, GPT2, 0.95, rounding="nearest", **low),
        "adam GPT-2 stochastic": lambda: adam(
            f"{gpt2}, stochastic rounding", GPT2, 0.95, rounding="stochastic", **low
        ),
        "62 small": lambda: whole_step("62 tensors of 256", [(256,)] * 62, {fused_sgd: 8}),
        "148 small": lambda: whole_step("148 tensors of 256", [(256,)] * 148, {fused_sgd: 8}),
        "148 small latent": lambda: whole_step("148 tensors of 256, latent", [(256,)] * 148, {}, memory=True),
        "62 small, paths": paths,
        "offloaded shards": offloaded,
        "PARQ": parq_row,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some of the cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bench/step_cuda.py")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="torch._inductor")
    if arguments.device == "cuda":
        import step_cuda

        step_cuda.main(arguments.json, arguments.only)
        return
    unknown = set(arguments.only or ()) - set(cases())
    if unknown:
        parser.error(f"--only {sorted(unknown)}: the cases are {list(cases())}")
    rows: list[dict[str, Any]] = []
    for name, case in cases().items():
        if arguments.only is None or name in arguments.only:
            print(f"{name} ...", flush=True)
            rows += case()
    report(rows, arguments.json, arguments.threads)


if __name__ == "__main__":
    main()
