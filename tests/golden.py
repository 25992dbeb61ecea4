"""Checksums of a fixed set of steps and products: a change that is not meant to change bits can show that it did not.

    python tests/golden.py record     writes tests/data/golden.json
    python tests/golden.py check      compares with it, as tests/test_golden.py does

The inputs are whole numbers of a fixed sequence, divided by powers of two: the same with every version of torch.
A step has the same bits under every instruction set; a product may have others under each.
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantopt

FILE = Path(__file__).parent / "data" / "golden.json"
ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni")
SHAPES = ((5, 13, 3), (129,), (0, 4), (64, 32), (1,), (7, 1031))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Digests = dict[str, str]


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 2^-20 in [-2, 2), by a linear congruential generator: one for each index."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64) + 7919 * seed
    for _ in range(3):
        i = (i * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
        i = i ^ (i >> 29)
    return ((i >> 20) % (1 << 22) - (1 << 21)).double().div(1 << 20).to(dtype).reshape(shape)


def digest(tensors: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


# ---- optimizers --------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "askew": quantopt.AskewSGD,
    "askew-gradient": lambda p, **k: quantopt.AskewSGD(p, constrain="gradient", **k),
    "askew-memory": lambda p, **k: quantopt.AskewSGD(p, memory=True, **k),
    "askew-memory-limited": lambda p, **k: quantopt.AskewSGD(p, memory=True, rate=0.1, **k),
    "askew-adam": quantopt.AskewAdam,
    "askew-adam-gradient": lambda p, **k: quantopt.AskewAdam(p, constrain="gradient", **k),
    "askew-adam-memory": lambda p, **k: quantopt.AskewAdam(p, memory=True, **k),
    "stam": quantopt.STAM,
    "stam-pulled": lambda p, **k: quantopt.STAM(p, lam=0.3, **k),
    "stam-splitting": lambda p, **k: quantopt.STAM(p, form="splitting", **k),
    "binaryconnect": quantopt.BinaryConnect,
    "binaryrelax": quantopt.BinaryRelax,
    "proxquant": quantopt.ProxQuant,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "plain": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "maximize": True},
    "decoupled": {"decoupled_weight_decay": True},
    "bf16-momentum": {"momentum_dtype": "bfloat16"},
}


def optimizer_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name of the case, of the optimizer, options of its quantised group and of itself)."""
    for name in OPTIMIZERS:
        adam = "adam" in name
        for bits, scale in (
            (1, "tensor"),
            (1, "channel"),
            (2, "group"),
            (3, "channel"),
            ("ternary", "channel"),
            (4, "none"),
            ("17-level", "tensor"),
        ):
            yield f"{name} {bits} {scale}", name, dict(bits=bits, scale=scale)
        for variant, options in VARIANTS.items():
            if variant and not (adam and variant in ("plain", "nesterov")):
                yield f"{name} {variant}", name, dict(bits=2, scale="tensor", **options)
        for dtype, rounding in (
            ("bf16", "master"),
            ("bf16", "nearest"),
            ("bf16", "stochastic"),
            ("fp16", "master"),
        ):
            for momentum_dtype in ("float32", "bfloat16"):
                options = dict(dtype=dtype, rounding=rounding, momentum_dtype=momentum_dtype)
                yield (
                    f"{name} {dtype} {rounding} {momentum_dtype}",
                    name,
                    dict(bits=1, scale="channel", **options),
                )
    yield "stam-splitting channel-mean", "stam-splitting", dict(bits=1, scale="channel-mean")


def step(name: str, options: dict[str, Any], backend: str = "auto") -> list[Tensor]:
    """Weights and state after seven steps of an annealed training."""
    options = dict(options)
    dtype = DTYPES[options.pop("dtype", "fp32")]
    group = {key: options.pop(key) for key in ("bits", "scale")} | {"group_size": 7}
    quantised = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    plain = [nn.Parameter(numbers((17,), 50, dtype))]
    groups = [{"params": quantised, **group}, {"params": plain, "bits": 0}]
    opt = OPTIMIZERS[name](groups, lr=0.125, weight_decay=0.0625, backend=backend, **options)
    anneal = quantopt.Anneal(opt, 8)
    for k in range(7):
        for i, p in enumerate([*quantised, *plain]):
            p.grad = numbers(tuple(p.shape), 100 * (k + 1) + i, dtype)
        opt.step()
        anneal.step()
    tensors = []
    for p in [*quantised, *plain]:
        state = opt.state[p]
        tensors += [p, *(state[key] for key in sorted(state))]
    return tensors


