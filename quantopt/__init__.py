"""Fused optimizers for training quantised weights, and 1-bit kernels to run them."""

from quantopt import nn
from quantopt._version import __version__
from quantopt.backends import BackendError
from quantopt.ops.conv2d import binary_conv2d
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs, unpack_signs
from quantopt.optim import (
    STAM,
    Anneal,
    AskewAdam,
    AskewSGD,
    BinaryConnect,
    BinaryRelax,
    ProxQuant,
    param_groups,
)
from quantopt.packing import load, pack, save

__all__ = [
    "STAM",
    "Anneal",
    "AskewAdam",
    "AskewSGD",
    "BackendError",
    "BinaryConnect",
    "BinaryRelax",
    "ProxQuant",
    "__version__",
    "binary_conv2d",
    "binary_linear",
    "load",
    "nn",
    "pack",
    "pack_signs",
    "param_groups",
    "save",
    "unpack_signs",
]
