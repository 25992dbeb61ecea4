"""One optimizer step of a list of parameters: the op ``quantopt::fused_step`` and what runs it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt import _extension, backends
from quantopt.reference.step import fused_step as _reference_step

# The numbers of the float64 tensor `hyper`, in the order of csrc/core/hyper.h.
HYPER = (
    "lr",  # eta (gamma of the splitting)
    "momentum",  # beta; beta1 of Adam
    "beta2",
    "adam_eps",
    "weight_decay",
    "epsilon",  # AskewSGD: e in [0, 1]
    "rate",  # AskewSGD: r per step; infinite with memory: the exact projection
    "cap",  # AskewSGD: bound of the restoring step in units of t
    "bound",  # latent bound: ub of hi (memory), clip of sigma (BinaryConnect, BinaryRelax)
    "kappa",  # STAM, BinaryRelax: relaxation weight; infinite: hard
    "lam",  # STAM alternating: pull of the latent towards its level
    "threshold",  # ProxQuant: lam_k; infinite: hard
)

RULES = ("base", "askew", "askew_gradient", "askew_memory", "splitting", "alternating", "prox")


def hyper_tensor(**values: float) -> Tensor:
    """The tensor `hyper` of :func:`fused_step`; what is not given is 0."""
    unknown = set(values) - set(HYPER)
    if unknown:
        raise ValueError(f"hyper_tensor: unknown {sorted(unknown)}; known are {list(HYPER)}")
    return torch.tensor([float(values.get(name, 0.0)) for name in HYPER], dtype=torch.float64)


def fused_step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],
    seconds: Sequence[Tensor],
    latents: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    *,
    backend: str = "auto",
    **options: Any,
) -> None:
    """Steps all ``params`` (one dtype, one device) in place, in one pass over memory.

    Args:
        rule: one of :data:`RULES`; the equations are in docs/algorithms.md and :mod:`quantopt.reference`.
        params: what the network runs with, float32, bfloat16 or float16 (the reference takes float64 too).
        grads: gradients at ``params``, same shapes, dtypes and strides.
        momentums: m of SGD or Adam, float32 or bfloat16; empty for momentum 0.
        seconds: v of Adam, float32; empty for SGD.
        latents: l, x or u (rules askew_memory, splitting, alternating), else fp32 master weights or empty.
        scales: sigma or a, float32, shape [1], [channels] or [channels, groups]; empty for the base rule.
            Written when ``moving_levels``.
        sigmas: bound of the latents of the alternating rule, [1] or [channels]; empty: not bounded.
        steps: the number of the step, one float32 each, incremented here; needed by Adam and stochastic rounding.
        hyper: :func:`hyper_tensor`, on the CPU (read now), or on the device of ``params`` (read when the kernels run,
            so that replays of a captured graph follow it; the reference reads it now).
        levels: K of the grid. group_size: elements per scale where scales are [channels, groups].
        moving_levels: replace the scales by mean|r| (splitting) or mean|u| (alternating) per channel first.
        nesterov, maximize, decoupled: as in torch.optim; decoupled weight decay acts before the step.
        seed: >= 0 rounds bfloat16 ``params`` stochastically; -1 rounds to nearest.
        grad_scale, found_inf: one float32 each, of torch.amp.GradScaler; the step is skipped where found_inf != 0.
        backend: see :mod:`quantopt.backends`.

    Raises:
        ValueError, TypeError: where tensors do not fit each other; nothing has been changed then.
    """
    if not params:
        return
    dtype = momentums[0].dtype if momentums and momentums[0].element_size() == 2 else params[0].dtype
    choice = backends.choose("fused_step", params[0].device, dtype, backend)
    lists = (params, grads, momentums, seconds, latents, scales, sigmas, steps)
    if choice.name == "reference":
        _reference_step(rule, *lists, hyper, **options)
    elif choice.name == "triton":
        from quantopt.kernels import step as triton_step  # imports triton

        triton_step.fused_step(rule, *lists, hyper, **options)
    else:
        torch.ops.quantopt.fused_step(rule, *lists, hyper, **options)


if _extension.error is None:

    @torch.library.register_fake("quantopt::fused_step")
    def _fake(*args: Any, **kwargs: Any) -> None:
        return None
