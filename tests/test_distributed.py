"""FSDP2 on two processes: sharded training and its checkpoint equal those of one process."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import quantopt

MAKERS: dict[str, Callable[..., Any]] = {
    "askew": lambda g: quantopt.AskewSGD(g, lr=0.05, weight_decay=0.01, epsilon=0.5),
    "askew-memory": lambda g: quantopt.AskewSGD(g, lr=0.05, memory=True, epsilon=0.5),
    "adam": lambda g: quantopt.AskewAdam(g, lr=0.01),
    "stam": lambda g: quantopt.STAM(g, lr=0.05, kappa=0.5),
    "binaryconnect": lambda g: quantopt.BinaryConnect(g, lr=0.05),
}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def steps(model: nn.Module, opt: Any) -> None:
    for i in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, make in MAKERS.items():
        for scale in ("tensor", "channel"):
            model = network()
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(model)
            opt = make(quantopt.param_groups(model, scale=scale, skip=()))
            steps(model, opt)
            result = {"weights": [whole(p.detach()) for p in model.parameters()]}
            with opt.quantized():
                result["projected"] = [whole(p.detach()) for p in model.parameters()]
            quantised = opt.param_groups[0]["params"][1]
            result["codes"] = opt.quantization(quantised).codes
            saved = get_optimizer_state_dict(model, opt)["state"]["2.weight"]
            result["saved"] = {key: whole(value) for key, value in saved.items()}
            results[f"{name}-{scale}"] = result
    if rank == 0:
        torch.save(results, Path(folder) / "sharded.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_training_is_the_training_of_the_whole() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(port, folder), nprocs=2)
        sharded = torch.load(Path(folder) / "sharded.pt", weights_only=True)
    for name, make in MAKERS.items():
        for scale in ("tensor", "channel"):
            model = network()
            opt = make(quantopt.param_groups(model, scale=scale, skip=()))
            steps(model, opt)
            ours = sharded[f"{name}-{scale}"]
            for a, p in zip(ours["weights"], model.parameters(), strict=True):
                torch.testing.assert_close(a, p.detach(), atol=1e-6, rtol=1e-5)
            quantised = opt.param_groups[0]["params"][1]
            assert torch.equal(ours["codes"], opt.quantization(quantised).codes)
            with opt.quantized():
                for a, p in zip(ours["projected"], model.parameters(), strict=True):
                    torch.testing.assert_close(a, p.detach(), atol=1e-6, rtol=1e-5)
            for key, value in ours["saved"].items():
                torch.testing.assert_close(value, opt.state[quantised][key], atol=1e-6, rtol=1e-5)
