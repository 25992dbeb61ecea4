"""The records of a step say the same in Python, in C++ and in the operator's schema."""

import pytest
import torch

from quantopt import _extension
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
