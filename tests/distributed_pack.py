"""Cases of packing: FSDP2, tensor parallelism, DDP, torch.compile."""

import copy
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint, replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import quantopt
from distributed_gradients import Normed
from distributed_network import (
    MAKERS,
    WRAPPINGS,
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
)
from quantopt.nn.linear import BinaryModule


def same_packed(packed: Any, plain: Any) -> None:
    """Bits and scales, and what is not packed; the types are those of one process."""
    assert [type(m) for m in packed.modules()] == [type(m) for m in plain.modules()]
    assert any(isinstance(m, BinaryModule) for m in packed.modules())
    ours, theirs = packed.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert type(value) is Tensor, key
        torch.testing.assert_close(value, theirs[key], atol=0 if key.endswith("bits") else 1e-6, rtol=1e-5)


def of_this_rank(packed: Any, all_ranks: bool) -> bool:
    """Whether this rank has a copy, as it must."""
    assert (packed is not None) == (all_ranks or dist.get_rank() == 0)
    return packed is not None


@case
def packed_copies_of_sharded_models_are_those_of_the_whole() -> None:
    for i, wrapping in enumerate(("root", "layers", "copies of shards", "nested", "together")):
        model, plain = WRAPPINGS[wrapping](network()), network()
        model[0].register_forward_hook(lambda *_: None)
        rule, scale = (("askew", "channel"), ("binaryconnect", "tensor"), ("stam", "group"))[i % 3]
        made = [quantopt.param_groups(m, scale=scale, skip=("4.*",)) for m in (model, plain)]
        for group in made:
            group[0]["group_size"] = 4
        opt, reference = (MAKERS[rule](g) for g in made)
        train(model, opt, mine(batch(0)))
        train(plain, reference, batch(0))
        if wrapping == "root":
            with torch.no_grad():
                model(batch(9))  # leaves gathered weights
        for all_ranks in (False, True):
            packed = quantopt.pack(model, opt, all_ranks=all_ranks)
            if of_this_rank(packed, all_ranks):
                same_packed(packed, quantopt.pack(plain, reference))
                assert len(packed[0]._forward_hooks) == 1 and not packed[0]._forward_pre_hooks
                assert torch.equal(copy.deepcopy(packed)(batch(3)), packed(batch(3)))
        train(model, opt, mine(batch(1)))  # the model is what it was
        train(plain, reference, batch(1))
        same_network(model, plain)


@case
def levels_are_read_off_sharded_weights() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.embedding, self.head = nn.Embedding(12, 32), nn.Linear(32, 12, bias=False)
            self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)
            self.head.weight = self.embedding.weight

    model, plain = Wide(), Wide()
    fully_shard(model.up)
    fully_shard(model)
    opt, reference = (MAKERS["askew"](groups(m)) for m in (model, plain))
    with pytest.raises(ValueError, match="no weight of the model lies on"):
        quantopt.pack(model, all_ranks=True)
    with opt.quantized(), reference.quantized():
        packed, right = quantopt.pack(model, all_ranks=True), quantopt.pack(plain)
    same_packed(packed, right)
    assert packed.head.weight is packed.embedding.weight


@case
def no_rank_has_more_than_one_whole_weight() -> None:
    whole: list[weakref.ref[Tensor]] = []
    most = 0
    full_tensor = DTensor.full_tensor

    def recorded(self: DTensor, **options: Any) -> Tensor:
        nonlocal most
        result = full_tensor(self, **options)
        if result.dim() == 2:
            whole.append(weakref.ref(result))
        most = max(most, sum(made() is not None for made in whole))
        return result

    model = sharded(network())
    opt = MAKERS["askew"](groups(model))
    with mock.patch.object(DTensor, "full_tensor", recorded):
        of_this_rank(quantopt.pack(model, opt), False)
        with opt.quantized(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_this_rank(quantopt.pack(model), False)
    assert len(whole) >= 8
    assert most == 1


@case
def batch_norms_of_sharded_models_are_folded() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5), nn.BatchNorm1d(5)
        )

    model, plain = make(), make()
    for layer in model:
        if not isinstance(layer, nn.ReLU):
            fully_shard(layer)
    fully_shard(model)
    opt, reference = (MAKERS["askew"](groups(m)) for m in (model, plain))
    for m, o in ((model, opt), (plain, reference)):
        train(m, o, batch(0))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):  # on all ranks
        quantopt.pack(model, opt, fold_batchnorm=True)
    variance = model.eval()[1].running_var
    before = variance.clone()
    if dist.get_rank() == 0:  # buffers are those of the rank
        variance.fill_(torch.nan)
    said = "not finite" if dist.get_rank() == 0 else "refused on another rank"
    with pytest.raises(ValueError, match=said):
        quantopt.pack(model, opt, fold_batchnorm=True)
    variance.copy_(before)
    packed = quantopt.pack(model, opt, fold_batchnorm=True)
    if packed is not None:
        same_packed(packed, quantopt.pack(plain.eval(), reference, fold_batchnorm=True))
        with reference.quantized(), torch.no_grad():
            torch.testing.assert_close(packed(batch(3)), plain(batch(3)))


