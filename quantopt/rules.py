"""The records of an optimizer step: the rules and their facts, the bases, the hyper-parameters, the arguments.

A rule is what the constraint to levels does with the base direction d; a base is where d comes from. Every rule runs on
every base, on every backend. csrc/core/{rules,base,hyper}.h say the same for the compiled kernels, and
tests/test_rules.py holds the two equal.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """What the optimizers, the checks and the kernels need to know about a rule beside its equation."""

    name: str
    quantised: bool = True  # has levels, and so a scale
    latent: bool = False  # keeps a latent weight; the network runs with a function of it
    dynamic_scale: bool = False  # the scale may follow the weights


RULES = {
    rule.name: rule
    for rule in (
        Rule("none", quantised=False),
        Rule("askew"),
        Rule("askew_gradient"),
        Rule("askew_memory", latent=True),
        Rule("splitting", latent=True, dynamic_scale=True),
        Rule("alternating", latent=True, dynamic_scale=True),
        Rule("prox"),
    )
}

# Of the kernels. sgd: momentum, Nesterov. adam. given: d is the gradient as the caller left it, or Muon's direction
# (quantopt/optim/muon.py).
BASES = ("sgd", "adam", "given")

# The numbers that may change from step to step, in the order in which they lie in the float64 tensor `hyper`.
HYPER = (
    "lr",  # eta (gamma of the splitting)
    "momentum",  # beta; beta1 of Adam
    "beta2",
    "adam_eps",
    "weight_decay",
    "epsilon",  # AskewSGD: e in [0, 1]
    "rate",  # AskewSGD: r per step; infinite with a latent: the exact projection
    "cap",  # AskewSGD: bound of the restoring step in units of t
    "bound",  # of the latent, in units of hi (askew_memory) or of latent_bounds (alternating); of askew and
    # askew_gradient infinite: as printed, else the weights are clamped to [-hi, hi]
    "kappa",  # STAM, BinaryRelax: relaxation weight; infinite: hard
    "lam",  # STAM alternating: pull of the latent towards its level
    "threshold",  # ProxQuant: lam_k; infinite: hard
)


class StepRecord(NamedTuple):
    """The arguments of the op ``quantopt::fused_step``, in its order: one step of ``params`` in place.

    At lr = 0 momentum and steps change alone: params, latents and scales stay as they are.
    Tensors of a list belong to the parameter at the same index. A list is empty where there is no such state.
    """

    rule: str  # of RULES
    base: str  # of BASES
    params: Sequence[Tensor]  # what the network runs with; all of one dtype and on one device
    grads: Sequence[Tensor]  # at params; same shapes, dtypes and strides
    momentum_buffers: Sequence[
        Tensor
    ]  # m of SGD or Adam, float32 or bfloat16; empty for momentum 0 and "given"
    exp_avg_sqs: Sequence[Tensor]  # v of Adam, float32, or bfloat16 with a state_seed
    latents: Sequence[Tensor]  # l, x or u of a latent rule, else master weights, float32
    scales: Sequence[Tensor]  # float32, [1], [channels] or [channels, groups]; written where dynamic
    latent_bounds: Sequence[
        Tensor
    ]  # float32, [1], [channels] or as scales: unit of `bound` in the alternating rule
    steps: Sequence[Tensor]  # number of the step, float32, counted up here; for Adam and stochastic rounding
    hyper: Tensor  # hyper_tensor(...), on the CPU (read now) or on the device of params (read by the kernels)
    levels: int = 2  # K of the grid
    group_size: int = 0  # elements per scale where scales are [channels, groups]
    dynamic_scale: bool = False  # first replace each scale by the mean |point| of its elements
    nesterov: bool = False
    maximize: bool = False
    decoupled: bool = False  # weight decay acts before the step instead of in the gradient or velocity
    seed: int = -1  # at least 0: rounds bfloat16 params stochastically; -1: to nearest
    state_seed: int = (
        -1
    )  # at least 0 where exp_avg_sqs are bfloat16, which are rounded stochastically; else -1
    grad_scale: Tensor | None = None  # one float32, of torch.amp.GradScaler: gradients are divided by it
    found_inf: Tensor | None = None  # one float32: where not 0, nothing is changed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with the names that errors give them."""
        for field, value in zip(self._fields, self, strict=True):
            if isinstance(value, Tensor):
                yield field, value
            elif isinstance(value, Sequence) and not isinstance(value, str):
                yield from ((f"{field}[{i}]", tensor) for i, tensor in enumerate(value))

    def check_meta(self) -> None:
        """Raises ValueError if one tensor is on the meta device and another is not; ``hyper`` may be on the CPU."""
        on_meta = bool(self.params) and self.params[0].is_meta
        for name, tensor in self.tensors():
            if tensor.is_meta != on_meta and not (name == "hyper" and on_meta):
                raise ValueError(
                    f"fused_step: {name} is on {tensor.device}, params[0] on {self.params[0].device}"
                )
