"""Where weight decay acts in each rule on each base: the table of docs/algorithms.md, against steps in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from quantopt import _extension
from quantopt.optim.options import BASE_OPTIONS
from test_muon import torch_direction

pytestmark = pytest.mark.usefixtures("one_thread")

LR, DECAY = 0.1, 0.5

# With the constraint open (e = 1, kappa = 0, no prox, no clip), so that a rule is the base step with its decay. The
# values of the last two columns, with the option decoupled_weight_decay off and on: in the "gradient", in the "step",
# "before" it, in the "prox" of the box; None: refused.
RULES: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "none": (lambda p, **k: quantopt.AskewSGD([{"params": p, "bits": 0}], **k), "gradient", "before"),
    "prox": (quantopt.ProxQuant, "gradient", "before"),
    "askew": (quantopt.AskewSGD, "step", "before"),
    "askew-gradient": (lambda p, **k: quantopt.AskewSGD(p, constrain="gradient", **k), "step", "before"),
    "askew-memory": (lambda p, **k: quantopt.AskewSGD(p, memory=True, **k), "before", None),
    "alternating": (quantopt.STAM, "before", None),
    "splitting": (lambda p, **k: quantopt.STAM(p, form="splitting", **k), "prox", None),
    "binaryconnect": (quantopt.BinaryConnect, "before", None),
    "binaryrelax": (lambda p, **k: quantopt.BinaryRelax(p, kappa=0.0, **k), "before", None),
}


class Base:
    """The direction of each gradient, in float64."""

    def __init__(self, name: str) -> None:
        self.name, self.k, self.m, self.v = name, 0, torch.zeros(()), torch.zeros(())

    def __call__(self, g: Tensor) -> Tensor:
        self.k += 1
        if self.name == "sgd":
            self.m = 0.9 * self.m + g
            return self.m
        if self.name == "adam":
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
            return (self.m / (1 - 0.9**self.k)) / ((self.v / (1 - 0.999**self.k)).sqrt() + 1e-8)
        if self.name == "muon":
            self.m = self.m + 0.05 * (g - self.m)
            return torch_direction(g + 0.95 * (self.m - g)).double()
        return g


def expected(where: str, base: str, w: Tensor, grads: list[Tensor]) -> Tensor:
    direction = Base(base)
    for g in grads:
        if where == "gradient":
            w = w - LR * direction(g + DECAY * w)
        elif where == "step":
            w = w - LR * (direction(g) + DECAY * w)
        elif where == "before":
            w = w * (1 - LR * DECAY) - LR * direction(g)
        else:
            w = (w - LR * direction(g)) / (1 + LR * DECAY)
    return w


@pytest.mark.parametrize("dtype", [torch.float64] + [torch.float32] * (_extension.error is None), ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("base", BASE_OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_the_table(rule: str, base: str, decoupled: bool, dtype: torch.dtype) -> None:
    make, *columns = RULES[rule]
    where = columns[decoupled]
    if where == "gradient" and base in ("given", "muon"):  # there is no gradient to add to
        where = "step"
    generator = torch.Generator().manual_seed(2)
    w = torch.rand(5, 7, generator=generator, dtype=torch.float64) * 0.2 + 0.2
    grads = [torch.randn(5, 7, generator=generator, dtype=torch.float64) * 0.1 for _ in range(3)]
    p = nn.Parameter(w.to(dtype, copy=True))
    options = dict(lr=LR, weight_decay=DECAY, base=base, scale="none", decoupled_weight_decay=decoupled)
    if rule != "none":
        options["bits"] = 1
    if where is None or (rule, base) == ("askew-gradient", "muon"):
        with pytest.raises(
            ValueError, match="decoupled_weight_decay=True" if where is None else "constrain="
        ):
            make([p], **options)
        return
    opt = make([p], **options)
    for g in grads:
        p.grad = g.to(dtype)
        opt.step()
    latent = opt.state[p]["latent"] if rule == "binaryconnect" else p.detach()
    rounding = 1e-9 if dtype == torch.float64 else 1e-6
    if base == "muon" and dtype == torch.float32:
        rounding = 3 * LR * 2**-7  # of a bfloat16 number in the iteration
    torch.testing.assert_close(latent.double(), expected(where, base, w, grads), atol=rounding, rtol=0)


@pytest.mark.parametrize("base", BASE_OPTIONS)
def test_the_constraint_bends_the_decay_of_askew_but_not_the_decoupled_one(base: str) -> None:
    """Of infeasible weights that are driven inward: they move outward at the restoring speed."""
    sign = torch.tensor([1.0, -1.0, 1.0])[:, None] * torch.tensor([1.0, 1.0, -1.0, 1.0])

    def step(start: float, **options: Any) -> Tensor:
        p = nn.Parameter(start * sign)
        opt = quantopt.AskewSGD([p], bits=1, scale="none", epsilon=0.01, lr=LR, base=base, **options)
        p.grad = sign.clone()
        opt.step()
        return p.detach()

    bent = step(0.4)
    assert bool((bent * sign > 0.4).all())
    assert torch.equal(step(0.4, weight_decay=DECAY), bent)
    decoupled = step(0.4, weight_decay=DECAY, decoupled_weight_decay=True)
    torch.testing.assert_close(decoupled, step(0.4 * (1 - LR * DECAY)))
    assert not torch.equal(decoupled, bent)
