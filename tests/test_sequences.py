"""What users do with an optimizer, in random order: the CPU kernels do what the reference does, errors included."""

import copy
import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import MAKERS, same, weights

# Of muon, whose bfloat16 products make of a difference of rounding one that grows, there is tests/test_muon.py.
NAMES = [name for name in MAKERS if "muon" not in name]
SEQUENCES, EACH, LENGTH = 20, 25, 12

BITS: tuple[int | str, ...] = (1, 2, "ternary")
SCALES = ("tensor", "channel", "group")


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 3)
    )


class Session:
    """A model and its optimizer on one backend. Every action draws from a generator of its own, so that two sessions do
    the same."""

    def __init__(self, name: str, bits: int | str, scale: str, backend: str, folder: Path) -> None:
        self.name, self.bits, self.scale, self.backend = name, bits, scale, backend
        self.file = folder / f"{backend}.safetensors"
        self.extra: list[nn.Parameter] = []
        torch.manual_seed(0)
        self.model: Any = net()
        self.opt = self.optimizer()
        self.anneal = quantopt.Anneal(self.opt, 12)
        self.saved = self.state()

    def optimizer(self) -> Any:
        groups = quantopt.param_groups(self.model, bits=self.bits, scale=self.scale)
        for group in groups:
            group["group_size"] = 4
        opt = MAKERS[self.name](groups, lr=0.02, backend=self.backend)
        for p in self.extra:
            opt.add_param_group({"params": [p], "bits": 1})
        return opt

    def state(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            [self.model.state_dict(), self.opt.state_dict(), self.anneal.state_dict(), len(self.extra)], file
        )
        return file.getvalue()

    def data(self, rng: random.Random) -> Tensor:
        return torch.randn(5, 6, generator=torch.Generator().manual_seed(rng.randrange(1000)))

    def quantised(self, rng: random.Random) -> nn.Parameter:
        group = self.opt.param_groups[0]["params"]
        p: nn.Parameter = group[rng.randrange(len(group))]
        return p

    # ---- actions: what they return is compared

    def train(self, rng: random.Random) -> Any:
        for _ in range(rng.randint(1, 3)):
            self.opt.zero_grad()
            loss = self.model(self.data(rng)).square().mean()
            for p in self.extra:
                loss = loss + p.square().mean()
            loss.backward()
            self.opt.step()
            self.anneal.step()
        return weights(self.model)

    def skip_the_anneal(self, rng: random.Random) -> Any:
        self.opt.zero_grad()
        self.model(self.data(rng)).sum().backward()
        self.opt.step()

    def step_without_gradients(self, rng: random.Random) -> Any:
        self.opt.zero_grad()
        self.opt.step()
        self.anneal.step()

    def step_with_some_gradients(self, rng: random.Random) -> Any:
        self.opt.zero_grad()
        self.model(self.data(rng)).square().mean().backward()
        self.quantised(rng).grad = None
        self.opt.step()

    def step_with_nan(self, rng: random.Random) -> Any:
        before = weights(self.model)
        for group in self.opt.param_groups:
            group["error_if_nonfinite"] = True
        try:
            self.opt.zero_grad()
            self.model(self.data(rng) * math.nan).sum().backward()
            self.opt.step()
        finally:
            assert same(before, weights(self.model))
            for group in self.opt.param_groups:
                group["error_if_nonfinite"] = False

    def warm_start(self, rng: random.Random) -> Any:
        torch.manual_seed(rng.randrange(1000))
        self.model.load_state_dict(net().state_dict())

    def swap_and_swap_back(self, rng: random.Random) -> Any:
        before = weights(self.model)
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(0.5)
            out = self.model(self.data(rng))
            for p, w in zip(self.model.parameters(), before, strict=True):
                p.copy_(w)
        return out

    def swap_tensors(self, rng: random.Random) -> Any:
        p = self.quantised(rng)
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(rng.randrange(1000))) * 0.3

    def mask(self, rng: random.Random) -> Any:
        p = self.quantised(rng)
        with torch.no_grad():
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(rng.randrange(1000))) > 0.2)

    def freeze(self, rng: random.Random) -> Any:
        p = self.quantised(rng)
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    def move(self, rng: random.Random) -> Any:
        for p in self.model.parameters():
            p.data = p.data.clone()

    def copied(self, rng: random.Random) -> Any:
        self.model, self.opt, self.extra, self.anneal = copy.deepcopy(
            (self.model, self.opt, self.extra, self.anneal)
        )

    def add_group(self, rng: random.Random) -> Any:
        if len(self.extra) < 2:
            p = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(rng.randrange(1000))))
            self.opt.add_param_group({"params": [p], "bits": 1})
            self.extra.append(p)

    def add_bad_group(self, rng: random.Random) -> Any:
        option = rng.choice(
            [{"bits": 5}, {"scale": "row"}, {"lr": -1.0}, {"momentum": 1.0}, {"group_size": 0}]
        )
        self.opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "bits": 1, **option})

    def bad_option(self, rng: random.Random) -> Any:
        group = self.opt.param_groups[0]
        key, value = rng.choice([("rounding", "up"), ("momentum_dtype", "int8"), ("scale", "row")])
        before, group[key] = group[key], value
        try:
            self.train(rng)
        finally:
            group[key] = before

    def set_lr(self, rng: random.Random) -> Any:
        for group in self.opt.param_groups:
            group["lr"] = rng.choice([0.0, 0.01, 0.02])

    def save(self, rng: random.Random) -> Any:
        self.saved = self.state()

    def resume(self, rng: random.Random) -> Any:
        """In a new process, the model first or the optimizer first."""
        model, opt, anneal, extra = torch.load(io.BytesIO(self.saved), weights_only=True)
        while len(self.extra) < extra:
            self.extra.append(nn.Parameter(torch.ones(3, 5)))
        del self.extra[extra:]
        torch.manual_seed(1)
        self.model = net()
        self.opt = self.optimizer()
        self.anneal = quantopt.Anneal(self.opt, 12)
        for part in (0, 1) if rng.random() < 0.5 else (1, 0):
            self.model.load_state_dict(model) if part == 0 else self.opt.load_state_dict(opt)
        self.anneal.load_state_dict(anneal)

    def load_bad_state(self, rng: random.Random) -> Any:
        state = self.opt.state_dict()
        before = weights(self.model)
        kind = rng.randrange(4)
        if kind == 0:
            state["param_groups"] = state["param_groups"][:-1]
        elif kind == 1:
            state["param_groups"][0]["lr"] = -1.0
        elif kind == 2:
            state["param_groups"] = [
                {k: v for k, v in g.items() if k != "bits"} for g in state["param_groups"]
            ]
        else:
            state["state"] = {i: {k: v[None] for k, v in s.items()} for i, s in state["state"].items()}
        try:
            self.opt.load_state_dict(copy.deepcopy(state))
        finally:
            assert same(before, weights(self.model))

    def quantized(self, rng: random.Random) -> Any:
        with torch.no_grad(), self.opt.quantized():
            return self.model(self.data(rng))

    def error_inside_a_view(self, rng: random.Random) -> Any:
        with self.opt.quantized():
            raise RuntimeError("inside")

    def step_inside_a_view(self, rng: random.Random) -> Any:
        with self.opt.latent():
            self.opt.step()

    def latent(self, rng: random.Random) -> Any:
        with torch.no_grad(), self.opt.latent():
            return self.model(self.data(rng))

    def metrics(self, rng: random.Random) -> Any:
        return [torch.tensor(list(g.values())[1:], dtype=torch.float64) for g in self.opt.metrics()]

    def pack(self, rng: random.Random) -> Any:
        packed = quantopt.pack(self.model, self.opt)
        x = self.data(rng)
        with torch.no_grad(), self.opt.quantized():
            torch.testing.assert_close(packed(x), self.model(x), rtol=1e-4, atol=1e-5)
        return packed(x)

    def save_and_load_packed(self, rng: random.Random) -> Any:
        packed = quantopt.pack(self.model, self.opt)
        quantopt.save(packed, self.file)
        loaded = quantopt.load(self.file, net())
        x = self.data(rng)
        assert torch.equal(loaded(x), packed(x))

    def load_a_bad_file(self, rng: random.Random) -> Any:
        self.file.write_bytes(b"no packed model")
        try:
            quantopt.load(self.file, net())
        except quantopt.packing.PackedFileError as error:
            raise ValueError(str(error).replace(self.backend, "")) from None


