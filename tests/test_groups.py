"""Parameter groups: options, defaults, errors, which parameters take part."""

import copy
import inspect
import math
import pydoc
import re
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from old_files import FOLDER, optimizer, parameters
from optim_cases import MAKERS, network
from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import OPTIONS, SHARED


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(lr=math.nan), "lr=nan"), (dict(lr=-1.0), "lr=-1.0"), (dict(lr=math.inf), "lr=inf"),
        (dict(momentum=-0.1), "momentum=-0.1"), (dict(momentum=1.0), "momentum"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(bits=5), "bits=5"), (dict(bits="binary"), "bits='binary'"), (dict(bits=True), "bits=True"),
        (dict(bits=2.0), "bits=2.0"),
        (dict(scale="row"), "scale='row'"), (dict(scale="sawb", bits="ternary"), "scale='sawb'"),
        (dict(scale="sawb"), r"scale='sawb': .*bits=1; use bits of \[2, 3, 4, '17-level'\]"),
        (dict(epsilon=1.5), "epsilon=1.5"), (dict(epsilon=math.nan), "epsilon=nan"),
        (dict(rate=-1.0), "rate"), (dict(rate=math.inf), "rate=inf"), (dict(cap=-0.1), "cap"),
        (dict(constrain="both"), "constrain='both'"), (dict(nesterov=True, momentum=0.0), "nesterov"),
        (dict(group_size=0), "group_size"), (dict(seed=-1), "seed"), (dict(rounding="up"), "rounding"),
        (dict(momentum_dtype="float16"), "momentum_dtype"), (dict(backend="tpu"), "backend='tpu'"),
        (dict(memory=True, constrain="gradient"), "constrain"), (dict(scale="channel-mean"), "channel-mean"),
        (dict(bound=0.5), "bound"), (dict(fused_amp="yes"), "fused_amp='yes'"), (dict(group_size=True), "group_size"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        quantopt.AskewSGD([nn.Parameter(torch.randn(4))], **{"bits": 1, **options})


def test_bad_groups_are_refused_and_not_added() -> None:
    opt = quantopt.AskewSGD([nn.Parameter(torch.randn(4))], bits=1)
    for group, named in [
        (dict(lr=math.nan), "lr"),
        (dict(bits=7), "bits=7"),
        (dict(maximize="no"), "maximize"),
    ]:
        with pytest.raises(ValueError, match=named):
            opt.add_param_group({"params": [nn.Parameter(torch.randn(4))], **group})
        assert len(opt.param_groups) == 1
    for make, options, named in [
        (quantopt.STAM, dict(form="three"), "form='three'"),
        (quantopt.STAM, dict(kappa=-1.0), "kappa"),
        (quantopt.STAM, dict(form="splitting", scale="channel-mean", bits=2), "channel-mean"),
        (quantopt.AskewAdam, dict(betas=(0.9, 1.0)), "betas"),
        (quantopt.BinaryConnect, dict(stochastic=True, bits=2), "stochastic"),
        (quantopt.BinaryConnect, dict(clip=math.nan), "clip"),
    ]:
        with pytest.raises(ValueError, match=named):
            make([nn.Parameter(torch.randn(4, 4))], **{"bits": 1, **options})


@pytest.mark.parametrize("kind", ["sparse", "complex", "zero scale", "nan scale"])
def test_a_refused_step_changes_nothing(kind: str) -> None:
    good, bad = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
    error: type[Exception] = TypeError
    if kind == "complex":
        bad = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    elif kind == "zero scale":
        bad, error = nn.Parameter(torch.zeros(5, 3)), ValueError
    elif kind == "nan scale":
        bad, error = nn.Parameter(torch.full((5, 3), math.nan)), ValueError
    opt = quantopt.AskewSGD([{"params": [good, bad], "param_names": ["good", "bad.weight"]}], bits=1)
    good.grad = torch.randn(5, 3)
    bad.grad = torch.eye(5, 3).to_sparse() if kind == "sparse" else torch.ones_like(bad)
    before = good.detach().clone()
    with pytest.raises(error, match=r"bad\.weight"):
        opt.step()
    assert torch.equal(good, before)


def test_param_groups_choose_weights_by_position_and_name() -> None:
    model = network()
    quantised, rest = quantopt.param_groups(model)
    assert quantised["param_names"] == ["2.weight", "5.weight"] and quantised["bits"] == 1
    assert rest["bits"] == 0 and len(rest["params"]) == 5
    assert len(quantopt.param_groups(model, skip=())[0]["params"]) == 4
    assert quantopt.param_groups(model, skip=("first", "last", "5.*"))[0]["param_names"] == ["2.weight"]
    assert quantopt.param_groups(model, other={"lr": 0.5})[1]["lr"] == 0.5
    for options, named in [
        (dict(bits=5), "bits=5"), (dict(scale="rows"), "scale"), (dict(skip=("nothing*",)), "nothing"),
        (dict(skip=("*",)), "skip"), (dict(scale="sawb"), "scale='sawb': .*bits=1"),
        (dict(scale="sawb", bits=2, filter_fn=lambda module, name: "ternary"), "bits='ternary'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            quantopt.param_groups(model, **options)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert quantopt.param_groups(tied, skip=("last",))[0]["param_names"] == ["0.weight"]


def test_unused_frozen_empty_and_late_parameters() -> None:
    used, unused, empty = (
        nn.Parameter(torch.randn(4, 4)),
        nn.Parameter(torch.randn(4, 4)),
        nn.Parameter(torch.zeros(0, 4)),
    )
    opt = quantopt.STAM([used, unused, empty], bits=1)
    before = unused.detach().clone()
    used.grad, empty.grad = torch.randn(4, 4), torch.zeros(0, 4)
    opt.step()
    assert torch.equal(unused, before) and not opt.state[unused]
    late = nn.Parameter(torch.randn(3, 3))
    opt.add_param_group({"params": [late], "bits": 2})
    late.grad = torch.randn(3, 3)
    used.grad = None  # frozen in mid-run
    kept, moved = used.detach().clone(), late.detach().clone()
    opt.step()
    assert torch.equal(used, kept) and not torch.equal(late, moved)
    assert opt.metrics()[0]["numel"] == 32


def test_defaults_are_those_of_the_document() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]

    def keys(opt: Any, *names: str) -> list[Any]:
        return [opt.param_groups[0][name] for name in names]

    assert keys(quantopt.AskewSGD(p, bits=1), "lr", "momentum", "rate", "cap", "weight_decay") == [
        0.3,
        0.9,
        0.1,
        0.25,
        0.0,
    ]
    assert keys(quantopt.AskewSGD(p, bits=1, memory=True), "lr", "rate", "bound") == [1.0, math.inf, 2.0]
    assert keys(quantopt.AskewSGD([{"params": p, "memory": True}], bits=1), "rate") == [math.inf]
    assert keys(quantopt.STAM(p, bits=1), "lr", "weight_decay", "form", "lam") == [
        1.0,
        3e-3,
        "alternating",
        0.0,
    ]
    assert keys(quantopt.STAM(p, bits=1, form="splitting"), "lr", "weight_decay") == [0.3, 0.0]
    assert keys(quantopt.BinaryConnect(p, bits=1), "lr", "clip") == [0.5, 1.0]
    assert keys(quantopt.BinaryRelax(p, bits=1), "lr", "clip") == [0.3, 1.0]


CLASSES = (
    quantopt.AskewSGD, quantopt.AskewAdam, quantopt.STAM, quantopt.BinaryConnect, quantopt.BinaryRelax,
    quantopt.ProxQuant,
)  # fmt: skip


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize(
    "wrong", ["bit", "weight_decays", "learning_rate", "stochastics", "kapa", "lam_", "Momentum", "params_"]
)
def test_unknown_keywords_are_refused(make: Any, wrong: str) -> None:
    with pytest.raises(TypeError, match=wrong):
        make([nn.Parameter(torch.randn(4))], bits=1, **{wrong: 1})


@pytest.mark.parametrize("make", CLASSES)
def test_constructors_show_every_option_with_its_default(make: Any) -> None:
    shown = inspect.signature(make).parameters
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown.values())
    opt = make([nn.Parameter(torch.randn(4))], bits=1)
    whole = opt.whole(opt.param_groups[0])
    assert set(shown) == {*whole, "params", "fused_amp", "backend"} - {"initial_lr"}
    for key in SHARED:
        expected = "adam" if (make, key) == (quantopt.AskewAdam, "base") else OPTIONS[key].default
        assert whole[key] == expected
        assert shown[key].default == (None if OPTIONS[key].on else expected)
    for key, parameter in shown.items():
        if parameter.default is not None and key not in ("params", "fused_amp", "backend"):
            assert whole[key] == parameter.default
    text = pydoc.render_doc(make, renderer=pydoc.plaintext)
    assert all(f"{key}: " in text for key in shown)


def test_keys_of_the_user_are_saved_and_ignored() -> None:
    def start() -> Any:
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(4, 4))
        group = {"params": [p], "name": "body", "lr_scale": 0.1, "tags": ["a"]}
        return p, quantopt.STAM([group], bits=1, lr=0.1)

    p, opt = start()
    plain = nn.Parameter(p.detach().clone())
    other = quantopt.STAM([plain], bits=1, lr=0.1)
    for q, o in ((p, opt), (plain, other)):
        for i in range(3):
            q.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
            o.step()
    assert torch.equal(p, plain)
    saved = copy.deepcopy(opt.state_dict())
    _, again = start()
    again.param_groups[0]["name"] = "other"
    again.load_state_dict(saved)
    assert [again.param_groups[0][key] for key in ("name", "lr_scale", "tags")] == ["body", 0.1, ["a"]]


