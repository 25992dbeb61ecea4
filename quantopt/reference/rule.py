"""How a rule is stated for the reference step: a function from the base direction to the new weights."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """One tensor, as a rule sees it."""

    w: Tensor  # the latent, the master weights, or the parameter itself
    p: Tensor  # what the network ran with
    exact: bool  # p is not rounded to 16 bits
    hi: Tensor  # outer level, broadcast to the elements; with a dynamic scale that of the step before
    levels: int
    hyper: SimpleNamespace  # the numbers of quantopt.rules.HYPER by name
    decay: float  # weight decay where it is part of the gradient or velocity, else 0
    shrink: float  # 1 - lr wd where decoupled, else 1
    latent_limit: Tensor | None  # largest |latent| of the alternating rule
    rescale: Callable[[Tensor], Tensor]  # point -> hi after the step: the same hi unless the scale is dynamic


# The new latent (None where the rule has none) and the new weight.
Step = Callable[[Weights, Tensor], tuple[Tensor | None, Tensor]]
Gradient = Callable[[Weights, Tensor], Tensor]

# Of a latent, with its outer level, K and the numbers: the ends between which its weight lies. They are equal where the
# weight depends on nothing else.
Ends = Callable[[Tensor, Tensor, int, SimpleNamespace], tuple[Tensor, Tensor]]

STEPS: dict[str, Step] = {}
GRADIENTS: dict[str, Gradient] = {}  # what a rule does to the gradient before the base; most do nothing

ENDS: dict[str, Ends] = {}


def rule(name: str) -> Callable[[Step], Step]:
    """Registers the function as the step of a rule of :data:`quantopt.rules.RULES`."""

    def register(step: Step) -> Step:
        STEPS[name] = step
        return step

    return register


def gradient(name: str) -> Callable[[Gradient], Gradient]:
    """Registers the function as what a rule does to the gradient."""

    def register(function: Gradient) -> Gradient:
        GRADIENTS[name] = function
        return function

    return register


def ends(name: str) -> Callable[[Ends], Ends]:
    """Registers the function as what is known of the weight of a latent."""

    def register(function: Ends) -> Ends:
        ENDS[name] = function
        return function

    return register
