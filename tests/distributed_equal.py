"""Cases of exact gradients, CPU offload, and checkpoints of torch.distributed.checkpoint on disk."""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import quantopt
from distributed_network import (
    MAKERS,
    RANKS,
    batch,
    case,
    close,
    full_weights,
    groups,
    mine,
    network,
    same_network,
    sharded,
    train,
    whole,
)
from quantopt.optim.sharded import local


class Exact(nn.Module):
    """A network whose gradients are the same for any weights, and whole numbers over a power of two: sums of them are
    exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        factors = [torch.arange(-4.0, 5.0), torch.arange(1.0, 4.0)]
        return self.first(x) @ factors[0] + self.second(x) @ factors[1]


def whole_numbers(i: int) -> Tensor:
    return torch.randint(-3, 4, (8, 6), generator=torch.Generator().manual_seed(i)).float()


@case
def with_exact_gradients_training_is_bitwise_that_of_one_process() -> None:
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "rank"))["rank"]
    meshes = {2: pairs, 4: init_device_mesh("cpu", (RANKS,))}
    scales = {
        "askew": ("channel",),
        "askew-memory": ("tensor",),
        "adam": ("group",),
        "stam": ("channel",),
        "binaryconnect": ("tensor", "group"),
    }
    for name, make in MAKERS.items():
        for scale in scales[name]:
            plain = Exact()
            reference = make(groups(plain, scale, group_size=4))
            for i in range(3):
                step(plain, reference, whole_numbers(i))
            exact = not any(reference._dynamic_scale(reference.whole(g)) for g in reference.param_groups)
            for ranks, mesh in meshes.items():
                for parallel in ("FSDP2", "DDP"):
                    if parallel == "DDP":
                        model: Any = nn.parallel.DistributedDataParallel(
                            Exact(), process_group=mesh.get_group()
                        )
                    else:
                        model = sharded(Exact(), mesh=mesh)
                    opt = make(groups(model, scale, group_size=4))
                    for i in range(3):
                        step(model, opt, whole_numbers(i).chunk(ranks)[mesh.get_local_rank()])
                    for p, right in zip(model.parameters(), plain.parameters(), strict=True):
                        ours = whole(p.detach())
                        assert not exact or torch.equal(ours, right), (name, scale, ranks, parallel)
                        torch.testing.assert_close(ours, right.detach(), atol=1e-6, rtol=0)


def step(model: nn.Module, opt: Any, x: Tensor) -> None:
    model.zero_grad()
    model(x).mean().backward()
    opt.step()


@case
def shards_are_rounded_with_other_random_numbers_and_their_copies_with_the_same() -> None:
    """Equal weights with equal gradients, sharded in three ways, and beside them in the same group not sharded."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    for mesh, placements in (
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Shard(0)]),
        (grid["shard"], [Shard(0)]),
    ):
        for options in ({"rounding": "stochastic"}, {"exp_avg_sq_dtype": "bfloat16", "rounding": "nearest"}):
            params = [
                nn.Parameter(distribute_tensor(torch.ones(256, 4, dtype=torch.bfloat16), mesh, kind))
                for kind in (placements, [Replicate()] * mesh.ndim)
            ]
            opt = quantopt.AskewAdam(params, bits=0, lr=0.003, **options)
            for _ in range(3):
                for p in params:
                    p.grad = torch.full_like(p, 1.5)
                opt.step()
            key = "exp_avg_sq" if "exp_avg_sq_dtype" in options else None
            own, copied = (local(p.detach() if key is None else opt.state[p][key]) for p in params)
            everywhere = [torch.empty_like(own) for _ in range(RANKS)]
            dist.all_gather(everywhere, own)
            parts = {rank: tuple(grid.mesh[:, rank % 2].tolist()) for rank in range(RANKS)}
            for rank, other in itertools.combinations(range(RANKS), 2):
                shared = Replicate() in placements or mesh.ndim == 1
                same = shared and other in parts[rank]
                assert torch.equal(everywhere[rank], everywhere[other]) == same, (
                    placements,
                    options,
                    rank,
                    other,
                )
            assert not torch.equal(own, copied[: len(own)])
            everywhere = [torch.empty_like(copied) for _ in range(RANKS)]
            dist.all_gather(everywhere, copied)
            assert all(torch.equal(copied, other) for other in everywhere)


@case
def shards_on_the_cpu_under_an_offload_policy() -> None:
    """Pinned memory, and gradients that come from a device, need an accelerator."""
    for name in ("askew-memory", "adam", "binaryconnect"):
        make = MAKERS[name]
        model = sharded(network(), offload_policy=CPUOffloadPolicy(pin_memory=False))
        plain = network()
        opt, reference = (make(groups(m, "channel")) for m in (model, plain))
        for i in range(3):
            train(model, opt, mine(batch(i)))
            train(plain, reference, batch(i))
        same_network(model, plain)
        with opt.quantized(), reference.quantized():
            same_network(model, plain)
        assert {
            t.device.type for state in opt.state.values() for t in state.values() if isinstance(t, Tensor)
        } == {"cpu"}, name
        packed = quantopt.pack(model, opt)
        if packed is not None:
            close(packed.state_dict(), quantopt.pack(plain, reference).state_dict())


