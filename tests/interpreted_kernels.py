"""quantopt's Triton kernels, loaded a second time in Triton's interpreter."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@contextlib.contextmanager
def interpreted_kernels(*names: str) -> Iterator[list[ModuleType]]:
    """The modules of quantopt.kernels of these names, each after those that it imports."""
    import triton
    from triton.runtime import interpreter

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(builder: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        """The interpreter's own multiplies the bits of bfloat16 as whole numbers, and whole numbers slowly."""
        if a.dtype.scalar == triton.language.int8:
            product = (numbers(a).astype(np.float64) @ numbers(b).astype(np.float64)).astype(np.int32)
        else:
            product = np.matmul(numbers(a), numbers(b), dtype=np.float32)
        return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)

    modules = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in names:
            full = f"quantopt.kernels.{name}"
            source = importlib.util.find_spec(full)
            assert source is not None and source.origin is not None
            spec = importlib.util.spec_from_file_location(f"interpreted_{name}", source.origin)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
            patch.setitem(sys.modules, full, module)  # for the modules after it
            modules.append(module)
        for name in names:
            patch.delitem(sys.modules, f"quantopt.kernels.{name}")
        patch.delenv("TRITON_INTERPRET")
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield modules
