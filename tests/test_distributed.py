"""Training on several processes, sharded and not, equals that of one. The cases are in distributed_*.py."""

import datetime
import json
import traceback
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

import distributed_equal  # noqa: F401 # its cases
import distributed_fsdp2  # noqa: F401
import distributed_gradients  # noqa: F401
import distributed_pack  # noqa: F401
from distributed_network import CASES, RANKS
from processes import start
from quantopt.train import ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results: dict[str, str] = {}
    try:
        for name, function in CASES.items():
            results[name] = "hangs"
            function()
            results[name] = ""
        ranks.leave()
    except BaseException:  # the other ranks wait for this one now: no case after it can run
        results[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each rank, the traceback of each case, "" of those that passed."""
    folder = tmp_path_factory.mktemp("ranks")
    start(worker, RANKS, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_case(results: list[dict[str, str]], name: str) -> None:
    failures = [result.get(name, "not run, as an earlier case failed") for result in results]
    assert not any(failures), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
