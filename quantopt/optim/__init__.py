"""Optimizers that train quantised weights, thin classes over the fused step."""

from typing import TYPE_CHECKING

# A new class is named in __all__ of its module, and nowhere else.
from quantopt.optim.anneal import *  # noqa: F403
from quantopt.optim.askew import *  # noqa: F403
from quantopt.optim.baselines import *  # noqa: F403
from quantopt.optim.groups import *  # noqa: F403
from quantopt.optim.stam import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers follow the star imports
    __all__ = [name for name, value in list(globals().items()) if callable(value) and name[:1] != "_"]