# ---- checkpoints on disk -----------------------------------------------------------------------------------------


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A directory of all ranks."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    try:
        yield Path(made[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made[0])


@case
def checkpoints_on_disk_are_continued_by_another_number_of_ranks() -> None:
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "rank"))["rank"]
    two: dict[str, Any] = {"process_group": pairs.get_group()}
    one: dict[str, Any] = {"no_dist": True}
    wraps: dict[int, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Tensor], Tensor]]] = {
        1: (network, one, lambda x: x),
        2: (lambda: sharded(network(), mesh=pairs), two, lambda x: x.chunk(2)[pairs.get_local_rank()]),
        4: (lambda: sharded(network()), {}, mine),
    }
    cases = (("askew-memory", "channel"), ("adam", "group"), ("stam", "tensor"))
    with shared_folder() as folder:
        for rule, scale in cases:
            plain = network()
            reference = MAKERS[rule](groups(plain, scale, group_size=4))
            anneal = quantopt.Anneal(reference, total_steps=6)
            for i in range(5):
                train(plain, reference, batch(i))
                anneal.step()
            for before, after in ((2, 1), (1, 2), (2, 4)):
                # each pair, and each single rank, has a place of its own; the four ranks read that of the first
                place = folder / f"{rule}-{before}-{after}" / str(dist.get_rank() // before)
                make, group, part = wraps[before]
                model = make()
                opt, anneal = annealed(model, rule, scale)
                for i in range(3):
                    train(model, opt, part(batch(i)))
                    anneal.step()
                states = get_state_dict(model, opt)
                checkpoints.save({"model": states[0], "opt": states[1]}, checkpoint_id=place, **group)
                dist.barrier()
                make, group, part = wraps[after]
                if before == 1 or after == 4:
                    place = place.parent / "0"
                model = make()
                opt, anneal = annealed(model, rule, scale)
                states = get_state_dict(model, opt)
                loaded = {"model": states[0], "opt": states[1]}
                checkpoints.load(loaded, checkpoint_id=place, **group)
                set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
                for i in range(3, 5):
                    train(model, opt, part(batch(i)))
                    anneal.step()
                close(full_weights(model), full_weights(plain))
                assert opt.param_groups[0]["anneal_step"] == 5


@case
def checkpoints_on_disk_keep_the_dtype_of_second_moments_that_the_optimizer_has() -> None:
    """A group lacks the key where it is float32, as those of earlier versions do: docs/memory.md says what follows."""

    def trained(dtype: str) -> tuple[nn.Module, Any]:
        model = sharded(network())
        opt = quantopt.AskewAdam(groups(model), lr=0.01, exp_avg_sq_dtype=dtype)
        train(model, opt, mine(batch(0)))
        return model, opt

    def loaded(place: Path, dtype: str) -> Any:
        model, opt = trained(dtype)
        states = get_state_dict(model, opt)[1]
        checkpoints.load({"opt": states}, checkpoint_id=place)
        set_state_dict(model, opt, model_state_dict={}, optim_state_dict=states)
        return opt

    with shared_folder() as folder:
        saved = {}
        for dtype in ("float32", "bfloat16"):
            model, saved[dtype] = trained(dtype)
            checkpoints.save({"opt": get_state_dict(model, saved[dtype])[1]}, checkpoint_id=folder / dtype)
        for before, after in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
            opt = loaded(folder / before, after)
            assert opt.param_groups[0].get("exp_avg_sq_dtype", "float32") == after
            for group in opt.param_groups:  # as the page has it: another after the load
                group["exp_avg_sq_dtype"] = before
            opt.metrics()
            for ours, theirs in zip(
                opt.param_groups[0]["params"], saved[before].param_groups[0]["params"], strict=True
            ):
                v, right = opt.state[ours]["exp_avg_sq"], saved[before].state[theirs]["exp_avg_sq"]
                assert v.dtype == right.dtype == getattr(torch, before)
                assert torch.equal(whole(v), whole(right))
        with pytest.raises(checkpoints.api.CheckpointException, match=r"Missing key .*exp_avg_sq_dtype"):
            loaded(folder / "float32", "bfloat16")


@case
def the_code_of_the_page_runs() -> None:
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    before = Path.cwd()
    with shared_folder() as folder, mock.patch.object(dist, "init_process_group"):
        os.chdir(folder)
        try:
            for block in blocks:
                exec(compile(block, str(page), "exec"), names)
        finally:
            os.chdir(before)
        dist.barrier()
        assert (folder / "model.safetensors").exists()
    assert names["anneal"].optimizer.param_groups[0]["anneal_step"] == 4
    assert (names["packed"] is None) == (dist.get_rank() != 0)


def annealed(model: nn.Module, rule: str, scale: str) -> tuple[Any, Any]:
    opt = MAKERS[rule](groups(model, scale, group_size=4))
    return opt, quantopt.Anneal(opt, total_steps=6)
