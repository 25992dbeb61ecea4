"""From a trained model to packed layers (`pack`), to a file (`save`) and back (`load`)."""

from quantopt.packing.description import describe, skeleton
from quantopt.packing.file import PackedFileError, load, save
from quantopt.packing.layers import table
from quantopt.packing.pack import pack

__all__ = ["PackedFileError", "describe", "load", "pack", "save", "skeleton", "table"]
