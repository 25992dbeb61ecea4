"""The base direction d of a gradient g, and the step of weights without levels. Source: docs/algorithms.md, head."""

from torch import Tensor

from quantopt.reference.rule import Weights, gradient, rule


def sgd_direction(g: Tensor, m: Tensor, momentum: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """(d, m): m <- beta m + g; d = g + beta m if Nesterov else m."""
    m = momentum * m + g
    return (g + momentum * m if nesterov else m), m


def adam_direction(
    g: Tensor, m: Tensor, v: Tensor, step: int, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(d, m, v): d = (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps), m, v


@gradient("none")
def decayed_gradient(x: Weights, g: Tensor) -> Tensor:
    """g + wd w, with coupled weight decay, as in torch.optim."""
    return g + x.decay * x.w


@rule("none")
def _step(x: Weights, d: Tensor) -> tuple[None, Tensor]:
    return None, x.w * x.shrink - x.hyper.lr * d
