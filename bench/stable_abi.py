"""What a port to torch's stable ABI would cost for each call and save in wheels: docs/stable-abi.md has what follows.

    python bench/stable_abi.py             calls, from Python and from C++, under a minute
    python bench/stable_abi.py --compile   also CPU seconds of the compilers, of the whole extension too

bench/stable_abi.cpp is compiled twice, into build/stable_abi: registered by TORCH_LIBRARY with at::Tensor ("full"), and
by STABLE_TORCH_LIBRARY with torch::stable::Tensor ("stable"), both around the kernels of the package in build/, which
`make env` leaves there. Prints the tables of docs/stable-abi.md and writes bench/results/stable-abi.json.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import quantopt
from quantopt import _extension
from quantopt.ops.step import hyper_tensor
from quantopt.packed_weight import PackedWeight
from quantopt.rules import StepRecord
from quantopt.train.environment import header

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/stable_abi"
RESULTS = ROOT / "bench/results/stable-abi.json"
SOURCE = ROOT / "bench/stable_abi.cpp"
TARGET = (2, 11)  # the oldest torch that the package runs with
SIDE = 64  # of the packed layer, for one row of x
COUNTS = (1, 64)  # of parameters in a step
ELEMENTS = 256  # of a parameter
CALLS = 20_000  # for each sample from C++
LEAK_CALLS = 200_000
LOOKS = 1000  # at a version counter in a call
FLAGS = ["-O2", "-g0", "-std=c++20", "-Wall", "-fvisibility=hidden", "-ffp-contract=off", "-fPIC"]


# ---- the libraries ----


def objects() -> list[Path]:
    """The torch-free kernels of the build of this torch, and the choice among them."""
    folders = [
        path for path in (ROOT / "build").glob("*/kernels") if f"torch{torch.__version__}" in str(path)
    ]
    if len(folders) != 1:
        sys.exit(f"{len(folders)} builds for torch {torch.__version__} in build/: run `make env` first")
    return [*folders[0].glob("*.o"), folders[0].parent / "csrc/cpu/isa.o"]


def isa_flags() -> list[str]:
    """A macro for each instruction set that the kernels were compiled for, as setup.py defines them."""
    isas = {path.name.split(".")[1] for path in objects() if path.name.count(".") == 2}
    return [f"-DQUANTOPT_HAVE_{isa.upper()}" for isa in sorted(isas)]


def compiled(source: Path, target: Path, flags: list[str]) -> float:
    """Compiles one file with torch's headers; the CPU seconds that it took."""
    includes = [f"-I{path}" for path in (str(ROOT / "csrc"), *include_paths())]
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *flags, *includes]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def library(kind: str, flags: list[str]) -> dict[str, Any]:
    """Builds and loads the library of a kind; its facts."""
    target = BUILD / f"{kind}.o"
    seconds = compiled(SOURCE, target, [*isa_flags(), *flags])
    shared = BUILD / f"{kind}.so"
    links = [f"-L{path}" for path in library_paths()]
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-shared", "-s", "-Wl,--gc-sections", str(target)]
    subprocess.run(
        [*command, *map(str, objects()), *links, "-ltorch_cpu", "-lc10", "-o", str(shared)], check=True
    )
    torch.ops.load_library(str(shared))
    return {"compile_cpu_seconds": seconds, "symbols": torch_symbols(shared)}


