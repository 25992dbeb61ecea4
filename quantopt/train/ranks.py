"""The processes of a training: one, or those that torchrun has started, each with a part of every batch.

All ranks have the whole network, optimizer and data, and draw the same random numbers. Gradients are averaged over
ranks (DistributedDataParallel), and batch norms take the statistics of the whole batch, so that a step is that of one
process up to the rounding of sums. Rank 0 writes and prints.
"""

import contextlib
import copy
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantopt.train.errors import OUT_OF_TIME, InputError, OutOfTime, TrainingError

_Result = TypeVar("_Result")
_ERRORS = (InputError, TrainingError, OutOfTime)


class Left(Exception):
    """This rank has nothing more to do, or rank 0 says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def launched() -> bool:
    """Whether torchrun has started this process and others."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """0 where there is one process."""
    if size() > 1:
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0  # before it has joined the others


def part(count: int) -> slice:
    """Which of ``count`` images of a batch are this rank's."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


@contextmanager
def joined() -> Iterator[None]:
    """Context of a run of all ranks that torchrun has started."""
    if not launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except (*_ERRORS, Left):
        leave()
        raise
    except RuntimeError as error:
        if not _is_of_a_lost_rank(error):
            raise
        if rank():
            raise Left(1) from None
        raise TrainingError(
            "another rank has ended; what it said is above. `--resume` continues from the last checkpoint, with any "
            "number of processes"
        ) from None
    leave()


def leave() -> None:
    """Ends the process group. gloo's thread may still let go of the tensors of the last collective, which takes
    Python's lock; destroy_process_group holds that while it waits for the thread, for ever (torch 2.13)."""
    time.sleep(0.1)
    dist.destroy_process_group()


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "closed by peer" in str(error)


def use_device(device: str) -> None:
    """Makes "cuda" the GPU of this rank. Raises InputError if there is none left for it."""
    if device != "cuda" or size() == 1:
        return
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            "--device",
            f"cuda has {count} GPUs here, too few for rank {local} of this machine: see --nproc-per-node",
        )
    torch.cuda.set_device(local)


# ---- agreement ---------------------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Around what all ranks do and any may refuse: an error of one ends all of them. Rank 0 raises it, the others raise
    `Left`."""
    error: InputError | TrainingError | OutOfTime | None = None
    try:
        yield
    except _ERRORS as raised:
        error = raised
    if size() > 1:
        error = _first_error(error)
    if error is not None:
        raise error


def _first_error(error: Any) -> Any:
    """The error that rank 0 raises, if it or another rank has one."""
    kinds = [kind.__name__ for kind in _ERRORS]
    said = None
    if error is not None:
        argument = error.argument if isinstance(error, InputError) else ""
        said = [kinds.index(type(error).__name__), argument, str(error).removeprefix(f"{argument}: ")]
    answers = [json.loads(text) for text in exchanged(json.dumps(said))]
    first = next((i for i, answer in enumerate(answers) if answer is not None), None)
    if first is None:
        return None
    kind, argument, message = answers[first]
    if rank():
        return Left((2, 1, OUT_OF_TIME)[kind])
    where = f"rank {first}: " if first else ""
    made: Any = (lambda text: InputError(argument, text), TrainingError, OutOfTime)[kind]
    return made(where + message)


def exchanged(text: str) -> list[str]:
    """What each rank has given here."""
    if size() == 1:
        return [text]
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(map(int, lengths))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(parts, nn.functional.pad(own, (0, longest - len(own))))
    return [bytes(p[: int(n)].tolist()).decode() for p, n in zip(parts, lengths, strict=True)]


def check_same(text: str, argument: str, what: str) -> None:
    """Raises InputError on a rank whose ``text`` is not that of rank 0."""
    first = exchanged(text)[0]
    with together():
        if text != first:
            raise InputError(argument, f"{what} here is {text}, and {first} on rank 0")


def one_after_another(load: Callable[[], _Result]) -> _Result:
    """What ``load`` gives, called on the first rank of each machine before the others, which find what it has cached.
    Ranks but 0 print nothing."""
    results = []
    for first in (True, False):
        with together():
            if (size() == 1 or int(os.environ["LOCAL_RANK"]) == 0) == first:
                with quiet():
                    results.append(load())
    return results[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which ranks but 0 print nothing."""
    with contextlib.ExitStack() as stack:
        if rank():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def total(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


# ---- the network -------------------------------------------------------------------------------------------------


def parallel(model: nn.Module) -> nn.Module:
    """What trains the parameters and buffers of ``model`` on all ranks: its own modules stay as they are."""
    if size() == 1:
        return model
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        if type(module) in _SYNCHRONOUS:
            module.__class__ = _SYNCHRONOUS[type(module)]
    return nn.parallel.DistributedDataParallel(twin)


class _Sum(torch.autograd.Function):
    """The sum over ranks. All of them go on with it, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return total(gradients[0].contiguous())


class _WholeBatch(nn.modules.batchnorm._BatchNorm):
    """A batch norm with the mean and variance of the batches of all ranks; any device (SyncBatchNorm needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        exact = x.float()
        count = exact.new_tensor([exact.numel() / exact.shape[1]])
        sums: Tensor = _Sum.apply(torch.cat([exact.sum(dims), count]))  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = exact - mean.view(shape)
        variance: Tensor = _Sum.apply(centred.square().sum(dims)) / count  # type: ignore[no-untyped-call]
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _WholeBatch1d(_WholeBatch, nn.BatchNorm1d):
    pass


class _WholeBatch2d(_WholeBatch, nn.BatchNorm2d):
    pass


_SYNCHRONOUS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _WholeBatch1d,
    nn.BatchNorm2d: _WholeBatch2d,
}