# ---- products ----------------------------------------------------------------------------------------------------


def product_cases(isa: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for compute, rows, (outputs, inputs) in itertools.product(
        ("exact", "bf16", "int8"), (1, 3, 40), ((40, 100), (33, 513))
    ):
        for planes, group_size, dtype, activation in (
            (1, 0, "fp32", "none"), (2, 0, "bf16", "relu"), (1, 32, "fp16", "none"), (4, 64, "fp32", "none"),
        ):  # fmt: skip
            w = numbers((planes, outputs, inputs), 3)
            bits = quantopt.pack_signs(w if planes > 1 else w[0])
            scale = numbers((outputs, -(-inputs // group_size)) if group_size else (outputs,), 4).abs()
            x, bias = numbers((rows, inputs), 5, DTYPES[dtype]), numbers((outputs,), 6)
            name = f"linear {compute} {rows}x{inputs}x{outputs} {planes} {group_size} {dtype} {activation}"
            yield (
                name,
                lambda x=x, bits=bits, scale=scale, bias=bias, inputs=inputs, compute=compute, group=group_size,
                activation=activation: quantopt.binary_linear(
                    x, bits, scale, bias, in_features=inputs, compute=compute, group_size=group, activation=activation
                ),
            )  # fmt: skip
    for compute, (kernel, stride, padding, groups), planes in itertools.product(
        ("exact", "bf16", "int8"), ((3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 0, 2)), (1, 2)
    ):
        if isa == "portable" and kernel > 1 and compute != "int8":
            continue  # ATen's convolution, whose order of the sums depends on the processor
        w = numbers((planes, 64, 48 // groups * kernel * kernel), 7)
        bits, scale = quantopt.pack_signs(w if planes > 1 else w[0]), numbers((64,), 8).abs()
        form = dict(kernel_size=kernel, stride=stride, padding=padding, groups=groups, compute=compute)
        for batch, size in ((1, 7), (3, 10)):
            x = numbers((batch, 48, size, size), 9)
            yield (
                f"conv {form} {planes} {batch}x{size}",
                lambda x=x, bits=bits, scale=scale, form=form: quantopt.binary_conv2d(x, bits, scale, **form),
            )


def forced(isa: str) -> None:
    os.environ["QUANTOPT_CPU_ISA"] = isa
    torch.ops.quantopt.read_cpu_isa()


def steps() -> Digests:
    """Of the steps under the instruction set that is forced now."""
    return {name: digest(step(optimizer, options)) for name, optimizer, options in optimizer_cases()
            if not _refused(optimizer, options)}  # fmt: skip


def _refused(optimizer: str, options: dict[str, Any]) -> bool:
    """Combinations that the optimizers do not take."""
    has_latent = optimizer.startswith(("stam", "binary")) or "memory" in optimizer
    return (options.get("nesterov", False) and options.get("momentum") == 0.0) or (
        options.get("decoupled_weight_decay", False) and has_latent
    )


def products(isa: str) -> Digests:
    """Of the products under the instruction set ``isa``, which is forced now."""
    return {name: digest([run()]) for name, run in product_cases(isa)}


def all_digests() -> dict[str, Digests]:
    """Of the steps, which are the same under every instruction set, and of the products under each."""
    found: dict[str, Digests] = {}
    for isa in ISAS:
        if not torch.ops.quantopt.cpu_isa_supported(isa):
            continue
        forced(isa)
        found[f"products {isa}"] = products(isa)
        found[f"steps {isa}"] = steps()
    forced("")
    return found


def main() -> None:
    torch.set_num_threads(2)
    found = all_digests()
    if sys.argv[1] == "record":
        FILE.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    known = json.loads(FILE.read_text())
    different = [
        (part, name) for part in found for name in known[part] if found[part].get(name) != known[part][name]
    ]
    for part, name in different:
        print(f"{part}: {name}")
    isas = [part for part in found if part.startswith("steps ")]
    for part in isas[1:]:
        for name in found[part]:
            if found[part][name] != found[isas[0]][name]:
                print(f"note: {name} differs between {isas[0]} and {part}")
    print(f"{sum(map(len, found.values()))} checksums, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
