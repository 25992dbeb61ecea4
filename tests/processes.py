"""Ranks of torch.distributed for tests. They are forked from a server that has imported torch once."""

import multiprocessing
import multiprocessing.connection
import os
import socket
from collections.abc import Callable
from typing import Any

_MODULES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "quantopt.train.cli",
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(
    function: Callable[..., Any], ranks: int, *arguments: Any, torchrun: bool = False
) -> list[int | None]:
    """Runs ``function(rank, *arguments)`` in ``ranks`` processes, with the environment that torchrun gives (with
    ``torchrun``, also what tells that it does); returns their exit codes (negative: the signal that ended them).

    As torchrun does, ends the others where one fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_MODULES))
    environment = dict(os.environ)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    environment |= {"TORCHELASTIC_RUN_ID": "test"} if torchrun else {}
    processes = [
        context.Process(target=_run, args=(function, environment, rank, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    running = list(processes)
    patience = (
        120.0  # seconds, of all together; once one has failed, the others notice by themselves or are killed
    )
    while running:
        ended = multiprocessing.connection.wait([process.sentinel for process in running], patience)
        if not ended:
            for process in running:
                process.kill()
                process.join()
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in processes):
            patience = 20.0
    return [process.exitcode for process in processes]


def _run(
    function: Callable[..., Any], environment: dict[str, str], rank: int, arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank, *arguments)
