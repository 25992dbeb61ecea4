"""Cases of gradients that are not finite, of tensor parallelism, FSDP1 and DDP."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import quantopt
from distributed_network import (
    MAKERS,
    backward,
    batch,
    case,
    close,
    groups,
    layers,
    mine,
    network,
    same_network,
    sharded,
    train,
    whole,
)


@case
def all_ranks_raise_for_a_gradient_that_is_not_finite_on_one() -> None:
    flat, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for rank, name in ((2, "0.weight"), (1, "2.0.weight"), (0, "2.2.bias"), (2, "4.weight")):
        model = network()
        for layer, mesh in zip(layers(model), (flat, grid, grid["b"], flat), strict=True):
            fully_shard(layer, mesh=mesh)
        opt = quantopt.AskewSGD(groups(model), lr=0.05)
        train(model, opt, mine(batch(0)))
        for group in opt.param_groups:
            group["error_if_nonfinite"] = True
        train(model, opt, mine(batch(1)))
        backward(model, mine(batch(2)))
        if dist.get_rank() == rank:
            grad = dict(model.named_parameters())[name].grad.to_local()
            grad.view(-1)[:1] = torch.inf
        before = {key: whole(p.detach()) for key, p in model.named_parameters()}
        with pytest.raises(FloatingPointError, match=f"'{name}' has a gradient that is not finite"):
            opt.step()
        close({key: whole(p.detach()) for key, p in model.named_parameters()}, before)
        train(model, opt, mine(batch(3)))


@case
def asking_the_other_ranks_costs_nothing_where_it_is_not_asked_for() -> None:
    model = sharded(network())
    opt = MAKERS["askew"](groups(model))
    plain = nn.parallel.DistributedDataParallel(network())
    asking = quantopt.AskewSGD(groups(plain), lr=0.05, error_if_nonfinite=True)
    train(model, opt, mine(batch(0)))
    train(plain, asking, mine(batch(0)))
    backward(model, mine(batch(1)))
    backward(plain, mine(batch(1)))
    with mock.patch.object(dist, "all_reduce", side_effect=AssertionError):
        opt.step()
        asking.step()


@case
def a_grad_scaler_skips_the_step_of_all_ranks() -> None:
    for error_if_nonfinite in (False, True):
        model, plain = sharded(network()), network()
        make = lambda m: quantopt.AskewSGD(groups(m), lr=0.05, error_if_nonfinite=error_if_nonfinite)  # noqa: B023,E731
        opt, reference = make(model), make(plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(3):
            model.zero_grad()
            scaler.scale(model(mine(batch(i))).square().mean()).backward()
            if i == 1 and dist.get_rank() == 2:
                model[0].weight.grad.to_local().view(-1)[0] = torch.inf
            scaler.step(opt)
            scaler.update()
            if i != 1:
                train(plain, reference, batch(i))
        same_network(model, plain)


# ---- tensor parallelism, FSDP1, DDP ------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)).relu())
        return y


@case
def tensor_parallel_training_is_the_training_of_the_whole() -> None:
    def same_weights(model: nn.Module, plain: nn.Module) -> None:
        close({key: whole(p.detach()) for key, p in model.named_parameters()}, dict(plain.named_parameters()))

    for shape in ((1, 4), (2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        model, plain = Normed(), Normed()
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(),
        }
        parallelize_module(model, mesh["tensor"], plan)
        if shape[0] > 1:
            fully_shard(model, mesh=mesh["data"])
        opt, reference = (
            quantopt.AskewSGD(groups(m), lr=0.05, momentum=0.9, error_if_nonfinite=shape[0] > 1)
            for m in (model, plain)
        )
        for i in range(3):
            x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(i))
            row, column = mesh.get_coordinate()
            data = x.chunk(shape[0])[row].chunk(shape[1], 1)[column]
            train(model, opt, data)
            train(plain, reference, x)
            same_weights(model, plain)
            with opt.quantized(), reference.quantized():
                same_weights(model, plain)
            ours, theirs = opt.quantization(model.down.weight), reference.quantization(plain.down.weight)
            assert torch.equal(ours.codes, theirs.codes)
        with pytest.raises(ValueError, match=r"weight' is sharded as .*use scale='tensor'"):
            train(model, quantopt.AskewSGD(groups(model, "channel")), data)


@case
def fsdp1_is_refused_by_name() -> None:
    refused = pytest.raises(ValueError, match=r"flat shard of FSDP1 .*bits=1 needs FSDP2")
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        wrap = lambda m, **kw: FSDP1(m, device_id=torch.device("cpu"), sharding_strategy=strategy, **kw)  # noqa: B023,E731
        for use_orig_params in (True, False):
            model = wrap(network(), use_orig_params=use_orig_params)
            with refused:
                quantopt.AskewSGD(model.parameters(), bits=1)
            for skip in (("first", "last"), ()):
                with refused:
                    quantopt.param_groups(model, skip=skip)
            with pytest.raises(ValueError, match="flat shard of FSDP1"):
                quantopt.param_groups(model, bits=0, filter_fn=lambda module, name: 1)
            assert [group["bits"] for group in quantopt.param_groups(model, bits=0)] == [0]
            model = wrap(network(), use_orig_params=use_orig_params)
            with pytest.raises(ValueError, match="error_if_nonfinite=True needs FSDP2"):
                quantopt.AskewSGD(model.parameters(), bits=0, error_if_nonfinite=True)
            plain = network()
            opt, reference = (
                quantopt.AskewSGD([{"params": m.parameters(), "bits": 0}], lr=0.1) for m in (model, plain)
            )
            for i in range(2):
                train(model, opt, mine(batch(i)))
                train(plain, reference, batch(i))
            with torch.no_grad():
                close(model(batch(9)), plain(batch(9)))
        model = network()
        opt = MAKERS["binaryconnect"](groups(model))
        model = wrap(model, use_orig_params=True)  # the optimizer cannot know of it
        backward(model, mine(batch(0)))
        for use in (opt.step, opt.metrics, opt.quantized, opt.latent):
            with refused, contextlib.ExitStack() as stack:
                used: Any = use()
                stack.enter_context(used)
        assert not opt.state


@case
def ddp_trains_as_one_process() -> None:
    for make in MAKERS.values():
        model, plain = nn.parallel.DistributedDataParallel(network()), network()
        opt, reference = make(groups(model)), make(groups(plain))
        for i in range(2):
            train(model, opt, mine(batch(i)))
            train(plain, reference, batch(i))
            with opt.quantized(), reference.quantized(), torch.no_grad():
                close(model(batch(9)), plain(batch(9)))
        close(dict(model.module.state_dict()), dict(plain.state_dict()))
