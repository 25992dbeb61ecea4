"""quantopt's Triton kernels, loaded a second time in Triton's interpreter."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import quantopt


@contextlib.contextmanager
def interpreted_kernels(*names: str) -> Iterator[list[ModuleType]]:
    """The modules of quantopt.kernels of these names, and with them all that they import from there."""
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

    def is_kernels(name: str) -> bool:
        return name == "quantopt.kernels" or name.startswith("quantopt.kernels.")

    compiled = {name: module for name, module in sys.modules.items() if is_kernels(name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(quantopt, "kernels", None, raising=False)  # the import below sets it
        for name in compiled:
            del sys.modules[name]
        try:
            modules = [importlib.import_module(f"quantopt.kernels.{name}") for name in names]
        finally:
            for name in [name for name in sys.modules if is_kernels(name)]:
                del sys.modules[name]
            sys.modules.update(compiled)
        patch.delenv("TRITON_INTERPRET")
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield modules
