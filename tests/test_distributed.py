"""Training on several processes, sharded and not, equals that of one. The cases are in distributed_*.py."""

import datetime
import json
import os
import socket
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distributed_fsdp2  # noqa: F401 # its cases
import distributed_gradients  # noqa: F401
from distributed_network import CASES, RANKS

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    results: dict[str, str] = {}
    try:
        for name, function in CASES.items():
            results[name] = "hangs"
            function()
            results[name] = ""
        dist.destroy_process_group()
    except BaseException:  # the other ranks wait for this one now: no case after it can run
        results[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each rank, the traceback of each case, "" of those that passed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_case(results: list[dict[str, str]], name: str) -> None:
    failures = [result.get(name, "not run, as an earlier case failed") for result in results]
    assert not any(failures), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