def torch_symbols(shared: Path) -> dict[str, int]:
    """How many symbols of torch the library takes: of its C++, which change from version to version, and of the C
    interface of the stable ABI."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(shared)], check=True, capture_output=True, text=True
    )
    names = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    interface = [name for name in names if re.match(r"(aoti_)?torch_\w+$", name)]
    inner = [name for name in names if re.search(r"\b(at|c10|torch|caffe2)::|^THP", name)]
    return {"c++": len(inner), "c": len(interface)}


# ---- calls ----


def layer() -> tuple[list[Any], PackedWeight]:
    """Arguments of binary_linear for one row and a small packed layer, and its weight."""
    torch.manual_seed(0)
    module = quantopt.nn.BinaryLinear(SIDE, SIDE, compute="exact")
    bits = torch.randint(0, 256, (SIDE, SIDE // 8), dtype=torch.uint8)
    module.set_weights(bits, torch.rand(SIDE), torch.randn(SIDE))
    module.eval()
    weight = module.packed
    bits, scale, bias, in_features, plane_weights, group_size, tiles = weight
    x = torch.randn(1, SIDE)
    return [x, bits, scale, bias, in_features, plane_weights, group_size, "exact", tiles, "none"], weight


def step_record(count: int) -> StepRecord:
    """A step of AskewSGD with a latent on small parameters, without momentum."""
    torch.manual_seed(0)

    def tensors(make: Callable[[int], Tensor] = torch.randn) -> list[Tensor]:
        return [make(ELEMENTS) for _ in range(count)]

    return StepRecord(
        rule="askew_memory",
        base="sgd",
        params=[torch.nn.Parameter(p) for p in tensors()],
        grads=tensors(),
        momentum_buffers=[],
        exp_avg_sqs=[],
        latents=tensors(),
        scales=[torch.ones(1) for _ in range(count)],
        latent_bounds=[],
        steps=[],
        hyper=hyper_tensor(lr=1e-3, epsilon=1.0, bound=2.0),
    )


def linear_calls() -> dict[str, Callable[[], object]]:
    """The calls of a small packed layer from Python, checked against each other."""
    arguments, weight = layer()
    full, stable = torch.ops.quantopt_full.linear.default, torch.ops.quantopt_stable.linear.default
    ours, direct = torch.ops.quantopt.binary_linear.default, _extension.binary_linear_direct
    expected = ours(*arguments)
    for name, function in {"full": full, "stable": stable}.items():
        torch.testing.assert_close(function(*arguments), expected, msg=f"{name}: another result")
    x = arguments[0]
    if direct is None or not torch.equal(direct(x, weight, "exact", "none"), expected):
        sys.exit("binary_linear_direct does not take the small layer")
    return {
        "full": lambda: full(*arguments),
        "stable": lambda: stable(*arguments),
        "operator": lambda: ours(*arguments),
        "direct": lambda: direct(x, weight, "exact", "none"),
    }


def step_calls(count: int) -> dict[str, Callable[[], object]]:
    """The calls of a step of lists from Python, checked against each other."""
    record = step_record(count)
    plan = _extension.StepPlan(record)
    lists = [list(map(torch.Tensor.detach, record.params)), record.grads, record.latents]
    copies = [[t.clone() for t in group] for group in lists]
    full, stable = torch.ops.quantopt_full.step.default, torch.ops.quantopt_stable.step.default
    hyper = torch.tensor([1e-3], dtype=torch.float64)
    full("signs", *lists, hyper)
    stable("signs", *copies, hyper)
    torch.testing.assert_close(copies, lists, rtol=0, atol=0)

    def with_plan() -> None:
        if not plan.valid(record.grads):
            sys.exit("the plan of the step is out of date")
        plan.step()

    return {
        "full": lambda: full("signs", *lists, hyper),
        "stable": lambda: stable("signs", *copies, hyper),
        "operator": lambda: torch.ops.quantopt.fused_step(*record),
        "plan": with_plan,
    }


def from_c() -> dict[str, float]:
    """Median seconds of a call through the dispatcher without Python, taking turns."""
    (x, bits, scale, bias, in_features, *_, tiles, _), _ = layer()
    names = {"full": "quantopt_full::linear", "stable": "quantopt_stable::linear"}
    names["operator"] = "quantopt::binary_linear"
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(9):
        for name, operator in names.items():
            total = torch.ops.quantopt_full.time_linear(
                operator, CALLS, x, bits, scale, bias, in_features, tiles
            )
            samples[name].append(total / CALLS)
    return {name: statistics.median(times) for name, times in samples.items()}


def version_ns(min_time: float) -> dict[str, float]:
    """Nanoseconds of a look at a version counter, from C++."""
    tensor = torch.zeros(1).add_(1)
    full, stable = torch.ops.quantopt_full.versions.default, torch.ops.quantopt_stable.versions.default
    if (full(tensor, LOOKS), stable(tensor, LOOKS)) != (LOOKS, LOOKS):
        sys.exit("a version counter is not what it is")
    calls = {"full": lambda: full(tensor, LOOKS), "stable": lambda: stable(tensor, LOOKS)}
    return {n: s * 1e9 / LOOKS for n, s in common.compare(calls, min_time=min_time).items()}


def leaked() -> dict[str, float]:
    """Bytes of memory that a call of each small product does not give back."""
    found = {}
    for kind in ("full", "stable"):
        function = linear_calls()[kind]
        for _ in range(1000):
            function()
        before = resident()
        for _ in range(LEAK_CALLS):
            function()
        found[kind] = (resident() - before) / LEAK_CALLS
    return found


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def errors() -> dict[str, str]:
    """The Python exception that a refused argument becomes."""
    arguments, _ = layer()
    arguments[7] = "unknown"
    found = {}
    for kind in ("full", "stable"):
        try:
            getattr(torch.ops, f"quantopt_{kind}").linear.default(*arguments)
        except Exception as error:  # which of them is the question
            found[kind] = type(error).__name__
    return found


# ---- the extension ----


def extension() -> dict[str, Any]:
    """Size of the compiled extension, and the symbols of torch that it takes."""
    files = list((ROOT / "quantopt").glob("_C*.so"))
    if len(files) != 1:
        sys.exit(f"{len(files)} files quantopt/_C*.so: run `make env` first")
    return {"bytes": files[0].stat().st_size, "symbols": torch_symbols(files[0])}


def extension_seconds() -> dict[str, float]:
    """CPU seconds of compiling each file of the extension that includes torch's headers, for the CPU."""
    generated = next(path for path in (ROOT / "build").glob(f"*torch{torch.__version__}*/generated"))
    python = f"-I{__import__('sysconfig').get_paths()['include']}"
    flags = [*isa_flags(), f"-I{generated}", python, "-fopenmp", "-DTORCH_EXTENSION_NAME=_C"]
    files = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    with_torch = [
        path
        for path in files
        if re.search(r"#include <(ATen|c10|torch)|_ops.h|_arguments.h", path.read_text())
    ]
    return {str(path.relative_to(ROOT)): compiled(path, BUILD / "unused.o", flags) for path in with_torch}