def test_a_group_takes_the_defaults_of_its_form() -> None:
    def group(make: Any, *names: str, **options: Any) -> list[Any]:
        constructor = options.pop("constructor", {})
        opt = make([{"params": [nn.Parameter(torch.randn(4, 4))], **options}], bits=1, **constructor)
        return [opt.param_groups[0][name] for name in names]

    names = ("lr", "weight_decay")
    assert group(quantopt.STAM, *names, form="splitting") == [0.3, 0.0]
    assert group(quantopt.STAM, *names, form="alternating", constructor=dict(form="splitting")) == [1.0, 3e-3]
    assert group(quantopt.STAM, *names, base="adam") == [1e-3, 3e-3]
    assert group(quantopt.AskewSGD, "lr", "rate", memory=True) == [1.0, math.inf]
    assert group(quantopt.AskewSGD, "lr", "rate", memory=False, constructor=dict(memory=True)) == [0.3, 0.1]
    assert group(quantopt.BinaryConnect, "lr", base="adam") == [1e-3]
    # what the group or the constructor says holds
    assert group(quantopt.STAM, *names, form="splitting", lr=0.7) == [0.7, 0.0]
    assert group(quantopt.STAM, *names, form="splitting", constructor=dict(lr=0.7)) == [0.7, 0.0]
    for make in CLASSES:
        with pytest.raises(ValueError, match="lr=None: base='given'"):
            make([nn.Parameter(torch.randn(4))], bits=1, base="given")
        assert group(make, "lr", base="given", lr=0.2) == [0.2]


