"""Bytes of memory for each parameter of every optimizer and its peers, from the tensors that are there after real steps
of a model of 1M parameters.

    python bench/memory.py        prints the table of docs/memory.md and writes bench/results/memory.json
"""

import argparse
import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import write_json
from torch import Tensor, nn

import quantopt

RESULTS = Path(__file__).resolve().parent / "results/memory.json"
SIDE = 1024  # of the one matrix of the model
STEPS = 2  # PARQ keeps its latent from the second step on
F32, BF16 = torch.float32, torch.bfloat16
LOW = {"momentum_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}

Make = Callable[[nn.Parameter], Any]


def ours(make: Callable[..., Any], **options: Any) -> Make:
    return lambda p: make([p], **{"bits": 1, "lr": 0.01, **options})


# (name, dtype of the parameters, how it is made)
OURS: list[tuple[str, torch.dtype, Make]] = [
    (name, dtype, ours(make, **options))
    for dtype in (F32, BF16)
    for name, make, options in (
        ("AskewSGD", quantopt.AskewSGD, {}),
        ("AskewSGD(memory=True)", quantopt.AskewSGD, {"memory": True}),
        ('AskewSGD(base="muon")', quantopt.AskewSGD, {"base": "muon"}),
        ("AskewAdam", quantopt.AskewAdam, {}),
        ("AskewAdam(memory=True)", quantopt.AskewAdam, {"memory": True}),
        ("AskewAdam(memory=True), bfloat16 moments", quantopt.AskewAdam, {"memory": True, **LOW}),
        ('STAM(form="alternating")', quantopt.STAM, {}),
        ('STAM(form="splitting")', quantopt.STAM, {"form": "splitting"}),
        ("BinaryConnect", quantopt.BinaryConnect, {}),
        ("BinaryRelax", quantopt.BinaryRelax, {}),
        ("ProxQuant", quantopt.ProxQuant, {}),
    )
]
OURS += [
    (f'{make.__name__}(rounding="stochastic"), {what}', BF16, ours(make, rounding="stochastic", **LOW))
    for make, what in ((quantopt.AskewSGD, "bfloat16 momentum"), (quantopt.AskewAdam, "bfloat16 moments"))
]


def torch_optimizer(name: str, **options: Any) -> Make:
    return lambda p: getattr(torch.optim, name)([p], lr=0.01, **options)


def adam_of_8_bits(p: nn.Parameter) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([p], lr=0.01)


def parq(p: nn.Parameter) -> Any:
    from torchao.prototype.parq import ProxPARQ, QuantOptimizer, UnifQuantizer

    base = torch.optim.AdamW([{"params": [p], "quant_bits": 1}], lr=0.01)
    return QuantOptimizer(base, UnifQuantizer(), ProxPARQ(anneal_start=0, anneal_end=10), quant_period=1)


# (name, module that must be installed, how it is made), each for both dtypes
PEERS: list[tuple[str, str, Make]] = [
    ("torch SGD(momentum=0.9)", "torch", torch_optimizer("SGD", momentum=0.9)),
    ("torch AdamW", "torch", torch_optimizer("AdamW")),
    ("torch Muon", "torch", torch_optimizer("Muon")),
    ("bitsandbytes AdamW8bit", "bitsandbytes", adam_of_8_bits),
    ("torchao PARQ on AdamW", "torchao", parq),
]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a state."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            yield from tensors_in([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by its address."""
    found = (t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def measured(make: Make, dtype: torch.dtype) -> dict[str, float]:
    """Bytes for each parameter after STEPS steps: of the parameter, its gradient, the optimizer's state, and what it
    keeps beside that."""
    torch.manual_seed(0)
    gc.freeze()  # of what is there already, gc.get_objects() says nothing
    try:
        return _measured(make, dtype)
    finally:
        gc.unfreeze()


def _measured(make: Make, dtype: torch.dtype) -> dict[str, float]:
    p = nn.Parameter((torch.randn(SIDE, SIDE) / 32).to(dtype))
    p.grad = torch.randn_like(p)
    own = storages([p, p.grad])
    opt = make(p)
    for _ in range(STEPS):
        opt.step()
    state = {at: n for at, n in storages(tensors_in(dict(opt.state))).items() if at not in own}
    gc.collect()
    alive = storages(t for t in gc.get_objects() if issubclass(type(t), Tensor))
    held = {at: n for at, n in alive.items() if at not in own and at not in state}
    parts = {
        "parameter": p.nbytes,
        "gradient": p.grad.nbytes,
        "state": sum(state.values()),
        "other": sum(held.values()),
    }
    return {name: round(n / p.numel(), 3) for name, n in parts.items()}


def labelled(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"optimizer": name, "dtype": str(dtype).removeprefix("torch.")}


def our_rows() -> list[dict[str, Any]]:
    return [labelled(name, dtype) | measured(make, dtype) for name, dtype, make in OURS]


def peer_rows() -> list[dict[str, Any]]:
    """Where a peer is not installed or does not work, its rows say why."""
    rows = []
    for dtype in (F32, BF16):
        for name, module, make in PEERS:
            if importlib.util.find_spec(module) is None:
                result: dict[str, Any] = {"why": f"{module} is not installed"}
            else:
                try:
                    result = measured(make, dtype)
                except Exception as error:  # the peer's own
                    result = {"why": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            rows.append(labelled(name, dtype) | result)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, those of float32 parameters first, then by the bytes of parameter and state."""
    lines = [
        "| optimizer | parameter | gradient | state | other | all but the gradient |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        chosen = [r for r in rows if r["dtype"] == dtype]
        lines.append(f"| **{dtype} parameters** | | | | | |")
        for r in sorted(chosen, key=lambda r: kept(r) if "state" in r else float("inf")):
            if "why" in r:
                lines.append(f"| {r['optimizer']} | | | | | {r['why']} |")
                continue
            cells = [f"{r[key]:.3g}" for key in ("parameter", "gradient", "state", "other")]
            lines.append(f"| {' | '.join([r['optimizer'], *cells, f'{kept(r):.3g}'])} |")
    return "\n".join(lines)


def kept(r: Mapping[str, Any]) -> float:
    return float(r["parameter"] + r["state"] + r["other"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", default=str(RESULTS), help=f"default: {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*our_rows(), *peer_rows()]
    write_json(rows, arguments.json, 1)
    print(table(rows))


if __name__ == "__main__":
    main()