ACTIONS = [
    name
    for name, f in vars(Session).items()
    if callable(f) and name not in ("__init__", "optimizer", "state")
]
ACTIONS = [name for name in ACTIONS if name not in ("data", "quantised")] + ["train"] * 6


def outcome(session: Session, action: str, seed: int) -> tuple[str, list[Tensor]]:
    torch.manual_seed(seed)  # stochastic signs
    try:
        result = getattr(session, action)(random.Random(seed))
    except AssertionError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}", weights(session.model)
    values = [] if result is None else [result] if isinstance(result, Tensor) else result
    return "done", [*values, *weights(session.model)]


@pytest.mark.parametrize("chunk", range(SEQUENCES))
@pytest.mark.filterwarnings("ignore:.*does not hold the weights")
def test_sequences(chunk: int, tmp_path: Path) -> None:
    for sequence in range(chunk * EACH, (chunk + 1) * EACH):
        rng = random.Random(sequence)
        name, bits, scale = rng.choice(NAMES), rng.choice(BITS), rng.choice(SCALES)
        if name == "binaryconnect-stochastic":
            bits = 1
        sessions = [Session(name, bits, scale, backend, tmp_path) for backend in ("cpu", "reference")]
        done = []
        for _ in range(LENGTH):
            action, seed = rng.choice(ACTIONS), rng.randrange(1 << 30)
            done.append(action)
            (said, values), (said_by_reference, expected) = (outcome(s, action, seed) for s in sessions)
            where = f"sequence {sequence}: {name}, {bits=}, {scale=}, after {done}"
            assert said == said_by_reference, where
            for value, right in zip(values, expected, strict=True):
                torch.testing.assert_close(
                    value, right, rtol=1e-3, atol=1e-4, msg=lambda m, w=where: f"{w}: {m}"
                )
