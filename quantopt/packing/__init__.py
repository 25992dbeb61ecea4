"""From a trained model to packed layers (`pack`), to a file (`save`) and back (`load`)."""

from quantopt.packing.description import describe, skeleton
from quantopt.packing.file import PackedFileError, load, save
from quantopt.packing.joining import join_layers
from quantopt.packing.layers import table
from quantopt.packing.pack import pack

__all__ = ["PackedFileError", "describe", "join_layers", "load", "pack", "save", "skeleton", "table"]
