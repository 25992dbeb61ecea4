"""The optimizers that tests run over, and a small network to train with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt


def on_muon(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``make`` on muon, with the groups that have vectors on Adam."""

    def has_vectors(group: Any) -> bool:
        return isinstance(group, dict) and any(p.dim() < 2 for p in group["params"])

    def made(params: Any, **more: Any) -> Any:
        groups = [{**group, "base": "adam"} if has_vectors(group) else group for group in params]
        return make(groups, base="muon", **options, **more)

    return made


BF16_MOMENTS = dict(momentum_dtype="bfloat16", exp_avg_sq_dtype="bfloat16")

MAKERS: dict[str, Callable[..., Any]] = {
    "askew": quantopt.AskewSGD,
    "askew-gradient": lambda p, **k: quantopt.AskewSGD(p, constrain="gradient", **k),
    "askew-printed": lambda p, **k: quantopt.AskewSGD(p, clamp=False, **k),
    "askew-printed-gradient": lambda p, **k: quantopt.AskewSGD(p, clamp=False, constrain="gradient", **k),
    "askew-memory": lambda p, **k: quantopt.AskewSGD(p, memory=True, **k),
    "askew-memory-limited": lambda p, **k: quantopt.AskewSGD(p, memory=True, rate=0.1, **k),
    "adam": quantopt.AskewAdam,
    "adam-printed": lambda p, **k: quantopt.AskewAdam(p, clamp=False, **k),
    "adam-memory": lambda p, **k: quantopt.AskewAdam(p, memory=True, **k),
    "adam-bf16-moments": lambda p, **k: quantopt.AskewAdam(p, memory=True, **BF16_MOMENTS, **k),
    "stam": quantopt.STAM,
    "stam-splitting": lambda p, **k: quantopt.STAM(p, form="splitting", **k),
    "binaryconnect": quantopt.BinaryConnect,
    "binaryconnect-stochastic": lambda p, **k: quantopt.BinaryConnect(p, stochastic=True, **k),
    "binaryrelax": quantopt.BinaryRelax,
    "proxquant": quantopt.ProxQuant,
    "askew-given": lambda p, **k: quantopt.AskewSGD(p, base="given", **k),
    "stam-adam": lambda p, **k: quantopt.STAM(p, base="adam", **k),
    "stam-splitting-adam": lambda p, **k: quantopt.STAM(p, base="adam", form="splitting", **k),
    "binaryrelax-adam": lambda p, **k: quantopt.BinaryRelax(p, base="adam", **k),
    "proxquant-adam": lambda p, **k: quantopt.ProxQuant(p, base="adam", **k),
    "askew-muon": on_muon(quantopt.AskewSGD),
    "stam-muon": on_muon(quantopt.STAM),
    "binaryrelax-muon": on_muon(quantopt.BinaryRelax),
}
every = pytest.mark.parametrize("name", MAKERS)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, bias=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)


def train(model: nn.Module, opt: Any, steps: int, first: int = 0, anneal: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, 2, 6, 6, generator=generator).to(dtype)
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.manual_seed(1000 + i)  # stochastic signs
        opt.step()
        if anneal is not None:
            anneal.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
