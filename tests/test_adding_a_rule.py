"""CONTRIBUTING's "Adding a rule", followed to the letter with a toy rule in a copy of the tree.

The rule is clamped SGD: w <- clamp(w (1 - lr wd) - lr (d + wd w), -hi, hi), with weight decay in one of the two places.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantopt import _extension

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "docs", "kernels", "quantopt", "tests", "setup.py", "pyproject.toml", "README.md")

# File -> (a text of it, what comes before that text).
EDITS = {
    "docs/algorithms.md": ("## 5. Hazards", "- **Toy**: w <- clamp(w - eta*d, lo, hi).\n\n"),
    "csrc/core/rules.h": (
        "#define QUANTOPT_RULES(ROW)",
        """
template <bool Binary>
struct ToyStep {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  BaseStep base;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const {
    return g;
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d, F) const {
    w = w * base.shrink;
    return clamp(w - base.lr * (d + base.decay * w), -grid.hi, grid.hi);
  }
};

template <bool Binary>
struct ToyRow : RuleRow<BaseStep, ToyStep<Binary>> {
  QUANTOPT_HOST_DEVICE static BaseStep constants(const Hyper& h, bool decoupled) {
    return make_base_step(h, decoupled);
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const BaseStep& c, const SpanLevels& levels) {
    return {c, levels.grid};
  }
};

""",
    ),
    "quantopt/reference/baselines.py": (
        'gradient("prox")(decayed_gradient)',
        """@rule("toy")
def _toy(x: Weights, d: Tensor) -> tuple[None, Tensor]:
    w = x.w * x.shrink
    return None, torch.clamp(w - x.hyper.lr * (d + x.decay * w), -x.hi, x.hi)


""",
    ),
    "kernels/rules.py": (
        "@triton.jit\ndef step(x, d, RULE",
        """@triton.jit
def toy_step(x, d):
    w = x.w * x.h.shrink
    return maximum(minimum(w - x.h.lr * (d + x.h.decay * w), x.grid.hi), -x.grid.hi)


""",
    ),
    "quantopt/rules.py": ('        Rule("prox"),', '        Rule("toy"),\n'),
    "quantopt/optim/baselines.py": (
        "class ProxQuant(",
        '''class Toy(LevelOptimizer):
    """Clamped SGD."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        base: str = "sgd",
        bits: int | str = 1,
        scale: str = "tensor",
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, from_arguments(locals()), backend)

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 0.1

    def _rule(self, group: dict[str, Any]) -> str:
        return "toy"


''',
    ),
}
# A second place in two of the files: the line of the rule's dispatch, and the class among the public ones.
LINES = {
    "csrc/core/rules.h": ('  ROW(kProx, "prox", ProxRow)', '  ROW(kToy, "toy", ToyRow) \\\n'),
    "kernels/rules.py": (
        '    elif RULE == "splitting":\n        latent',
        '    elif RULE == "toy":\n        latent = toy_step(x, d)\n        weight = latent\n',
    ),
    "quantopt/optim/baselines.py": ('"BinaryRelax",', '"Toy", '),
}
RECIPE = "quantopt/recipes/toy.toml"

PROGRAM = """
import torch
import quantopt
from quantopt import _C
from quantopt.rules import BASES, RULES
from quantopt.train import data, recipes
from quantopt.train.config import Config
from quantopt.train.loop import Trainer
from tqdm import tqdm

assert tuple(RULES["toy"]) in map(tuple, _C.rules())
for base in BASES:
    results = {}
    for backend in ("reference", "cpu", "triton"):
        torch.manual_seed(0)
        dtype = torch.float64 if backend == "reference" else torch.float32
        p = torch.nn.Parameter(torch.randn(40, 30).to(dtype))
        opt = quantopt.Toy([p], lr=0.5, weight_decay=0.1, base=base, bits=2, scale="channel", backend=backend)
        for _ in range(3):
            p.grad = torch.randn(40, 30).to(p.dtype)
            opt.step()
        results[backend] = p.detach().float()
        hi = opt.state[p]["scale"].float()[:, None] * 1.5 * 0.9957
        assert bool((p.abs() <= hi * (1 + 1e-6)).all()) and bool((p.abs() >= hi * (1 - 1e-6)).any())
    torch.testing.assert_close(results["cpu"], results["reference"], rtol=1e-4, atol=1e-5)
    assert torch.equal(results["cpu"], results["triton"])

config = recipes.complete(Config(optimizer="toy", epochs=1, limit=100))
trainer = Trainer(config, data.load("digits"))
weights = trainer.optimizer.optimizer.param_groups[0]["params"]
before = [p.detach().clone() for p in weights]
trainer.train_epoch(tqdm(disable=True))
assert type(trainer.optimizer.optimizer).__name__ == "Toy"
assert not any(map(torch.equal, weights, before))
print("the toy rule runs")
"""


def apply(tree: Path, edits: dict[str, tuple[str, str]]) -> None:
    for name, (anchor, text) in edits.items():
        source = (tree / name).read_text()
        assert source.count(anchor) == 1, f"{name}: {anchor!r}"
        (tree / name).write_text(source.replace(anchor, text + anchor))


def leave_out_products(csrc: Path) -> None:
    """The products with packed weights, which take two thirds of the compilation and have no rules."""
    for pattern in (
        "binary_*.cpp",
        "tiles.cpp",
        "cpu/binary_*.cpp",
        "cpu/kernels/binary_*.cpp",
        "cpu/kernels/quantize.cpp",
    ):
        for path in csrc.glob(pattern):
            path.unlink()
    (csrc / "direct_call.cpp").write_text(
        """#include "direct_call.h"
PyObject* quantopt::binary_linear_direct(PyObject*, PyObject* const*, Py_ssize_t) { Py_RETURN_NONE; }
"""
    )


def test_the_document_names_the_files() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a rule")[1].split("\n## ")[0]
    named = [re.match(r"\d+\. `([^`]+)`", line)[1] for line in section.splitlines() if line[:1].isdigit()]  # type: ignore[index]
    assert named == [*EDITS, RECIPE.replace("toy", "NAME")]


@pytest.mark.slow
@pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
def test_a_toy_rule(tmp_path: Path) -> None:
    """Compiled for the portable instruction set, without optimisation."""
    pytest.importorskip("triton")
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "quantopt/kernels").symlink_to("../kernels")
    apply(tmp_path, EDITS)
    apply(tmp_path, LINES)
    other = (tmp_path / "quantopt/recipes/binaryconnect.toml").read_text().split("[options]")[0]
    (tmp_path / RECIPE).write_text(other.replace('"binaryconnect"', '"toy"') + "[options]\n\n[anneal]\n")
    leave_out_products(tmp_path / "csrc")

    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-march=*) exit 1 ;; esac\nexec ${TOY_CXX:-g++} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {
        "CXX": str(compiler),
        "TOY_CXX": os.environ.get("CXX", "g++"),
        "QUANTOPT_CUDA": "0",
        "PYTHONPATH": str(tmp_path),
    }
    environment.pop("QUANTOPT_CPU_ISA", None)

    def run(*command: str, **more: str) -> str:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    assert "the toy rule runs" in run(sys.executable, "-c", PROGRAM, TRITON_INTERPRET="1")
    found = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_rules.py",
        "tests/test_step.py",
        "-k",
        "toy or tables",
    )
    assert " passed" in found and " failed" not in found
