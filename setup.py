"""Builds the extension quantopt._C. Everything else about the package stands in pyproject.toml.

Three kinds of source go into the one shared library:

- csrc/*.cpp, csrc/cpu/*.cpp: schemas, checks and dispatch; compiled with torch's headers.
- csrc/cpu/kernels/*.cpp: the torch-free kernels, compiled once for each instruction set of ISAS below, each
  time in a namespace of its own (-DQUANTOPT_ISA=avx2). csrc/cpu/isa.cpp chooses among them at run time.
- csrc/cuda/: *.cu are torch-free launchers for nvcc, *.cpp their registration; only in a CUDA build. step_rule.cu is
  compiled once for each rule of csrc/core/rules.h (-DQUANTOPT_RULE=kAskew).

Environment variables:

- QUANTOPT_CUDA=0|1: leave CUDA out | insist on it. Unset: built for a torch with CUDA when nvcc is found (in CUDA_HOME,
  on PATH, in /usr/local/cuda).
- QUANTOPT_CUDA_ARCHS: compute capabilities, e.g. "80;90" (default: those of CUDA_ARCHS that nvcc knows).
- QUANTOPT_DISABLE_EXTENSION=1: compile nothing; the package then runs in pure PyTorch.
- CXX: the C++ compiler. MAX_JOBS: how many compilers run at once.

torch's CUDAExtension is not used: it insists on the toolkit that torch was built with, and is switched off in
the CPU build of torch. The launchers need neither, as they link the CUDA runtime statically.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup


def import_torch() -> None:
    """Makes torch importable: where pip builds in an environment of its own, the one of the environment that it
    installs into, whose interpreter it runs."""
    if importlib.util.find_spec("torch") is None:
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "quantopt is compiled against the torch it will run with, which is not installed here. "
            "Install torch first, then: pip install setuptools wheel ninja && pip install --no-build-isolation ."
        )


import_torch()
import torch  # noqa: E402

OLDEST = (2, 11)
MINOR = tuple(int(part) for part in str(torch.__version__).split(".")[:2])
if MINOR < OLDEST:
    sys.exit(
        f"quantopt needs torch {OLDEST[0]}.{OLDEST[1]} or later, here is {torch.__version__}: install a later one first"
    )

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

ROOT = Path(__file__).resolve().parent
PURE = os.environ.get("QUANTOPT_DISABLE_EXTENSION", "0") not in ("", "0")
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "quantopt/_version.py").read_text())[1]

# Instruction set -> flags. Each contains the ones before it, but avx512 does not contain avxvnni.
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16"]
ISAS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avxvnni": ["-march=x86-64-v3", "-mavxvnni", "-mgfni"],
    "avx512": AVX512,
    "avx512vnni": VNNI,
    "amx": [*VNNI, "-mgfni", "-mprfchw", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
PRODUCTS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni")
# Kernel file (without .cpp) -> the instruction sets it is compiled for.
KERNELS = {
    "step": ("portable", "avx2", "avx512", "avx512vnni"),
    "binary_linear": PRODUCTS,
    "binary_tiles": PRODUCTS,
    "quantize": PRODUCTS,
    "binary_conv": PRODUCTS,
    "amx_linear": ("amx",),
    "amx_conv": ("amx",),
}
DEFAULT_ISAS = ("portable", "avx2", "avx512")

# Of the rest, what needs no torch either: for `python setup.py sanitize`.
PLAIN = ("csrc/cpu/isa.cpp", "csrc/cpu/conv_plan.cpp")

# No contraction into fused multiply-add: all instruction sets, and CUDA, then give the same bits.
FLOAT_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# -Wno-*uninitialized: gcc 12 warns about its own AVX-512 intrinsics. -Wno-psabi: vectors never cross a call.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
KERNEL_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-Wall", "-Wextra", *QUIET, *FLOAT_FLAGS]
TORCH_FLAGS = ["-O2", "-g0", "-std=c++20", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]

# Kernel file -> further flags. Without exceptions objects hold no definitions of what handles them, of which the linker
# may keep any one; and the step compiles faster.
TUNING = {"binary_linear": ["-fno-exceptions"], "step": ["-fno-exceptions"]}
# For `python setup.py sanitize`. null and unreachable cost compile time and are caught as crashes; calls in
# place of inline checks halve it.
SANITIZER_FLAGS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-fno-sanitize=null,unreachable", "--param", "asan-instrumentation-with-call-threshold=50"),
]

CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = [
    "-O3",
    "--std=c++17",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-v",
    "-Xfatbin",
    "-compress-all",
]
# First word of a CUDA file -> additional flags. The steps wait for memory: exact, unfused arithmetic is free. In the
# products it keeps the quantisation and what follows the sums as on the CPU.
CUDA_FLAGS = {"step": ["-fmad=false"], "binary": ["-fmad=false"]}
# CUDA file -> (architecture, those of the build that include it, macro): a file of instructions that exist on one
# processor alone is compiled for that, and holds no kernel where the build is for others.
SPECIFIC = {"binary_wgmma": ("90a", ("90", "90a"), "-DQUANTOPT_HAVE_SM90A")}
# What ptxas reports when a kernel compiles but cannot run as written: C7508 (setmaxnreg ignored), C7510 (wgmma
# serialised) and their kind.
SLOW_CODE = re.compile(r"^.*(?:\(C75\d\d\)|wgmma\S* .*serializ|setmaxnreg.* ignored).*$", re.MULTILINE)


def jobs() -> int:
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def sources(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp"))


def run(command: list[str], what: str) -> str:
    """Runs a compiler and returns what it printed; stops the build with its message on failure."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"quantopt: {what} failed:\n{shlex.join(command)}\n{result.stdout}")
    return result.stdout


