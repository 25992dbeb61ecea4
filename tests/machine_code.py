"""What the compilers of CUDA made of the kernels: the built extension and its machine code."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quantopt import _extension

ARCHS = _extension.build_info().get("cuda_archs", [])
needs_cuda_build = pytest.mark.skipif(not ARCHS, reason="the extension was built without CUDA")


def extension_file() -> Path:
    import quantopt._C

    return Path(quantopt._C.__file__)


def cuobjdump() -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    if not Path(tool).exists():
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's wheel")
    return tool


@functools.cache
def kernels_of(arch: str) -> dict[str, str]:
    """The machine code of each kernel for an architecture, by its mangled name."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(extension_file())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", sass, re.DOTALL))
