"""Layers whose weights are packed at one bit per plane; quantised activations; LUQ."""

from quantopt.nn.conv import BinaryConv1d, BinaryConv2d
from quantopt.nn.linear import BinaryLinear
from quantopt.nn.luq import SAWB, LUQConv2d, LUQLinear, luq, quantize_activations
from quantopt.nn.sign import SignActivation
from quantopt.nn.transposed import conv1d_to_linear

__all__ = [
    "SAWB",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "LUQConv2d",
    "LUQLinear",
    "SignActivation",
    "conv1d_to_linear",
]
__all__ += ["luq", "quantize_activations"]
