"""Optimizers that train quantised weights, thin classes over the fused step."""

from quantopt.optim.anneal import Anneal
from quantopt.optim.askew import AskewAdam, AskewSGD
from quantopt.optim.baselines import BinaryConnect, BinaryRelax, ProxQuant
from quantopt.optim.groups import param_groups
from quantopt.optim.stam import STAM

__all__ = [
    "STAM",
    "Anneal",
    "AskewAdam",
    "AskewSGD",
    "BinaryConnect",
    "BinaryRelax",
    "ProxQuant",
    "param_groups",
]
