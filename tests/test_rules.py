"""The records of a step say the same in Python, in C++ and in the operator's schema."""

from typing import Any

import pytest
import torch

from quantopt import _extension
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.reference import step as reference
from quantopt.reference.rule import GRADIENTS, STEPS
from quantopt.rules import BASES, HYPER, RULES, StepRecord

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


@needs_extension
def test_the_compiled_tables_are_those_of_python() -> None:
    from quantopt import _C

    assert _C.rules() == [tuple(rule) for rule in RULES.values()]
    assert tuple(_C.bases()) == BASES
    assert tuple(_C.hyper_names()) == HYPER


@needs_extension
def test_the_record_is_the_schema_of_the_operator() -> None:
    arguments = torch.ops.quantopt.fused_step.default._schema.arguments
    assert tuple(argument.name for argument in arguments) == StepRecord._fields
    defaults = {
        argument.name: argument.default_value for argument in arguments if argument.has_default_value()
    }
    assert defaults == StepRecord._field_defaults
    written = {argument.name for argument in arguments if argument.is_write}
    assert written == {"params", "momentum_buffers", "exp_avg_sqs", "latents", "scales", "steps"}


def test_every_rule_has_a_reference_step() -> None:
    assert set(reference.STEPS) == set(STEPS) == set(RULES)
    assert set(GRADIENTS) <= set(RULES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(rule="lasso"), "unknown rule 'lasso'"),
        (dict(base="lion"), "unknown base 'lion'"),
        (dict(levels=5), "levels must be"),
        (dict(dynamic_scale=True), "no dynamic scale"),
        (dict(hyper=torch.zeros(3, dtype=torch.float64)), "hyper must hold 12"),
        (dict(grads=[]), "grads has 0 tensors"),
        (dict(grads=[torch.zeros(4)] * 2), r"grads\[0\] has shape"),
        (dict(scales=[]), "scales has 0 tensors"),
        (dict(base="given"), "momentum_buffers has 2 tensors; 0 are needed"),
        (dict(base="adam"), "exp_avg_sqs has 0 tensors"),
        (dict(exp_avg_sqs=[torch.zeros(2, 3)] * 2), "exp_avg_sqs has 2 tensors; 0 are needed"),
        (dict(rule="splitting"), "latents has 0 tensors"),
        (dict(seed=1), "steps has 0 tensors"),
        (dict(seed=1, steps=[torch.zeros(())] * 2), "stochastic rounding"),
    ],
)
def test_the_reference_refuses_what_does_not_fit(change: dict[str, Any], named: str) -> None:
    def tensors() -> list[torch.Tensor]:
        return [torch.ones(2, 3), torch.ones(2, 3)]

    record = StepRecord(
        "askew", "sgd", tensors(), tensors(), tensors(), [], [], [torch.ones(1)] * 2, [], [],
        hyper_tensor(lr=0.1, epsilon=0.5),
    )._replace(**change)  # fmt: skip
    with pytest.raises(ValueError, match=named):
        fused_step(record, backend="reference")
    assert all(torch.equal(p, torch.ones(2, 3)) for p in record.params)