@case
def each_stage_of_a_pipeline_gets_its_copy() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    stage, rank = mesh.get_coordinate()
    model, plain = sharded(network(), mesh=mesh["data"]), network()
    opt, reference = (MAKERS["askew"](groups(m)) for m in (model, plain))
    train(model, opt, batch(stage).chunk(2)[rank])
    train(plain, reference, batch(stage))
    packed = quantopt.pack(model, opt)
    assert (packed is not None) == (rank == 0)
    if packed is not None:
        same_packed(packed, quantopt.pack(plain, reference))


@case
def the_other_composable_functions_of_torch_are_no_part_of_the_copy() -> None:
    model, copies = network(), network()
    for layer in layers(model):
        checkpoint(layer)
    sharded(model)
    replicate(copies)
    for m in (model, copies):
        opt = MAKERS["askew"](groups(m))
        train(m, opt, mine(batch(0)))
        packed = quantopt.pack(m, opt, all_ranks=True)
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in packed.modules())
        with opt.quantized(), torch.no_grad():
            close(packed(batch(3)), m(batch(3)))
        train(m, opt, mine(batch(1)))  # with its hooks


@case
def models_within_ddp_and_compile_are_packed() -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    opt = MAKERS["askew"](groups(wrapped))
    train(wrapped, opt, mine(batch(0)))
    right = quantopt.pack(wrapped.module, opt)
    for model in (wrapped, torch.compile(wrapped), nn.parallel.DistributedDataParallel(wrapped.module)):
        packed = quantopt.pack(model, opt)  # on all ranks
        assert type(packed) is nn.Sequential
        same_packed(packed, right)
    model = network()
    for block in (model[2], model):
        block.compile(backend="eager")
    model = fully_shard(model)
    opt = MAKERS["askew"](groups(model))
    train(model, opt, mine(batch(0)))
    same_packed(quantopt.pack(torch.compile(model), opt, all_ranks=True), right)


# ---- tensor parallelism ------------------------------------------------------------------------------------------


@case
def packed_copies_of_tensor_parallel_models_are_those_of_the_whole() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, plain = Normed(), Normed()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    opt, reference = (quantopt.AskewSGD(groups(m), lr=0.05) for m in (model, plain))
    row, column = mesh.get_coordinate()
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    train(model, opt, x.chunk(2)[row].chunk(2, 1)[column])
    train(plain, reference, x)
    packed = quantopt.pack(model, opt, all_ranks=True)
    same_packed(packed, quantopt.pack(plain, reference))
    with reference.quantized(), torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x))


@case
def scales_in_rows_that_are_cut_are_refused_at_construction() -> None:
    mesh = init_device_mesh("cpu", (4,))
    for scale in ("channel", "group"):
        model = Normed()
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        made = groups(model, scale, group_size=4)
        with pytest.raises(
            ValueError, match=r"'down.weight' is sharded as .*Shard\(dim=1\).*use scale='tensor'"
        ):
            quantopt.AskewSGD(made)
        made = quantopt.param_groups(
            model, scale=scale, skip=("down.*",)
        )  # ColwiseParallel leaves rows whole
        made[0]["group_size"] = 3
        train(
            model, quantopt.AskewSGD(made), torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
        )


@case
def packed_layers_cannot_be_parallelised() -> None:
    mesh = init_device_mesh("cpu", (4,))
    for plan in (ColwiseParallel(), RowwiseParallel()):
        packed = quantopt.nn.BinaryLinear(8, 8)
        with pytest.raises(NotImplementedError, match=r"only supports? nn.Linear"):
            parallelize_module(packed, mesh, plan)
    replicated = distribute_tensor(torch.randn(3, 8), mesh, [Replicate()])
    way = pytest.raises(TypeError, match=r"DTensor.*packed layers run whole on one rank")
    for compute in ("exact", "int8"):
        with way:
            quantopt.nn.BinaryLinear(8, 8, compute=compute)(replicated)
    with way, torch.no_grad():
        quantopt.nn.BinaryLinear(8, 8)(replicated)
    with way:
        quantopt.nn.BinaryConv2d(8, 8, 3)(distribute_tensor(torch.randn(3, 8, 5, 5), mesh, [Replicate()]))