# ---- the table ----


def measured(min_time: float) -> list[dict[str, Any]]:
    """A row for each operator: nanoseconds of a call by how it is called; ``ported_ns`` as in :func:`table`."""
    rows = []
    cases = {f"packed layer, 1 x {SIDE} x {SIDE}": linear_calls()}
    cases |= {f"step of {count} x {ELEMENTS}": step_calls(count) for count in COUNTS}
    for case, calls in cases.items():
        seconds = common.compare(calls, min_time=min_time)
        rows.append({"case": f"{case}, from Python", "ns": {n: s * 1e9 for n, s in seconds.items()}})
    rows.append(
        {
            "case": f"packed layer, 1 x {SIDE} x {SIDE}, from C++",
            "ns": {n: s * 1e9 for n, s in from_c().items()},
        }
    )
    for row in rows:
        ns = row["ns"]
        row["ported_ns"] = ns["operator"] + ns["stable"] - ns["full"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the table of docs/stable-abi.md, in nanoseconds of a call.

    today: the path that the package takes, the direct call or the plan. ported: our operator, which would take its
    place, and what the stable ABI adds to the prototype."""
    lines = [
        "| call | full | stable | ratio | today | our operator | ported / today |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ns = row["ns"]
        today = ns.get("direct", ns.get("plan"))
        shown, worse = ("", "") if today is None else (f"{today:,.0f}", f"{row['ported_ns'] / today:.1f}")
        lines.append(
            f"| {row['case']} | {ns['full']:,.0f} | {ns['stable']:,.0f} | {ns['stable'] / ns['full']:.2f} | {shown} "
            f"| {ns['operator']:,.0f} | {worse} |"
        )
    return "\n".join(lines)


def facts(result: dict[str, Any]) -> str:
    """The other figures as a table of docs/stable-abi.md."""
    kinds = ("full", "stable")
    libraries, own = result["libraries"], result["extension"]
    rows = {
        "CPU seconds to compile bench/stable_abi.cpp": [
            f"{libraries[k]['compile_cpu_seconds']:.1f}" for k in kinds
        ],
        "symbols of torch's C++ that the library takes": [str(libraries[k]["symbols"]["c++"]) for k in kinds],
        "functions of the C interface that it takes": [str(libraries[k]["symbols"]["c"]) for k in kinds],
        "ns to read a version counter": [f"{result['version_ns'][k]:.1f}" for k in kinds],
        "bytes that a call with two strings leaks": [f"{result['leaked_bytes'][k]:.0f}" for k in kinds],
        "what a refused argument raises": [result["errors"][k] for k in kinds],
    }
    lines = ["| prototype | full | stable |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines.append("")
    lines.append(
        f"`quantopt._C` here: {own['bytes'] / 1e6:.1f} MB, {own['symbols']['c++']} symbols of torch's C++"
    )
    if seconds := result["extension_cpu_seconds"]:
        lines[-1] += (
            f"; {len(seconds)} files with torch's headers, {sum(seconds.values()):.0f} CPU seconds to compile"
        )
    lines[-1] += "."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="also the compilers' CPU seconds")
    parser.add_argument(
        "--min-time", type=float, default=1.0, help="seconds for each timed call (default: 1)"
    )
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE", help="where the results go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    BUILD.mkdir(parents=True, exist_ok=True)
    version = TARGET[0] << 56 | TARGET[1] << 48
    libraries = {
        "full": library("full", []),
        "stable": library("stable", ["-DSTABLE_ABI", f"-DTORCH_TARGET_VERSION={version:#x}"]),
    }
    path = Path(arguments.json)
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = measured(arguments.min_time)
    result = {
        **header("cpu", 1),
        "rows": rows,
        "libraries": libraries,
        "version_ns": version_ns(arguments.min_time),
        "leaked_bytes": leaked(),
        "errors": errors(),
        "extension": extension(),
        "extension_cpu_seconds": extension_seconds()
        if arguments.compile
        else before.get("extension_cpu_seconds"),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['device']}; torch {torch.__version__}; commit {result['commit']}\n")
    print(table(rows), facts(result), sep="\n\n")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
