"""Products with packed ±1 weights against torch's fp32, bf16 and int8 layers.

    python bench/gemm.py [--json FILE] [--threads N ...] [--min-time SECONDS]
                         [--only linear|groups|rotated|conv|sweep|mlp|models|llama.cpp|litespark]
    python bench/gemm.py --device cuda [--json FILE] [--min-time SECONDS] [--only dispatch|wgmma]

Peers are torch.nn.Linear in fp32 and bf16, and dynamically quantised int8 with the onednn engine (the default engine is
several times slower), and the libraries of bench/peers.py. Every product, ours and theirs, is checked against float64
before it is timed. bench/targets.py has the targets of each kind of processor, for one thread; with --threads 1 2 each
case has a row of its own speed with two threads over that with one, too.

On processors with AMX, which have two modes (bench/amx_gate.py), each row says in which it was measured.
"""

import argparse
import copy
import functools
import math
import random
import statistics
import warnings
from collections.abc import Callable

import common
import gemm_cuda
import packed_models
import peers
import scaling
import targets
import torch
from torch import Tensor, nn

import quantopt.nn as qnn
from quantopt.ops.weights import pack_signs

PEER_ERRORS = {"torch int8": 3e-2, "torch bf16": 1e-2, "torch fp32": 1e-5}  # relative, from rounding


def int8_linear(linear: nn.Linear) -> nn.Module:
    """The layer with dynamically quantised int8 activations, engine onednn."""
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    return model[0]


