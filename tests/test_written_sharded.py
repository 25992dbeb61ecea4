"""Weights that somebody else writes into sharded parameters; a world of one rank is enough to see it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import quantopt
from optim_cases import MAKERS


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["askew-memory", "stam", "stam-splitting", "binaryrelax"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("write", ["tensor", "shard"])
def test_a_written_shard_counts(name: str, backend: str, write: str, mesh: Any) -> None:
    plain = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    sharded = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    opts = [
        MAKERS[name]([{"params": [p], "bits": 1}], lr=0.1, scale="channel", backend=backend)
        for p in (plain, sharded)
    ]
    for i in range(4):
        for p, opt in zip((plain, sharded), opts, strict=True):
            grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(i))
            if i == 2:
                new = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
                with torch.no_grad():
                    if p is plain:
                        p.copy_(new)
                    elif write == "tensor":
                        p.copy_(distribute_tensor(new, mesh, [Shard(0)]))
                    else:
                        p.to_local().copy_(new)
            p.grad = grad if p is plain else distribute_tensor(grad, mesh, [Shard(0)])
            opt.step()
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.full_tensor(), plain)
    latents = [opt.state[p]["latent"] for p, opt in zip((plain, sharded), opts, strict=True)]
    assert torch.equal(latents[1].full_tensor(), latents[0])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (quantopt.AskewSGD, dict(scale="channel")),
        (quantopt.STAM, dict(scale="group")),
        (quantopt.STAM, dict(scale="tensor")),  # whose binary level is per channel
        (quantopt.STAM, dict(scale="group-mean", form="splitting")),
        (quantopt.BinaryConnect, dict(scale="group")),
    ],
)
def test_rows_that_ranks_share_are_refused_when_the_group_is_added(
    make: Any, options: Any, mesh: Any
) -> None:
    whole, cut = (
        nn.Parameter(distribute_tensor(torch.randn(6, 8), mesh, [placement]))
        for placement in (Shard(0), Shard(1))
    )
    opt = make([{"params": [whole], "bits": 1}], **options)
    with pytest.raises(ValueError, match=r"sharded as .*Shard\(0\); use scale='tensor'"):
        opt.add_param_group({"params": [cut], "bits": 1})
    assert len(opt.param_groups) == 1
    quantopt.AskewSGD([{"params": [cut], "bits": 1}], scale="tensor")
