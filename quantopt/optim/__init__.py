"""Optimizers that train quantised weights, thin classes over the fused step."""

# The classes are named once more in __all__ of their modules alone.
from quantopt.optim.anneal import *  # noqa: F403
from quantopt.optim.askew import *  # noqa: F403
from quantopt.optim.baselines import *  # noqa: F403
from quantopt.optim.groups import *  # noqa: F403
from quantopt.optim.stam import *  # noqa: F403