def check(layer: qnn.BinaryLinear | qnn.BinaryConv2d, x: Tensor) -> None:
    """Stops if the layer is wrong: within rounding of float64 (int8: within that of x, and of scales of groups)."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, qnn.BinaryConv2d):
        expected = nn.functional.conv2d(x.double(), layer.weight.double(), bias, padding=layer.padding)
    else:
        expected = nn.functional.linear(x.double(), layer.weight.double(), bias)
    tolerance = 1e-5 if x.dtype == torch.float32 else 4e-3  # of y, which has the type of x
    if layer.compute == "int8":
        tolerance = 2.5e-2 if layer.group_size else 2e-2
    error = float((layer(x).double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise SystemExit(f"{layer}, x in {x.dtype}: relative error {error}")


def check_peers(functions: dict[str, Callable[[], object]], expected: Tensor) -> None:
    """Stops if a peer does not compute what it is timed for."""
    for name, bound in PEER_ERRORS.items():
        if name in functions:
            error = float((functions[name]().double() - expected).norm() / expected.norm())  # type: ignore[attr-defined]
            if not error <= bound:
                raise SystemExit(f"{name}: relative error {error}: no peer")


def products(size: int, rows: int, min_time: float) -> list[dict[str, object]]:
    """One size x size layer, its weights hot."""
    linear = nn.Linear(size, size)
    x = torch.randn(rows, size)
    exact, rough = (qnn.BinaryLinear.from_linear(linear, compute=c) for c in ("exact", "int8"))
    half, short = copy.deepcopy(linear).bfloat16(), x.bfloat16()
    for layer, value in ((exact, x), (exact, short), (rough, x)):
        check(layer, value)
    quantised = int8_linear(linear)
    functions: dict[str, Callable[[], object]] = {
        "exact": lambda: exact(x),
        "exact, bf16 x": lambda: exact(short),
        "int8": lambda: rough(x),
        "torch int8": lambda: quantised(x),
        "torch bf16": lambda: half(short),
        "torch fp32": lambda: linear(x),
    }
    check_peers(functions, nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double()))
    seconds = common.compare_products(functions, min_time=min_time)
    result = []
    for mode in ("int8", "exact"):
        for peer in ("torch int8", "torch bf16", "torch fp32"):
            ours = "exact, bf16 x" if mode == "exact" and peer == "torch bf16" else mode
            target = targets.of(f"M={rows} {ours}", peer, size)
            case = f"M={rows} {size}x{size} {ours}"
            result.append(common.row(case, peer, seconds[ours], seconds[peer], target))
    return result


def grouped(size: int, rows: int, min_time: float, group: int = 64) -> list[dict[str, object]]:
    """One size x size layer with a scale for each ``group`` weights of a row, where they divide it."""
    if size % group:
        return []
    linear, x = nn.Linear(size, size), torch.randn(rows, size)
    short = x.bfloat16()
    exact, rough = (
        qnn.BinaryLinear(size, size, scale="group", group_size=group, compute=c) for c in ("exact", "int8")
    )
    scale = linear.weight.abs().unflatten(1, (-1, group)).mean(2)
    for layer in (exact, rough):
        layer.set_weights(pack_signs(linear.weight), scale, linear.bias)
    for layer, value in ((exact, x), (exact, short), (rough, x)):
        check(layer, value)
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    half = linear.bfloat16()
    functions: dict[str, Callable[[], object]] = {
        "int8": lambda: rough(x),
        "exact, bf16 x": lambda: exact(short),
        "exact": lambda: exact(x),
        "torch bf16": lambda: half(short),
    }
    check_peers(functions, expected)
    seconds = common.compare_products(functions, min_time=min_time)
    result, peer = [], "torch bf16"
    for mode in ("int8", "exact, bf16 x", "exact"):
        target = targets.of(f"M={rows}, scales of {group}, {mode}", peer, size)
        case = f"M={rows} {size}x{size}, scales of {group}, {mode}"
        result.append(common.row(case, peer, seconds[mode], seconds[peer], target))
    return result


def rotated(size: int, min_time: float, megabytes: int = 300) -> list[dict[str, object]]:
    """One row of x and as many layers, in turns, as fill ``megabytes``: the weights come from memory."""
    x = torch.randn(1, size)
    short = x.bfloat16()
    linear = nn.Linear(size, size)
    packed, rough = (qnn.BinaryLinear.from_linear(linear, compute=c) for c in ("exact", "int8"))
    for layer in (packed, rough):
        check(layer, x)
    kinds: dict[str, tuple[Callable[[nn.Linear], nn.Module], int, Tensor]] = {  # bytes of a weight
        "torch int8": (int8_linear, 1, x),
        "torch bf16": (nn.Linear.bfloat16, 2, short),
        "torch fp32": (lambda layer: layer, 4, x),
    }
    one_each: dict[str, Callable[[], object]] = {
        kind: functools.partial(make(copy.deepcopy(linear)), value)
        for kind, (make, _, value) in kinds.items()
    }
    check_peers(one_each, nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double()))

    def turns(make: Callable[[], nn.Module], bytes_each: int, value: Tensor) -> Callable[[], object]:
        layers = [make() for _ in range(-(-megabytes * 10**6 // bytes_each))]
        position = [0]

        def call() -> object:
            position[0] = (position[0] + 1) % len(layers)
            return layers[position[0]](value)

        return call

    weights = size * size
    functions = {
        "exact": turns(lambda: copy.deepcopy(packed), weights // 8, x),
        "int8": turns(lambda: copy.deepcopy(rough), weights // 8, x),
        **{
            kind: turns(lambda make=make: make(nn.Linear(size, size)), weights * each, value)  # type: ignore[misc]
            for kind, (make, each, value) in kinds.items()
        },
    }
    seconds = common.compare_products(functions, min_time=min_time)
    case = f"M=1 {size}x{size}, weights from memory,"
    rows = [
        common.row(
            f"{case} int8", p, seconds["int8"], seconds[p], targets.of("weights from memory, int8", p, size)
        )
        for p in kinds
    ]
    return [*rows, common.row(f"{case} exact", "torch fp32", seconds["exact"], seconds["torch fp32"])]


def convolution(channels: int, width: int, min_time: float) -> list[dict[str, object]]:
    """``channels`` to as many, 3x3, on 8 square images, all channels last."""
    conv = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(8, channels, width, width).to(memory_format=torch.channels_last)
    exact, rough = (qnn.BinaryConv2d.from_conv2d(conv, compute=c) for c in ("exact", "int8"))
    grouped = qnn.BinaryConv2d.like(conv, scale="group", group_size=64)
    grouped.set_weights(exact.bits, torch.rand(grouped.scale.shape) / 16, conv.bias)
    half, short = copy.deepcopy(conv).bfloat16(), x.bfloat16()
    for layer, value in ((exact, x), (rough, x), (rough, short), (grouped, x)):
        check(layer, value)
    functions: dict[str, Callable[[], object]] = {
        "int8": lambda: rough(x),
        "int8, bf16 x": lambda: rough(short),
        "exact": lambda: exact(x),
        "exact, scales of 64": lambda: grouped(x),
        "torch bf16": lambda: half(short),
        "torch fp32": lambda: conv(x),
    }
    expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    check_peers(functions, expected)
    seconds = common.compare_products(functions, min_time=min_time)
    case = f"conv {channels}x{channels}x3x3 on 8x{width}x{width},"
    pairs = (
        ("int8", "torch bf16"),
        ("int8, bf16 x", "torch bf16"),
        ("int8", "torch fp32"),
        ("exact", "torch fp32"),
        ("exact, scales of 64", "torch fp32"),
    )
    return [
        common.row(f"{case} {c}", p, seconds[c], seconds[p], targets.of(f"{case} {c}", p)) for c, p in pairs
    ]


def sweep(min_time: float, shapes: int = 200, seed: int = 0) -> list[dict[str, object]]:
    """Random layers: M from 1 to 512, N and K from 16 to 8192, N K up to 2^24, all log-uniform; int8 against the better
    of torch's int8 and bf16."""
    generator = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return round(2 ** generator.uniform(math.log2(low), math.log2(high)))

    results = []
    while len(results) < shapes:
        rows, outputs, inputs = draw(1, 512), draw(16, 8192), draw(16, 8192)
        if outputs * inputs > 2**24:
            continue
        linear, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
        packed = qnn.BinaryLinear.from_linear(linear, compute="int8")
        check(packed, x)
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        quantised = int8_linear(copy.deepcopy(linear))
        half, short = linear.bfloat16(), x.bfloat16()
        functions: dict[str, Callable[[], object]] = {
            "int8": lambda p=packed, x=x: p(x),  # type: ignore[misc]
            "torch int8": lambda q=quantised, x=x: q(x),  # type: ignore[misc]
            "torch bf16": lambda h=half, x=short: h(x),  # type: ignore[misc]
        }
        check_peers(functions, expected)
        seconds = common.compare_products(functions, min_time=min_time / 10, repeat=5)
        shape = f"M={rows} N={outputs} K={inputs}"
        peer = min(("torch int8", "torch bf16"), key=seconds.__getitem__)
        results.append(common.row(shape, peer, seconds["int8"], seconds[peer]))
    ratios = [float(r["ratio"]) for r in results]
    worst = dict(min(results, key=lambda r: float(r["ratio"])))
    case, either = f"sweep of {shapes} shapes, int8,", "the better of torch int8 and bf16"
    least, mean = (targets.of(f"sweep, {which}", either) for which in ("the least", "geometric mean"))
    ratio = statistics.geometric_mean(ratios)
    worst |= {"case": f"{case} the least: {worst['case']}", "target": least, "of_sweep": True}
    worst["ok"] = None if least is None else min(ratios) >= least
    ok = None if mean is None else ratio >= mean
    of_all = {"case": f"{case} geometric mean", "peer": either, "ratio": ratio, "target": mean, "ok": ok}
    return [worst, {**of_all, "shapes": results}]


