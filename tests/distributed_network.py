"""What tests/distributed_*.py share: a network, the ways to shard it, and what must be equal.

The cases all run in the same RANKS processes, each case on every rank. Each rank also trains the whole network by
itself, on the batches of all ranks: what is sharded must equal it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import quantopt

RANKS = 4
MAKERS: dict[str, Callable[..., Any]] = {
    "askew": lambda g: quantopt.AskewSGD(g, lr=0.05, weight_decay=0.01, epsilon=0.5),
    "askew-memory": lambda g: quantopt.AskewSGD(g, lr=0.05, memory=True, epsilon=0.5),
    "adam": lambda g: quantopt.AskewAdam(g, lr=0.01),
    "stam": lambda g: quantopt.STAM(g, lr=0.05, kappa=0.5),
    "binaryconnect": lambda g: quantopt.BinaryConnect(g, lr=0.05),
}
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def network() -> nn.Sequential:
    """Rows that the ranks cannot share evenly; of the last layer one rank has none."""
    torch.manual_seed(5)
    block = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6))
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), block, nn.ReLU(), nn.Linear(6, 3))


def batch(i: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(i))


def mine(x: Tensor) -> Tensor:
    return x.chunk(RANKS)[dist.get_rank()]


def groups(model: nn.Module, scale: str = "tensor", **options: Any) -> list[dict[str, Any]]:
    made = quantopt.param_groups(model, scale=scale, skip=())
    made[0].update(options)
    return made


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).float().square().mean().backward()


def train(model: nn.Module, opt: Any, x: Tensor) -> None:
    backward(model, x)
    opt.step()


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def sharded(model: nn.Module, **options: Any) -> Any:
    """Each layer by itself, then the rest."""
    for layer in layers(model):
        fully_shard(layer, **options)
    options.pop("reshard_after_forward", None)
    return fully_shard(model, **options)


def prefetching(model: nn.Sequential) -> Any:
    linear = layers(model)
    sharded(model)
    for layer in linear:
        layer.set_modules_to_forward_prefetch([other for other in linear if other is not layer])
    return model


def nested(model: nn.Sequential) -> Any:
    fully_shard(model[2][0])
    fully_shard(model[2])
    return fully_shard(model)


def together(model: nn.Sequential) -> Any:
    fully_shard([model[0], model[4]])
    return fully_shard(model)


def freeing(model: nn.Sequential) -> Any:
    sharded(model).set_reshard_after_forward(True)
    return model


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "root": fully_shard,
    "layers": sharded,
    "kept after forward": lambda m: sharded(m, reshard_after_forward=False),
    "pairs of ranks after forward": lambda m: sharded(m, reshard_after_forward=2),
    "root freed after forward": freeing,
    "copies of shards": lambda m: sharded(m, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))),
    "prefetched": prefetching,
    "nested": nested,
    "together": together,
}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, by way of torch's checkpoints."""
    return dcp.get_model_state_dict(model, options=dcp.StateDictOptions(full_state_dict=True))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def same_network(model: nn.Module, plain: nn.Module) -> None:
    """A forward, which may come first and may leave gathered weights, and the weights."""
    with torch.no_grad():
        close(model(batch(99)), plain(batch(99)))
    close({name: whole(p.detach()) for name, p in model.state_dict().items()}, dict(plain.state_dict()))
