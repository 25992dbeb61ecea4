"""The base "muon": the direction of a matrix, by PyTorch matmuls. The fused step takes it as a given direction.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon, in the form of torch.optim.Muon (torch/optim/_muon.py,
whose functions are not public).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt.optim.sharded import is_sharded

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, and the next two, as in torch.optim.Muon
EPS = 1e-7  # least norm that a matrix is divided by
ADJUSTMENTS = ("original", "match_rms_adamw")
# Elements of a batch: bounds the memory of the iteration, and matrices of this size need no batch.
BATCH = 2**24


def orthogonalised(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: about U V^T of each of the matrices x = U S V^T, [n, rows, columns]; bfloat16, as in torch.

    Of the wide one of x and x^T: X = x / max(|x|, 1e-7), then in each step X <- a X + (b A + c A A) X, A = X X^T. The
    singular values end near 1, not at 1.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT.bfloat16() if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adjustment(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """The factor of a direction of that shape, by which torch.optim.Muon multiplies the learning rate."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Directions:
    """The directions of a list of parameters, in ``tensors`` that stay the same from step to step.

    m <- m + (1 - beta) (g - m);  d = f NS(g + beta (m - g)) if Nesterov else f NS(m), with f of :func:`adjustment`.
    A weight of more than two dimensions is the matrix [shape[0], the product of the others].
    """

    def __init__(
        self, group: Mapping[str, Any], weights: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> None:
        """``group``: with every option. ``buffers``: m of each weight."""
        self.nesterov, self.maximize, self.steps = group["nesterov"], group["maximize"], group["ns_steps"]
        self.buffers = list(buffers)
        self.tensors = [torch.empty_like(w) for w in weights]
        shapes = [(w.shape[0], w.numel() // w.shape[0]) for w in weights]
        self.factors = [adjustment(*shape, group["adjust_lr_fn"]) for shape in shapes]
        self.batches: list[list[int]] = []  # indices of weights of one shape
        for shape in dict.fromkeys(shapes):
            alike = [i for i, other in enumerate(shapes) if other == shape]
            count = max(1, BATCH // math.prod(shape))
            self.batches += [alike[i : i + count] for i in range(0, len(alike), count)]

    def update(
        self,
        grads: Sequence[Tensor],
        momentum: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        """``tensors``, from the gradients divided by ``grad_scale``. m stays where ``found_inf`` is not 0."""
        for indices in self.batches:
            ahead = [self._momentum(i, grads[i], momentum, grad_scale, found_inf) for i in indices]
            directions = orthogonalised(torch.stack(ahead), self.steps)
            for i, direction in zip(indices, directions, strict=True):
                d = self.tensors[i]
                d.copy_(direction.reshape(d.shape)).mul_(self.factors[i])
        return self.tensors

    def _momentum(
        self, i: int, grad: Tensor, momentum: float, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """The matrix to orthogonalise, in bfloat16; writes m."""
        buffer = self.buffers[i]
        g = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if grad_scale is not None:
            g = g / grad_scale
        if self.maximize:
            g = -g
        m = torch.lerp(buffer.to(g.dtype), g, 1 - momentum)
        buffer.copy_(m if found_inf is None else torch.where(found_inf == 0, m, buffer))
        return (torch.lerp(g, m, momentum) if self.nesterov else m).flatten(1).bfloat16()


def check_parameters(group: dict[str, Any], name_of: Callable[[dict[str, Any], int], str]) -> None:
    """Raises ValueError for parameters of a group on muon that are no matrices, or not whole on this rank."""
    if group["base"] != "muon":
        return
    for i, p in enumerate(group["params"]):
        if is_sharded(p):
            raise ValueError(
                f"{name_of(group, i)} is sharded (DTensor), and base='muon' needs all of its gradient: use "
                "base='adam' for it, or DistributedDataParallel"
            )
        if p.dim() < 2:
            raise ValueError(
                f"{name_of(group, i)} has the shape {tuple(p.shape)}, and base='muon' takes matrices: put it in "
                "a group of another base, as param_groups(model, other={'base': 'adam', 'lr': 3e-4}) does"
            )
