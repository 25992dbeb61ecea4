"""Loads the compiled extension, which registers the operators of `torch.ops.quantopt`.

The package also works without it (in pure PyTorch, its step 80 to 180 times slower), so a failure to load is a
RuntimeWarning, not an error: `error` is None when the extension is loaded, else one line that says why it is not.
"""

import importlib
import json
import os
import warnings
from typing import Any

import torch

error: str | None = None
StepPlan: Any = None  # csrc/module.cpp
TensorWatch: Any = None
find_gradients: Any = None
holds: Any = None
same: Any = None
conv_takes_tiles: Any = None
binary_linear_direct: Any = None

_REBUILD = "run `pip install --no-build-isolation .` (or -e .) with this torch and a C++20 compiler"

if os.environ.get("QUANTOPT_DISABLE_EXTENSION", "0") not in ("", "0"):
    error = "the compiled extension is disabled by QUANTOPT_DISABLE_EXTENSION"
else:
    try:
        _module = importlib.import_module("quantopt._C")
        StepPlan, TensorWatch = _module.StepPlan, _module.TensorWatch
        find_gradients, holds, same = _module.find_gradients, _module.holds, _module.same
        binary_linear_direct, conv_takes_tiles = _module.binary_linear_direct, _module.conv_takes_tiles
    except ModuleNotFoundError:
        error = f"the compiled extension quantopt._C is not built; {_REBUILD}"
    except AttributeError as exc:
        error = f"quantopt._C is of another version of quantopt ({exc}); {_REBUILD}"
    except (ImportError, OSError) as exc:
        error = f"quantopt._C does not load with torch {torch.__version__} ({exc}); {_REBUILD}"
    if error is not None:
        warnings.warn(
            f"quantopt runs in pure PyTorch, its step 80 to 180 times slower: {error}. If that is what you want, "
            "set QUANTOPT_DISABLE_EXTENSION=1",
            RuntimeWarning,
            stacklevel=2,
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def build_info() -> dict[str, Any]:
    """What the extension was built with; empty if it is not loaded.

    Keys: `version` (of quantopt), `torch`, `compiler`, `isas` (instruction sets of the CPU kernels), `nvcc`
    (version or None) and `cuda_archs` (list such as ["80", "90", "100"], empty without CUDA).
    """
    if error is not None:
        return {}
    info: dict[str, Any] = json.loads(torch.ops.quantopt.build_info())
    return info


if _minor(_built_for := build_info().get("torch", torch.__version__)) != _minor(torch.__version__):
    warnings.warn(
        f"quantopt was compiled for torch {_built_for} and runs with torch {torch.__version__}, whose binary interface "
        f"may differ: install the wheel for this torch, or {_REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
