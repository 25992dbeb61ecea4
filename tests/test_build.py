"""The build and the package: what is installed, which instruction sets are compiled, how a build fails."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantopt
from conftest import force_isa
from quantopt import _extension
from quantopt._version import __version__

ROOT = Path(__file__).resolve().parent.parent
needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def test_version_is_in_one_place() -> None:
    assert importlib.metadata.version("torch-quantopt") == __version__


def test_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="quantopt")
    assert script.value == "quantopt.train.cli:main"
    assert callable(script.load())


def test_types_are_shipped() -> None:
    assert (Path(quantopt.__file__).parent / "py.typed").exists()


def test_kernels_are_part_of_the_package() -> None:
    assert importlib.util.find_spec("quantopt.kernels") is not None


def test_import_touches_neither_cuda_nor_triton() -> None:
    code = (
        "import sys, torch, quantopt\n"
        "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_extension
def test_build_info() -> None:
    info = _extension.build_info()
    assert info["version"] == __version__
    assert info["isas"][0] == "portable"
    assert bool(info["nvcc"]) == bool(info["cuda_archs"])


@needs_extension
def test_forced_isa(isa: str) -> None:
    assert torch.ops.quantopt.cpu_isa() == isa


@needs_extension
def test_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    force_isa(monkeypatch, "sse9")
    with pytest.raises(RuntimeError, match="QUANTOPT_CPU_ISA=sse9 is unknown: use portable"):
        torch.ops.quantopt.cpu_isa()


def test_without_the_extension() -> None:
    """The package works in pure PyTorch, and says why."""
    code = (
        "import quantopt, torch\n"
        "from quantopt import _extension, backends\n"
        "assert 'QUANTOPT_DISABLE_EXTENSION' in _extension.error and _extension.build_info() == {}\n"
        "choice = backends.choose('fused_step', torch.device('cpu'), torch.float32)\n"
        "assert choice.name == 'reference' and 'QUANTOPT_DISABLE_EXTENSION' in choice.why\n"
    )
    environment = os.environ | {"QUANTOPT_DISABLE_EXTENSION": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


BROKEN = {
    "missing": (None, "is not built; run `pip install"),
    "damaged": (b"\x7fELF and nothing more", r"does not load with torch .*; run `pip install"),
    "of another version": (b"StepPlan = None\n", r"is of another version of quantopt .*; run `pip install"),
}


@pytest.mark.parametrize("state", BROKEN)
def test_an_extension_that_does_not_load_is_one_warning(tmp_path: Path, state: str) -> None:
    """In a copy of the package whose extension is `state`: the reason and the remedy, and the package works."""
    content, reason = BROKEN[state]
    package = tmp_path / "quantopt"
    shutil.copytree(
        Path(quantopt.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__")
    )
    if content is not None:
        suffix = ".py" if content.startswith(b"Step") else importlib.machinery.EXTENSION_SUFFIXES[0]
        (package / f"_C{suffix}").write_bytes(content)
    alone = (  # without what an editable install adds, which finds the real extension
        f"sys.path.insert(0, {str(tmp_path)!r}); "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    )
    code = (
        f"import sys, warnings; {alone}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import quantopt, quantopt.train\n"
        f"assert quantopt.__file__.startswith({str(tmp_path)!r})\n"
        "ours = [w for w in caught if 'quantopt' in str(w.message)]\n"
        "assert [w.category for w in ours] == [RuntimeWarning]\n"
        "import torch; assert quantopt.pack_signs(torch.ones(1, 3)).item() == 7\n"
        "print(ours[0].message)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "QUANTOPT_DISABLE_EXTENSION"}
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert re.search(
        rf"slower: .*quantopt\._C {reason}.*QUANTOPT_DISABLE_EXTENSION=1", result.stdout, re.DOTALL
    )
    # Where warnings are errors, so is this one, until it is said that no extension is wanted.
    code = f"import sys; {alone}; import quantopt"
    run = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    assert (
        "RuntimeWarning: quantopt runs in pure"
        in subprocess.run(run, capture_output=True, text=True, env=environment).stderr
    )
    environment["QUANTOPT_DISABLE_EXTENSION"] = "1"
    assert subprocess.run(run, capture_output=True, env=environment).returncode == 0


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_kernels_run_on_the_threads_of_torch() -> None:
    """at::parallel_for must use the OpenMP that torch.set_num_threads speaks to, not another beside it."""
    code = (
        "import os, torch, quantopt\n"
        "from quantopt.ops.step import fused_step, hyper_tensor\n"
        "from quantopt.rules import StepRecord\n"
        "torch.set_num_threads(3)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "w, g = torch.zeros(1 << 20), torch.ones(1 << 20)\n"
        "record = StepRecord('none', 'sgd', [w], [g], [], [], [], [], [], [], hyper_tensor(lr=0.5))\n"
        "fused_step(record, backend='cpu')\n"
        "assert w.eq(-0.5).all()\n"
        "after = len(os.listdir('/proc/self/task'))\n"
        "torch.zeros(1 << 22).add_(1)\n"
        "print(before, after, len(os.listdir('/proc/self/task')))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    before, after, later = map(int, result.stdout.split())
    assert after - before == 2
    assert later == after  # torch's own loops then use the same threads


def test_no_code_of_one_instruction_set_leaks_into_another() -> None:
    """Functions that several objects define, of which the linker keeps any one, must not be those
    of the kernels compiled for wider instruction sets."""
    objects = [p for p in ROOT.glob("build/cpython*/kernels/*.o") if ".portable." not in p.name]
    nm = shutil.which("nm")
    if nm is None or not objects:
        pytest.skip("needs nm and a build tree")
    for path in objects:
        isa = path.name.split(".")[1]
        symbols = subprocess.run(
            [nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for kind, name in re.findall(r"^[0-9a-f]+ (\S) (.*)$", symbols, re.MULTILINE):
            assert kind not in "WVu" or f"quantopt::{isa}::" in name, f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (CXX=no-such-compiler)"),
        ({"QUANTOPT_CUDA": "yes"}, "QUANTOPT_CUDA=yes is not understood"),
    ],
)
def test_failed_build_says_why(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode != 0
    assert words in result.stdout + result.stderr
