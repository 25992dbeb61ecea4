"""GGUF files, those of llama.cpp: packed layers as Q1_0, TQ1_0 and TQ2_0, and whole Llama and Qwen3 models.

Needs the ``gguf`` package, and :func:`load` transformers of version 5 besides: pip install 'torch-quantopt[gguf]'.
"""

from quantopt import extras

try:
    import gguf as _gguf  # noqa: F401
except ImportError as error:
    raise ImportError(f"quantopt.gguf {extras.missing('gguf', why=error)}") from None

from quantopt.gguf.blocks import BLOCKS, from_blocks, to_blocks
from quantopt.gguf.container import Field, File, GGUFFileError
from quantopt.gguf.layers import read_layer, save_layers
from quantopt.gguf.models import load, save

__all__ = ["BLOCKS", "Field", "File", "GGUFFileError", "from_blocks", "load", "read_layer", "save"]
__all__ += ["save_layers", "to_blocks"]