def test_askew_adam_is_askew_sgd_on_adam() -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    opts = [quantopt.AskewAdam(params[:1], bits=1), quantopt.AskewSGD(params[1:], bits=1, base="adam")]
    for opt, p in zip(opts, params, strict=True):
        for i in range(3):
            p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
            opt.step()
    assert torch.equal(*params)
    assert quantopt.AskewAdam(params, bits=1, base="sgd").param_groups[0]["lr"] == 0.3


def test_star_imports_bind_public_names_alone() -> None:
    for module in (quantopt, quantopt.optim):
        bound: dict[str, Any] = {}
        exec(f"from {module.__name__} import *", bound)
        assert {"AskewSGD", "Anneal", "STAM", "param_groups"} <= set(bound)
        assert not {"state", "step", "base", "options", "views"} & set(bound)


def test_groups_of_one_optimizer_may_have_different_bases() -> None:
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    bases = ("sgd", "adam", "given")
    opt = quantopt.AskewSGD(
        [{"params": [p], "base": base, "lr": 0.1} for p, base in zip(params, bases, strict=True)], bits=1
    )
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    others = [quantopt.AskewSGD([p], bits=1, lr=0.1, base=base) for p, base in zip(alone, bases, strict=True)]
    for i in range(3):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        opt.step()
        for other in others:
            other.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)
    assert [sorted(opt.state[p]) for p in params] == [
        ["momentum_buffer", "scale"],
        ["exp_avg", "exp_avg_sq", "scale", "step"],
        ["scale"],
    ]