def find_cxx() -> list[str]:
    """The C++ compiler as a command: CXX, else the first of g++, c++, clang++."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if all(shutil.which(word) for word in command[:1]):
            return command
    tried = f"CXX={shlex.join(named)}" if named else "looked for g++, c++, clang++"
    sys.exit(
        f"quantopt: no C++ compiler found ({tried}). "
        "Install one (Debian, Ubuntu: apt-get install g++) or set CXX to one."
    )


def find_nvcc() -> str | None:
    """nvcc, if CUDA is to be built."""
    choice = os.environ.get("QUANTOPT_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"quantopt: QUANTOPT_CUDA={choice} is not understood: use 0, 1 or leave it unset")
    if choice == "0" or (choice == "" and not torch.version.cuda):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home) / "bin")] if home else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places)) if places else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and choice == "1":
        sys.exit(
            "quantopt: QUANTOPT_CUDA=1, but nvcc is not in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin. "
            "Install the CUDA toolkit, point CUDA_HOME to it, or unset QUANTOPT_CUDA to build for the CPU."
        )
    return nvcc


class Toolkit:
    """nvcc, its version, the architectures to compile for, and its static runtime library."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        self.version = re.search(r"release (\S+),", run([nvcc, "--version"], "nvcc"))[1]
        known = set(re.findall(r"sm_(\d+[a-z]?)", run([nvcc, "--list-gpu-code"], "nvcc --list-gpu-code")))
        named = re.split(r"[;,\s]+", os.environ.get("QUANTOPT_CUDA_ARCHS", "").replace(".", "").strip("; ,"))
        self.archs = named if named[0] else [arch for arch in CUDA_ARCHS if arch in known]
        unknown = [arch for arch in self.archs if arch not in known]
        if unknown or not self.archs:
            sys.exit(
                f"quantopt: nvcc {self.version} cannot compile for the compute capability "
                f"{';'.join(unknown or CUDA_ARCHS)} (QUANTOPT_CUDA_ARCHS chooses); "
                f"it knows {', '.join(sorted(known, key=lambda a: (len(a), a)))}"
            )
        # nvcc may be a wrapper script or a link: it knows itself where it stands.
        dryrun = run([nvcc, "--dryrun", "-x", "cu", os.devnull], "nvcc --dryrun")
        top = Path(re.search(r"TOP=(.*)", dryrun)[1].strip())
        machine = platform.machine()
        folders = [
            top / "lib64",
            top / "lib",
            *top.glob("targets/*/lib"),
            Path(f"/usr/lib/{machine}-linux-gnu"),
        ]
        for folder in folders:
            if (folder / "libcudart_static.a").exists():
                self.runtime = folder / "libcudart_static.a"
                return
        sys.exit(f"quantopt: libcudart_static.a, part of the CUDA toolkit, was not found under {top}")

    def flags(self, name: str) -> list[str]:
        newest = max(self.archs, key=lambda arch: int(re.match(r"\d+", arch)[0]))
        macros = [f"-DQUANTOPT_NEWEST_ARCH={re.match(r'[0-9]+', newest)[0]}"]
        flags = [*NVCC_FLAGS, *macros, *CUDA_FLAGS.get(name.split("_")[0], [])]
        if name in SPECIFIC:
            arch, wanted, macro = SPECIFIC[name]
            if not set(wanted).isdisjoint(self.archs):
                return [*flags, macro, "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"arch=compute_{newest},code=compute_{newest}")
        return [*flags, *(word for code in codes for word in ("-gencode", code))]


class BuildQuantopt(BuildExtension):
    """Compiles the torch-free kernels, then has torch compile and link the rest with them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, no_python_abi_suffix=False)

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = None

    def finalize_options(self) -> None:
        # pip builds in a fresh folder each time: keep the objects here, so that only what changed is compiled
        if self.build_temp is None:
            tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{platform.machine()}"
            self.build_temp = str(ROOT / "build" / tag)
        super().finalize_options()

    def build_extensions(self) -> None:
        with self.lock():
            self.cxx = find_cxx()
            os.environ.setdefault("CXX", shlex.join(self.cxx))
            if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
                sys.exit("quantopt: Python.h is missing: install Python's headers (Debian: python3-dev)")
            self.headers = sorted((ROOT / "csrc").rglob("*.h"))
            (extension,) = self.extensions
            isas = self.usable_isas()
            nvcc = find_nvcc()
            cuda = Toolkit(nvcc) if nvcc else None

            for isa in isas:
                extension.define_macros += [(f"QUANTOPT_HAVE_{isa.upper()}", None)]
            tasks = self.kernel_tasks(isas)
            if cuda:
                extension.define_macros += [("QUANTOPT_WITH_CUDA", None)]
                extension.sources += sources("csrc/cuda")
                extension.extra_link_args += [
                    "-Wl,--exclude-libs,libcudart_static.a",  # torch brings a runtime with the same symbols
                    str(cuda.runtime),
                    *("-ldl", "-lrt", "-lpthread"),
                ]
                tasks += self.cuda_tasks(cuda)
            self.write_build_info(isas, cuda)
            extension.include_dirs += [str(Path(self.build_temp) / "generated")]
            with ThreadPoolExecutor(jobs()) as pool:
                extension.extra_objects += list(pool.map(self.compile, tasks))
            self.force = True  # let ninja decide what is out of date: it also sees changed flags
            super().build_extensions()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One build at a time in this tree."""
        import fcntl

        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with open(Path(self.build_temp) / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def usable_isas(self) -> list[str]:
        """The instruction sets that this compiler knows on this machine's architecture."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return ["portable"]
        isas = []
        for isa, flags in ISAS.items():
            if self.compiler_knows(flags):
                isas.append(isa)
            else:
                print(f"quantopt: {shlex.join(self.cxx)} does not know {' '.join(flags)}: {isa} is left out")
        return isas

    def compiler_knows(self, flags: list[str]) -> bool:
        command = [*self.cxx, "-Werror", *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    def kernel_tasks(self, isas: list[str]) -> list[tuple[Path, Path, list[str]]]:
        tasks = []
        for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")):
            for isa in KERNELS.get(source.stem, DEFAULT_ISAS):
                if isa not in isas:
                    continue
                macros = [f"-DQUANTOPT_ISA={isa}", f"-DQUANTOPT_ISA_{isa.upper()}"]
                flags = [*KERNEL_FLAGS, *TUNING.get(source.stem, []), *ISAS[isa], *macros]
                command = [*self.cxx, *flags, f"-I{ROOT / 'csrc'}"]
                tasks.append((source, Path(self.build_temp) / "kernels" / f"{source.stem}.{isa}.o", command))
        return tasks

    def cuda_tasks(self, cuda: Toolkit) -> list[tuple[Path, Path, list[str]]]:
        rules = re.findall(r'ROW\((k\w+), "(\w+)"', (ROOT / "csrc/core/rules.h").read_text())
        tasks = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            command = [cuda.nvcc, *cuda.flags(source.stem), f"-I{ROOT / 'csrc'}"]
            objects = {f"{source.stem}.o": command}
            if source.stem == "step_rule":
                objects = {
                    f"step_rule.{name}.o": [*command, f"-DQUANTOPT_RULE={rule}"] for rule, name in rules
                }
            tasks += [(source, Path(self.build_temp) / "cuda" / name, line) for name, line in objects.items()]
        return tasks

    def compile(self, task: tuple[Path, Path, list[str]]) -> str:
        """Compiles one file, unless its object was made from the same source, headers and command."""
        source, target, command = task
        command = [*command, "-c", str(source), "-o", str(target)]
        digest = hashlib.sha256(shlex.join(command).encode())
        for path in (source, *self.headers):
            digest.update(path.read_bytes())
        stamp = target.with_suffix(".sha256")
        if not (target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            print(shlex.join(command), flush=True)
            output = run(command, f"compiling {source.relative_to(ROOT)}")
            if slow := SLOW_CODE.search(output):
                sys.exit(f"quantopt: {source.relative_to(ROOT)}: {slow[0]}")
            if output:
                print(output, flush=True)
            target.with_suffix(".log").write_text(output)
            stamp.write_text(digest.hexdigest())
        return str(target)

    def write_build_info(self, isas: list[str], cuda: Toolkit | None) -> None:
        """The header from which csrc/ops.cpp answers quantopt::build_info."""
        compiler = run([*self.cxx, "--version"], shlex.join(self.cxx)).splitlines()[0]
        info = {
            "version": VERSION,
            "torch": str(torch.__version__),
            "compiler": compiler,
            "isas": isas,
            "nvcc": cuda.version if cuda else None,
            "cuda_archs": cuda.archs if cuda else [],
        }
        text = f"#pragma once\n\n#define QUANTOPT_BUILD_INFO {json.dumps(json.dumps(info))}\n"
        path = Path(self.build_temp) / "generated" / "quantopt_build_info.h"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


class Sanitize(BuildQuantopt):
    """Builds the torch-free CPU kernels with sanitizers and runs tests/sanitizers/driver.cpp on them."""

    description = "run the CPU kernels under the address and undefined-behaviour sanitizers"

    def run(self) -> None:
        self.build_temp = str(ROOT / "build" / "sanitize")
        with self.lock():
            self.cxx = find_cxx()
            on_host = sorted(
                (ROOT / "tests/amx_on_host").glob("*.cpp")
            )  # each includes the source of its kernel
            emulated = [ROOT / f"csrc/cpu/kernels/amx_{source.name}" for source in on_host]
            self.headers = [*sorted((ROOT / "csrc").rglob("*.h")), *emulated]
            isas = self.usable_isas()
            tasks = [
                (source, target, [*command, *SANITIZER_FLAGS])
                for source, target, command in self.kernel_tasks(isas)
                if source not in emulated
            ]
            macros = [f"-DQUANTOPT_HAVE_{isa.upper()}" for isa in isas]
            command = [*self.cxx, *KERNEL_FLAGS, *SANITIZER_FLAGS, *macros, f"-I{ROOT / 'csrc'}"]
            for source in [ROOT / "tests/sanitizers/driver.cpp", *map(ROOT.joinpath, PLAIN)]:
                tasks.append((source, Path(self.build_temp) / f"{source.stem}.o", command))
            for source in on_host if "amx" in isas else []:
                target = Path(self.build_temp) / f"amx_{source.stem}.o"
                tasks.append((source, target, [*command, *ISAS["amx"]]))
            with ThreadPoolExecutor(jobs()) as pool:
                objects = list(pool.map(self.compile, tasks))
            program = str(Path(self.build_temp) / "driver")
            run([*self.cxx, "-fsanitize=address,undefined", *objects, "-o", program], "linking")
            status = subprocess.run([program]).returncode
            if status:
                sys.exit(f"quantopt: the sanitizers or the checks of {program} failed (exit status {status})")


def requirements() -> list[str]:
    """What an installation needs: of torch, the minor version that the extension was compiled against."""
    needed = "torch>={}.{}".format(*OLDEST) if PURE else "torch=={}.{}.*".format(*MINOR)
    return [needed, "numpy>=1.26", "safetensors>=0.4"]


os.chdir(ROOT)
# ninja, when it was installed from its wheel, stands beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

setup(
    install_requires=requirements(),
    packages=[*find_packages(include=["quantopt", "quantopt.*"]), "quantopt.kernels"],
    package_dir={"quantopt": "quantopt", "quantopt.kernels": "kernels"},
    package_data={"quantopt": ["py.typed", "recipes/*.toml"]},
    ext_modules=[]
    if PURE
    else [
        CppExtension(
            "quantopt._C",
            [*sources("csrc"), *sources("csrc/cpu")],
            include_dirs=[str(ROOT / "csrc")],
            extra_link_args=[
                "-lgcc"
            ],  # conversions of 16-bit floats, which libgcc_s has only where gcc is as new
            # OpenMP's pragmas are compiled in, but its library is not linked: at::parallel_for must use the
            # one that torch brings, as torch.set_num_threads speaks to that one.
            extra_compile_args=[*TORCH_FLAGS, "-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildQuantopt, "sanitize": Sanitize},
    zip_safe=False,
)
