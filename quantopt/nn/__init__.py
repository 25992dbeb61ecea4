"""Layers whose weights are packed at one bit per plane."""

from quantopt.nn.conv import BinaryConv2d
from quantopt.nn.linear import BinaryLinear

__all__ = ["BinaryConv2d", "BinaryLinear"]