def mlp(size: int, depth: int, rows: int, min_time: float) -> list[dict[str, object]]:
    """Layers of one width with ReLU between, in full precision and packed."""
    model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(size, size), nn.ReLU())])
    x = torch.randn(rows, size)
    packed = {
        c: nn.Sequential(
            *[qnn.BinaryLinear.from_linear(m, c) if isinstance(m, nn.Linear) else m for m in model]
        )
        for c in ("exact", "int8")
    }
    for layers in packed.values():
        for layer in layers:
            if isinstance(layer, qnn.BinaryLinear):
                check(layer, x)
    functions: dict[str, Callable[[], object]] = {c: (lambda p=p: p(x)) for c, p in packed.items()}
    functions["torch fp32"] = lambda: model(x)
    seconds = common.compare_products(functions, min_time=min_time)
    return [
        common.row(
            f"mlp {depth} x {size}, batch {rows}, {c}",
            "torch fp32",
            seconds[c],
            seconds["torch fp32"],
            targets.of(f"mlp, {c}", "torch fp32", size),
        )
        for c in packed
    ]


# Parts of the table, in its order.
PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, object]]]] = {
    "linear": lambda a: [r for m in (1, 2, 4, 8, 16, 32, 128, 512) for r in products(a.size, m, a.min_time)],
    "groups": lambda a: [
        r for m in (1, 8, 128) for group in (64, 128) for r in grouped(a.size, m, a.min_time, group)
    ],
    "rotated": lambda a: rotated(a.size, a.min_time),
    "conv": lambda a: [
        r
        for channels, width in ((256, 16), (512, 16), (64, 32))
        for r in convolution(channels, width, a.min_time)
    ],
    "sweep": lambda a: sweep(a.min_time),
    "mlp": lambda a: mlp(a.size, 4, 1, a.min_time),
    "models": lambda a: packed_models.rows(a.min_time),
    "llama.cpp": lambda a: [r for m in (1, 128) for r in peers.llama_cpp(a.size, m, a.min_time)],
    "litespark": lambda a: [r for m in (1, 128) for r in peers.litespark(a.size, m, a.min_time)],
}
CUDA_PARTS = ("dispatch", "wgmma")  # of gemm_cuda


def main() -> None:
    parser = common.parser("Products with packed weights against torch's layers.", several=True)
    parser.add_argument("--size", type=int, default=4096, help="in and out features (default: 4096)")
    parser.add_argument("--only", choices=[*PARTS, *CUDA_PARTS], help="one part")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    if (arguments.only in CUDA_PARTS) != (arguments.only is not None and arguments.device == "cuda"):
        parser.error(f"--only: {', '.join(CUDA_PARTS)} with --device cuda, the others without")
    if arguments.device == "cuda":
        gemm_cuda.main(arguments)
        return
    rows: list[dict[str, object]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with torch.inference_mode():
            for name, part in PARTS.items():
                if arguments.only in (None, name):
                    rows += [{**row, "threads": threads} for row in part(arguments)]
    common.report([*rows, *scaling.rows(rows)], arguments.json, max(arguments.threads))


if __name__ == "__main__":
    main()
