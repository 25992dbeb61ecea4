"""A rank of an FSDP2 run is killed in mid-run; another number of ranks goes on from the checkpoint."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

import quantopt
from distributed_network import MAKERS, batch, groups, network, sharded, train
from processes import start
from quantopt.train import ranks

STEPS = 6


def run(rank: int, folder: str, killed_at: int) -> None:
    """Trains with a checkpoint after every second step, from the last one that is complete. Rank 1 is killed in the
    middle of the step `killed_at`."""
    dist.init_process_group("gloo")
    model = sharded(network())
    opt = MAKERS["askew-memory"](groups(model, "channel"))
    anneal = quantopt.Anneal(opt, total_steps=STEPS)
    weights, state = get_state_dict(model, opt)
    done = max(
        (int(place.name) for place in Path(folder).iterdir() if (place / ".metadata").exists()), default=0
    )
    if done:
        loaded = {"model": weights, "opt": state}
        dcp.load(loaded, checkpoint_id=f"{folder}/{done}")
        set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    for i in range(done, STEPS):
        if rank == 1 and i == killed_at:
            model[0].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        train(model, opt, batch(i).tensor_split(dist.get_world_size())[rank])
        anneal.step()
        if i % 2 == 1:
            weights, state = get_state_dict(model, opt)
            dcp.save({"model": weights, "opt": state}, checkpoint_id=f"{folder}/{i + 1}")
    ranks.leave()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_killed_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    plain = network()
    opt = MAKERS["askew-memory"](groups(plain, "channel"))
    anneal = quantopt.Anneal(opt, total_steps=STEPS)
    for i in range(STEPS):
        train(plain, opt, batch(i))
        anneal.step()
    codes = start(run, 2, str(tmp_path), 3)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert {place.name for place in tmp_path.iterdir()} == {"2"}
    shutil.copytree(tmp_path, tmp_path.parent / "again")
    for count, folder in ((4, tmp_path), (1, tmp_path.parent / "again")):
        assert start(run, count, str(folder), -1) == [0] * count
        model = network()
        with torch.no_grad():
            model[0].weight.zero_()
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder / str(STEPS), no_dist=True)
        torch.testing.assert_close(state["model"], get_model_state_dict(plain), atol=1e-6, rtol=1e-5)
