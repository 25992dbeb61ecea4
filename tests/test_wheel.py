"""The wheel of `make wheel`: what it says it needs, and that it works where there is nothing else and no compiler."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from quantopt import _extension
from quantopt._version import __version__

ROOT = Path(__file__).resolve().parent.parent
CORE = ("torch", "numpy", "safetensors")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
needs_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool, path=PATH) for tool in ("make", "g++", "patchelf"))
    or not all(map(importlib.util.find_spec, ("auditwheel", "pip", "wheel"))),
    reason="needs make, g++, auditwheel and patchelf",
)


def link_with_requirements(name: str, site: Path, done: set[str]) -> None:
    """Makes an installed distribution, and what it requires, importable from `site`."""
    if name in done:
        return
    done.add(name)
    distribution = importlib.metadata.distribution(name)
    for top in {
        file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")
    }:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            link_with_requirements(requirement.name, site, done)


def make_wheel(folder: Path) -> Path:
    # -o: the environment is the one that runs the tests, whatever the age of its list of requirements
    command = ["make", "-s", "-o", ".venv/.requirements", "wheel", f"DIST={folder}", f"PY={sys.executable}"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PATH": PATH}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout.decode()
    (built,) = folder.glob("*.whl")
    return built


def install_alone(wheel: Path, home: Path) -> Path:
    """The interpreter of an environment with torch, numpy and safetensors, into which the wheel was installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    done: set[str] = set()
    for name in CORE:
        link_with_requirements(name, site, done)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", wheel]
    environment = {"PATH": str(home / "bin"), "HOME": str(home)}  # no compiler
    result = subprocess.run(install, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return python


@needs_tree
@needs_extension
@needs_tools
def test_the_wheel_works_alone(tmp_path: Path) -> None:
    """Trains, packs, saves and loads, with three packages and no compiler. One test: two makes in one tree collide."""
    wheel = make_wheel(tmp_path / "dist")
    assert wheel.name.startswith(f"torch_quantopt-{__version__}-")
    if sys.platform == "linux":
        assert re.search(r"-manylinux_2_\d+_", wheel.name)
    if not _extension.build_info()["nvcc"]:
        assert wheel.stat().st_size < 8_000_000
    clean = install_alone(wheel, tmp_path / "clean")
    code = """
import importlib.metadata, sys
import torch
import quantopt
from quantopt import _extension

assert quantopt.__file__.startswith(sys.prefix) and _extension.error is None
minor = ".".join(torch.__version__.split(".")[:2])
required = importlib.metadata.requires("torch-quantopt")
assert f"torch=={minor}.*" in required, required
assert _extension.build_info()["torch"] == torch.__version__

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
opt = quantopt.AskewSGD(quantopt.param_groups(model, bits=1), lr=0.5, memory=True)
anneal = quantopt.Anneal(opt, total_steps=5)
for _ in range(5):
    opt.zero_grad()
    model(torch.randn(16, 8)).square().mean().backward()
    opt.step()
    anneal.step()
packed = quantopt.pack(model.eval(), opt)
quantopt.save(packed, "model.safetensors")
loaded = quantopt.load("model.safetensors", model)
x = torch.randn(3, 8)
with torch.inference_mode(), opt.quantized():
    assert torch.equal(packed(x), loaded(x))
    torch.testing.assert_close(packed(x), model(x))
"""
    environment = {"PATH": str(clean.parent), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = [clean, "-W", "error::RuntimeWarning", "-c", code]
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version = subprocess.run([clean.parent / "quantopt", "--version"], env=environment, capture_output=True)
    assert version.stdout.decode().strip() == f"quantopt {__version__}"


@needs_extension
def test_another_torch_is_a_warning() -> None:
    code = "import torch; torch.__version__ = '9.8.7'; import quantopt"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    built = re.escape(str(torch.__version__))
    assert re.search(
        rf"RuntimeWarning: .*compiled for torch {built} and runs with torch 9\.8\.7", result.stderr
    )
    assert "install the wheel for this torch" in result.stderr


def run_setup(before: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`setup.py --version` where nothing but setuptools is importable, as where pip builds in isolation."""
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if spec := importlib.util.find_spec(name):
            (tmp_path / name).symlink_to(Path(str(spec.origin)).parent)
    code = f"import runpy, sys, sysconfig; {before}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    environment = {"PATH": PATH, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_tree
def test_a_build_in_isolation_finds_torch_where_it_installs(tmp_path: Path) -> None:
    place = Path(str(torch.__file__)).parent.parent
    result = run_setup(f"sysconfig.get_path = lambda name: {str(place)!r}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == __version__


@needs_tree
def test_a_build_without_torch_says_the_command_that_works(tmp_path: Path) -> None:
    result = run_setup(f"sysconfig.get_path = lambda name: {str(tmp_path)!r}", tmp_path)
    assert result.returncode == 1
    assert "Install torch first" in result.stderr and "pip install --no-build-isolation ." in result.stderr


@needs_tree
def test_a_torch_that_is_too_old_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.10.0+cpu'\n")
    result = run_setup(f"sysconfig.get_path = lambda name: {str(tmp_path)!r}", tmp_path)
    assert result.returncode == 1
    assert "quantopt needs torch 2.11 or later, here is 2.10.0+cpu" in result.stderr
