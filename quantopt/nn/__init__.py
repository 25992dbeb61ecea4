"""Layers whose weights are packed at one bit per plane; quantised activations; LUQ."""

from quantopt.nn.conv import BinaryConv2d
from quantopt.nn.linear import BinaryLinear
from quantopt.nn.luq import SAWB, LUQConv2d, LUQLinear, luq, quantize_activations

__all__ = ["SAWB", "BinaryConv2d", "BinaryLinear", "LUQConv2d", "LUQLinear", "luq", "quantize_activations"]
