"""Fused optimizers for training quantised weights, and 1-bit kernels to run them."""

from typing import TYPE_CHECKING

from quantopt import nn, optim
from quantopt._version import __version__
from quantopt.backends import BackendError
from quantopt.ops.conv2d import binary_conv2d
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs, unpack_signs
from quantopt.optim import *  # noqa: F403
from quantopt.packing import load, pack, save

__all__ = ["BackendError", "__version__", "binary_conv2d", "binary_linear", "load", "nn", "optim", "pack"]
__all__ += ["pack_signs", "save", "unpack_signs"]
if not TYPE_CHECKING:
    __all__ += optim.__all__
