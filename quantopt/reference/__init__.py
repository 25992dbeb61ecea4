"""Every rule in a few lines of PyTorch that read like its equation: the oracle of all kernels.

The functions take and return tensors of any floating type (float64 in the tests), change nothing in
place, and are the only place where Python states a rule.
"""

from quantopt.reference import askew, base, baselines, levels, rounding, stam, step

__all__ = ["askew", "base", "baselines", "levels", "rounding", "stam", "step"]
