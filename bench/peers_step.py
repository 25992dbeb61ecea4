"""Peers of the step beside torch's optimizers, and checks of what those of bench/step.py do."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import missing
from peers import set_system_threads
from torch import Tensor, nn

DEEPSPEED = "DeepSpeedCPUAdam"


def deepspeed_adam(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer | tuple[str, str]:
    """DeepSpeed's Adam for CPUs without weight decay, or a status and why there is none.

    Its operator is compiled at the first use, which takes minutes; it then stands in TORCH_EXTENSIONS_DIR.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return "not installed", "pip install deepspeed"
    beside = str(Path(sys.executable).parent)  # where ninja is, which builds the operator
    os.environ["PATH"] = os.pathsep.join((beside, os.environ.get("PATH", "")))
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        result = DeepSpeedCPUAdam(params, lr=lr, adamw_mode=False)
    except Exception as error:  # the compiler's and DeepSpeed's own
        return "failed", f"does not build: {type(error).__name__}: {str(error).splitlines()[0]}"
    set_system_threads()
    return result


def add_deepspeed(
    case: str,
    params: list[nn.Parameter],
    lr: float,
    fault: Callable[[torch.optim.Optimizer, list[nn.Parameter]], str | None],
    functions: dict[str, Callable[[], object]],
) -> list[dict[str, object]]:
    """Adds its step to ``functions`` if the first one is right; else returns the row that says why not."""
    opt = deepspeed_adam(params, lr)
    if isinstance(opt, tuple):
        return [missing(case, DEEPSPEED, *opt)]
    if why := fault(opt, params):
        return [missing(case, DEEPSPEED, "failed", why)]
    functions[DEEPSPEED] = opt.step
    return []


def check_same(
    name: str, theirs: Callable[..., object], ours: Callable[..., object], tensors: list[Tensor]
) -> None:
    """Stops unless both leave the same in copies of the tensors, up to rounding and weights at a threshold."""
    copies = [[t.clone() for t in tensors] for _ in range(2)]
    theirs(*copies[0])
    ours(*copies[1])
    for index, (a, b, before) in enumerate(zip(*copies, tensors, strict=True)):
        right = float(torch.isclose(a, b, rtol=1e-4, atol=1e-6).float().mean()) if a.numel() else 1.0
        if right < 0.999 or (a.numel() and torch.equal(a, before) != torch.equal(b, before)):
            raise SystemExit(f"{name}: its step is right for {right:.1%} of tensor {index}: no peer")
