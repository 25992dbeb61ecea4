"""Products with packed ±1 weights on a GPU, against torch and GemLite: `python bench/gemm.py --device cuda`.

Every time is that of a CUDA graph of calls in a row, each with weights of its own, so many that they do not fit the
second-level cache; x is random, the contenders take turns, and medians are compared. Every product is checked against
float64 before it is timed. `--only dispatch` times the kernels by name: csrc/cuda/binary_dispatch.h takes its
thresholds from there. `--only wgmma` times the kernel for Hopper.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from quantopt import backends
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs, unpack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

DEVICE = "cuda"
SQUARE = (8192, 8192)
MODES = ("exact", "int8")
# (rows of x, (N, K), mode) -> times faster than torch's bf16 layer.
TARGETS: dict[tuple[int, tuple[int, int], str], float] = {
    **{
        (m, shape, mode): target
        for m, targets in ((1, (3, 8, 12)), (16, (2.5, 6, 9)))
        for shape, target in zip(((4096, 4096), SQUARE, (28672, 8192)), targets, strict=True)
        for mode in MODES
    },
    **{(64, SQUARE, mode): 2.5 for mode in MODES},
    **{(m, SQUARE, "int8"): target for m, target in ((256, 1.2), (1024, 1.5), (4096, 1.6), (16384, 1.6))},
    **{(m, SQUARE, "exact"): 0.95 for m in (256, 1024, 4096, 16384)},
}
CASES = list(dict.fromkeys((m, shape) for m, shape, _ in TARGETS))
BANDWIDTH = 0.6  # of packed weights, one row, 28672 x 8192, of what a copy moves
TRITON = 0.8  # of our CUDA kernel's speed

Function = Callable[[int], Tensor]  # the product with the i-th copy of the weights


def second_level_cache() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


class Product:
    """y = x W^T for random x and W, with copies of the weights in every contender's form."""

    def __init__(self, m: int, outputs: int, inputs: int) -> None:
        self.x = torch.randn(m, inputs, device=DEVICE).bfloat16()
        self.outputs, self.inputs = outputs, inputs
        self.bits = pack_signs(torch.randn(outputs, inputs, device=DEVICE))
        self.scale = torch.rand(outputs, device=DEVICE) + 0.5
        self.weight = PackedWeight(self.bits, self.scale, None, inputs, [1])
        self.cache = second_level_cache()

    def copies(self, tensor: Tensor) -> list[Tensor]:
        """As many as are three times the second-level cache, at least two."""
        count = max(2, -(-3 * self.cache // (tensor.numel() * tensor.element_size())))
        return [tensor, *(tensor.clone() for _ in range(count - 1))]

    def check(self, name: str, y: Tensor, int8: bool) -> None:
        """Stops if a result is wrong; few rows are looked at, all outputs of each."""
        rows = torch.linspace(0, len(self.x) - 1, min(len(self.x), 40), device=DEVICE).long()
        weight = reference.dense_weight(self.weight, torch.float64)
        expected = self.x[rows].double() @ weight.T
        error = float((y[rows].double() - expected).norm() / expected.norm())
        if not error <= (2e-2 if int8 else 5e-3):  # y is bfloat16
            raise SystemExit(f"{name}: relative error {error}")

    def ours(self, mode: str, kernel: str = "", shape: int = -1, splits: int = 1) -> tuple[int, Function]:
        bits = self.copies(self.bits)
        tiles = [binary_tiles(b, self.inputs) for b in bits]  # they serve the bits they come from
        count = len(bits)
        head = (None, self.inputs, [1])

        def call(i: int) -> Tensor:
            if kernel:
                y: Tensor = torch.ops.quantopt_by_kernel.binary_linear_by(
                    self.x, bits[i], self.scale, *head, kernel, shape, splits, 0, mode, tiles[i]
                )
                return y
            y = torch.ops.quantopt.binary_linear(self.x, bits[i], self.scale, *head, 0, mode, tiles[i])
            return y

        return count, call

    def triton(self, mode: str) -> tuple[int, Function]:
        from quantopt.kernels import binary_linear as kernels

        bits = self.copies(self.bits)
        return len(bits), lambda i: kernels.binary_linear(
            self.x, self.weight._replace(bits=bits[i]), mode, "none"
        )

    def torch_bf16(self) -> tuple[int, Function]:
        weight = reference.dense_weight(self.weight, torch.float32).bfloat16()
        weights = self.copies(weight)
        return len(weights), lambda i: F.linear(self.x, weights[i])

    def torch_int8(self) -> tuple[int, Function]:
        """What torch offers: rows rounded by its operators, its int8 product (which wants 17 rows), scales."""
        weights = self.copies(unpack_signs(self.bits, self.inputs, torch.int8))
        padded = F.pad(self.x, (0, 0, 0, max(0, 17 - len(self.x))))

        def call(i: int) -> Tensor:
            s = padded.abs().amax(1, keepdim=True).float() / 127
            q = (padded / s).round().clamp(-127, 127).to(torch.int8)
            sums = torch._int_mm(q, weights[i].t())
            return (sums * s * self.scale).bfloat16()[: len(self.x)]

        return len(weights), call

    def gemlite(self, helper: str) -> tuple[int, Function]:
        """A GemLite layer with the same one-bit weights, W = (q - 0.5) * 2 a with q in {0, 1}."""
        module: Any = importlib.import_module("gemlite.helper")
        make = getattr(module, helper)(device="cuda:0")
        codes = (unpack_signs(self.bits, self.inputs, torch.int8) > 0).to(torch.uint8)
        scales = (2 * self.scale)[:, None].half()
        count = max(2, -(-3 * self.cache // self.bits.numel()))
        layers = [
            make.from_weights(codes, scales, torch.full_like(scales, 0.5), 1, self.inputs)
            for _ in range(count)
        ]
        x = self.x.half()
        return count, lambda i: layers[i](x)


def graph_of(count: int, function: Function) -> tuple[int, torch.cuda.CUDAGraph]:
    """A graph of calls with one copy of the weights after the other, at least eight; the number of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # before the capture: Triton compiles at the first call
        for i in range(min(3, count)):
            function(i)
    torch.cuda.current_stream().wait_stream(stream)
    calls = max(8, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(i % count)
    return calls, graph


class Left(NamedTuple):
    """Why a contender has no time."""

    status: str  # "failed" or "not installed"
    why: str


def failure(error: BaseException) -> Left:
    return Left("failed", f"{type(error).__name__}: {error}")


def compare(
    contenders: dict[str, tuple[int, Function]], min_time: float, left: dict[str, Left] | None = None
) -> dict[str, float]:
    """Median seconds of one call of each, in turns. One that cannot be captured goes to ``left``, if there is one."""
    graphs = {}
    for name, (count, function) in contenders.items():
        try:
            graphs[name] = graph_of(count, function)
        except Exception as error:
            if left is None:
                raise
            left[name] = failure(error)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    spent, rounds = 0.0, 0
    while rounds < 10 or (spent < min_time * len(graphs) and rounds < 200):
        for name, (count, graph) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the clocks and the cache are then those of this contender
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) * 1e-3
            spent += 2 * seconds
            times[name].append(seconds / count)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def contenders(product: Product) -> tuple[dict[str, tuple[int, Function]], dict[str, Left]]:
    """Those that run here and are right, and what became of the others."""
    makers: dict[str, Callable[[], tuple[int, Function]]] = {
        "int8": lambda: product.ours("int8"),
        "exact": lambda: product.ours("exact"),
        "Triton int8": lambda: product.triton("int8"),
        "Triton exact": lambda: product.triton("exact"),
        "torch bf16": product.torch_bf16,
        "torch int8": product.torch_int8,
    }
    makers["GemLite A16W1"] = lambda: product.gemlite("A16Wn")
    makers["GemLite A8W1"] = lambda: product.gemlite("A8Wn_dynamic")
    result, left = {}, {}
    for name, make in makers.items():
        if name.startswith("GemLite") and importlib.util.find_spec("gemlite") is None:
            left[name] = Left("not installed", "pip install gemlite")
            continue
        try:
            count, function = make()
            product.check(name, function(0), "int8" in name or "A8" in name)
            torch.cuda.synchronize()
        except (Exception, SystemExit) as error:
            left[name] = failure(error)
            continue
        result[name] = (count, function)
    return result, left


def products(min_time: float) -> Iterator[dict[str, Any]]:
    copy = copy_bandwidth()
    for m, shape in CASES:
        product = Product(m, *shape)
        running, left = contenders(product)
        seconds = compare(running, min_time, left)
        yield from rows_of(m, shape, seconds, left, copy)
        del product, running
        torch.cuda.empty_cache()


def rows_of(
    m: int, shape: tuple[int, int], seconds: Mapping[str, float], left: Mapping[str, Left], copy: float
) -> Iterator[dict[str, Any]]:
    """The rows of one product, from the seconds of each contender; a row for each that has none too."""
    outputs, inputs = shape
    case = f"M={m} {outputs}x{inputs}"

    def row(ours: str, theirs: str, target: float | None = None, peer: str = "") -> dict[str, Any]:
        for name in (ours, theirs):
            if name in left:
                return common.missing(f"{case} {ours}", peer or theirs, *left[name], target)
        return common.row(f"{case} {ours}", peer or theirs, seconds[ours], seconds[theirs], target)

    for mode in ("int8", "exact"):
        yield row(mode, "torch bf16", TARGETS.get((m, shape, mode)))
        yield row(f"Triton {mode}", mode, TRITON, f"our CUDA {mode}")
    yield row("int8", "torch int8")
    least = 1.5 if m <= 16 else 1.0
    for peer, mode in (("GemLite A16W1", "exact"), ("GemLite A8W1", "int8")):
        yield row(mode, peer, least)
    if m != 1:
        return
    target = BANDWIDTH if outputs == 28672 else None
    for mode in ("int8", "exact"):
        name, peer = f"{case} {mode}, bytes of weights per second", f"copy, {copy / 1e12:.2f} TB/s"
        if mode in left:
            yield common.missing(name, peer, *left[mode], target)
            continue
        share = outputs * inputs / 8 / seconds[mode] / copy
        ok = None if target is None else share >= target
        yield {"case": name, "peer": peer, "ratio": share, "target": target, "ok": ok}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.randint(0, 255, [1 << 31], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times[2:])


def dispatch(min_time: float) -> Iterator[dict[str, Any]]:
    """Every kernel by name over the number of rows: where they cross."""
    for mode, (outputs, inputs) in ((mode, shape) for mode in MODES for shape in ((4096, 4096), SQUARE)):
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024):
            product = Product(m, outputs, inputs)
            chosen = {"as dispatched": product.ours(mode)}
            if m == 1 and mode == "int8":
                chosen["gemv"] = product.ours(mode, "gemv")
            for shape, tokens in enumerate((8, 8, 16, 32, 64)):
                if tokens // 2 < m <= tokens or (tokens == 64 and m > 64):
                    for splits in (1, 2, 4, 8) if m <= 64 else (1,):
                        chosen[f"mma, shape {shape}, splits {splits}"] = product.ours(
                            mode, "mma", shape, splits
                        )
            if m >= 32:
                chosen["cublas"] = product.ours(mode, "cublas")
                if hopper():
                    chosen["wgmma"] = product.ours(mode, "wgmma")
            for name, (_, function) in chosen.items():
                product.check(name, function(0), mode == "int8")
            seconds = compare(chosen, min_time)
            for name, each in seconds.items():
                if name != "as dispatched":
                    yield common.row(
                        f"M={m} {outputs}x{inputs} {mode}, {name}",
                        "as dispatched",
                        each,
                        seconds["as dispatched"],
                    )
            del product
            torch.cuda.empty_cache()


def hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


# Rows of x -> times faster than torch's bf16 layer that wgmma is to be.
WGMMA_INT8 = {64: 3.0, 128: 1.8, 256: 1.3, 1024: 1.6, 4096: 1.75, 16384: 1.75}
WGMMA_EXACT = {64: None, 128: None, 256: None, 1024: 1.0, 4096: 1.0, 16384: 1.0}


def wgmma(min_time: float) -> Iterator[dict[str, Any]]:
    """Our kernel for Hopper against torch's bf16 layer and our other kernels: where the table is to name it."""
    if not hopper():
        raise SystemExit("--only wgmma: the device is not of compute capability 9.0")
    outputs, inputs = SQUARE
    for m in WGMMA_INT8:
        product = Product(m, outputs, inputs)
        chosen = {"torch bf16": product.torch_bf16()}
        others = ("cublas", *(("mma",) if m <= 256 else ()))
        for mode in MODES:
            for kernel in ("wgmma", *others):
                chosen[f"{kernel} {mode}"] = product.ours(mode, kernel)
        for name, (_, function) in chosen.items():
            product.check(name, function(0), "int8" in name)
        seconds = compare(chosen, min_time)
        for mode, targets in (("int8", WGMMA_INT8), ("exact", WGMMA_EXACT)):
            case, ours = f"M={m} {outputs}x{inputs} wgmma {mode}", seconds[f"wgmma {mode}"]
            yield common.row(case, "torch bf16", ours, seconds["torch bf16"], targets[m])
            for kernel in others:
                yield common.row(case, f"our {kernel}", ours, seconds[f"{kernel} {mode}"], 1.0)
        del product, chosen
        torch.cuda.empty_cache()


def main(arguments: argparse.Namespace) -> None:
    """``arguments``: json, min_time, only."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device")
    choice = backends.choose("binary_linear", torch.device("cuda", 0), torch.bfloat16)
    if choice.name != "cuda":
        raise SystemExit(f"the CUDA kernels do not run here: {choice.why}")
    torch.manual_seed(0)
    part = {"dispatch": dispatch, "wgmma": wgmma}.get(arguments.only, products)
    with torch.inference_mode():
        rows = []
        for row in part(arguments.min_time):
            rows.append(row)
            print(json.dumps(row), flush=True)  # stays in the log if the time runs out
    path = arguments.json or common.results_path(arguments.only or "gemm")
    common.report(rows, path, torch.get_num_threads(), device=DEVICE)
    failed = [r for r in rows if r.get("status") == "failed"]
    short = [r for r in rows if r["ok"] is False and r not in failed]
    summary = {"rows": len(rows), "fall short": len(short), "failed": len(failed), "written to": path}
    print(json.dumps(summary))
    if failed:
        raise SystemExit(f"{failed[0]['case']}, {failed[0]['peer']}: {failed[0]['why']}")