@pytest.mark.parametrize("name", ["askew", "stam", "binaryconnect", "proxquant"])
def test_a_given_direction_is_the_gradient_as_it_is(name: str) -> None:
    """That of SGD with momentum, computed by the caller: the same steps."""
    ours, theirs = nn.Parameter(torch.randn(6, 5)), None
    theirs = nn.Parameter(ours.detach().clone())
    given = MAKERS[name]([ours], bits=1, lr=0.05, weight_decay=0.0, base="given")
    sgd = MAKERS[name]([theirs], bits=1, lr=0.05, weight_decay=0.0, momentum=0.9)
    buffer = torch.zeros(6, 5)
    for i in range(5):
        g = torch.randn(6, 5, generator=torch.Generator().manual_seed(i))
        buffer = 0.9 * buffer + g
        ours.grad, theirs.grad = buffer.clone(), g
        given.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="nesterov"):
        MAKERS[name]([ours], bits=1, lr=0.05, base="given", nesterov=True)


def test_options_of_another_class_and_none_are_refused() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    for make, group, named in [
        (quantopt.AskewSGD, {"kappa": 1.0}, "kappa=1.0"),
        (quantopt.STAM, {"epsilon": 0.5}, "epsilon=0.5"),
        (quantopt.AskewSGD, {"lr": None}, "lr=None: must be a number"),
        (quantopt.AskewSGD, {"memory": None}, "memory=None: must be True or False"),
        (quantopt.AskewSGD, {"betas": 0.9}, "betas=0.9"),
        (quantopt.AskewSGD, {"base": "lion"}, "base='lion'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(named)):
            make([{"params": [p], **group}], bits=1, lr=0.5)
    with pytest.raises(ValueError, match="base='foo'"):
        quantopt.AskewSGD([p], bits=1, base="foo")


def test_second_moments_in_bfloat16_are_refused_where_there_are_none() -> None:
    p, q = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    narrow = {"exp_avg_sq_dtype": "bfloat16"}
    refused = pytest.raises(ValueError, match="exp_avg_sq_dtype='bfloat16': only groups with base='adam'")
    for make in (quantopt.AskewSGD, quantopt.STAM):
        with refused:
            make([p], bits=1, lr=0.5, **narrow)
        with refused:
            make([{"params": [p], **narrow}, {"params": [q], "base": "adam"}], bits=1, lr=0.5)
        opt = make([{"params": [p]}, {"params": [q], "base": "adam"}], bits=1, lr=0.5, **narrow)
        p.grad = q.grad = torch.ones(4, 4)
        opt.step()
        assert opt.state[q]["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_schedulers_that_cycle_momentum_find_it(base: str) -> None:
    opt = quantopt.STAM([nn.Parameter(torch.randn(4, 4))], bits=1, lr=0.1, base=base)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    values = []
    for _ in range(5):
        opt.step()
        scheduler.step()
        group = opt.param_groups[0]
        values.append(group["momentum"] if base == "sgd" else group["betas"][0])
    assert len(set(values)) == 5
    assert ("betas" in opt.param_groups[0]) == (base == "adam")


def test_groups_have_the_keys_of_the_first_version() -> None:
    """A distributed checkpoint is loaded by the keys that the optimizer has now."""
    saved = torch.load(FOLDER / "optimizers-0.1.0.pt", weights_only=True)
    for name, values in saved.items():
        now = optimizer(name, parameters(name)).state_dict()["param_groups"]
        assert [set(group) for group in now] == [set(group) for group in values["optimizer"]["param_groups"]]


def test_a_changed_option_is_checked_before_state_is_made() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([p], bits=1, lr=0.1)
    p.grad = torch.ones(4, 4)
    opt.step()
    before = {key: value.clone() for key, value in opt.state[p].items()}
    opt.param_groups[0]["base"] = "lion"
    with pytest.raises(ValueError, match="base='lion'"):
        opt.step()
    assert opt.state[p].keys() == before.keys()
    assert all(torch.equal(opt.state[p][key], value) for key, value in before.items())


def test_a_subclass_of_the_base_class_needs_no_default_of_lr() -> None:
    class Plain(LevelOptimizer):
        def _rule(self, group: dict[str, Any]) -> str:
            return "prox"

    p = nn.Parameter(torch.randn(4, 4))
    opt = Plain([p], {"bits": 1, "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0})
    before = p.detach().clone()
    p.grad = torch.ones(4, 4)
    opt.step()
    torch.testing.assert_close(p.detach(), before - 0.5)  # no threshold: the base step
