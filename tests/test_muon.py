"""base="muon": torch.optim.Muon where there are no levels; where there are, the direction that every rule is given."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

import quantopt
from optim_cases import network, same
from quantopt import _extension
from quantopt.optim import muon
from quantopt.optim.options import BASE_OPTIONS
from quantopt.rules import BASES

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(17, 5), (5, 17), (8, 8), (8, 8), (33, 1), (1, 4)]
BACKENDS = ["reference"] + ["cpu"] * (_extension.error is None)
backends = pytest.mark.parametrize("backend", BACKENDS)


def parameters(
    shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_grads(step: int, *lists: list[nn.Parameter], factor: float = 1.0) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.dtype)


def plain(params: list[nn.Parameter], **options: Any) -> Any:
    return quantopt.AskewSGD([{"params": params, "bits": 0}], base="muon", **options)


def torch_direction(ahead: Tensor, adjust_lr_fn: str = "original", steps: int = 5) -> Tensor:
    """That of torch, of a matrix of momentum."""
    direction = _zeropower_via_newtonschulz(ahead.clone(), muon.COEFFICIENTS, steps, muon.EPS).float()
    return direction * _adjust_lr(1.0, adjust_lr_fn, ahead.shape)


def close_but_for_bfloat16(a: list[nn.Parameter], b: list[nn.Parameter], lr: float, steps: int = 1) -> None:
    """To the last digits of float32, but for matrices where a number in the iteration was rounded to the other side."""
    worst = torch.cat(
        [(p.detach() - q.detach()).abs().float().reshape(-1) for p, q in zip(a, b, strict=True)]
    )
    assert float(worst.median()) < 2e-7 and float(worst.max()) < lr * steps * 2**-6


# ---- the direction


def test_the_bases_are_those_of_the_kernels_and_muon() -> None:
    assert tuple(BASE_OPTIONS) == (*BASES, "muon")


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (17, 5), (24, 24), (64, 3)])
def test_singular_vectors_stay_and_singular_values_come_near_1(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    direction = muon.orthogonalised(x, 5).float()
    for matrix, d in zip(x, direction, strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ d @ v.T
        kept = s > 0.05 * s[0]  # smaller ones need more steps
        assert bool(((inner.diagonal() > 0.5) & (inner.diagonal() < 1.5))[kept].all())
        assert float((inner - inner.diagonal().diag()).abs().max()) < 0.05


def test_a_matrix_of_zeros_gives_no_direction() -> None:
    assert not muon.orthogonalised(torch.zeros(2, 3, 5), 5).any()


@backends
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(nesterov=False), dict(adjust_lr_fn="match_rms_adamw"), dict(momentum=0.5, ns_steps=3),
        dict(momentum=0.0),
    ],
)  # fmt: skip
def test_groups_with_zero_bits_are_torch_muon(options: dict[str, Any], decoupled: bool, backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)
    settings = dict(lr=0.01, weight_decay=0.1) | options
    opt = plain(ours, decoupled_weight_decay=decoupled, backend=backend, **settings)
    other = torch.optim.Muon(theirs, **settings)
    for i in range(5):
        set_grads(i, ours, theirs)
        opt.step()
        other.step()
    close_but_for_bfloat16(ours, theirs, 0.01, 5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_float64_and_the_defaults_are_those_of_torch() -> None:
    ours = parameters(dtype=torch.float64)
    theirs = twins(ours)
    opt, other = plain(ours), torch.optim.Muon(theirs, weight_decay=0.0)
    for i in range(3):
        set_grads(i, ours, theirs)
        opt.step()
        other.step()
    close_but_for_bfloat16(ours, theirs, 1e-3, 3)
    keys = ("lr", "momentum", "nesterov", "ns_steps")
    assert [opt.param_groups[0][key] for key in keys] == [other.param_groups[0][key] for key in keys]


MAKERS: dict[str, Any] = {
    "askew": quantopt.AskewSGD,
    "askew-adam": quantopt.AskewAdam,
    "memory": lambda p, **k: quantopt.AskewSGD(p, memory=True, **k),
    "stam": lambda p, **k: quantopt.STAM(p, kappa=0.5, **k),
    "splitting": lambda p, **k: quantopt.STAM(p, form="splitting", kappa=0.5, **k),
    "binaryconnect": quantopt.BinaryConnect,
    "binaryrelax": quantopt.BinaryRelax,
    "proxquant": lambda p, **k: quantopt.ProxQuant(p, reg_strength=0.1, **k),
}


@backends
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_every_rule_takes_the_direction(name: str, bits: int, backend: str) -> None:
    """As a given one; the weight of a convolution is a matrix of its outputs."""
    ours = parameters([(6, 3, 2, 2), (6, 12), (9, 4)])
    theirs = twins(ours)
    options = dict(bits=bits, lr=0.05, weight_decay=0.01, backend=backend)
    opt, given = MAKERS[name](ours, base="muon", **options), MAKERS[name](theirs, base="given", **options)
    momenta = [torch.zeros_like(p) for p in theirs]
    for i in range(3):
        set_grads(i, ours, theirs)
        kept = [p.grad for p in ours]
        for q, m in zip(theirs, momenta, strict=True):
            g = q.grad
            assert g is not None
            m.lerp_(g, 1 - 0.95)
            q.grad = torch_direction(g.lerp(m, 0.95).flatten(1)).view(q.shape)
        opt.step()
        given.step()
        assert all(p.grad is g for p, g in zip(ours, kept, strict=True))
        close_but_for_bfloat16(ours, theirs, 0.05, 3)
    set_grads(2, theirs)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def test_batches_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a = parameters([(8, 5)] * 5 + [(5, 8)] * 2)
    b = twins(a)
    opts = [plain(a)]
    monkeypatch.setattr(muon, "BATCH", 90)
    opts.append(plain(b))
    for i in range(2):
        set_grads(i, a, b)
        if i == 0:
            monkeypatch.undo()
            opts[0].step()
            monkeypatch.setattr(muon, "BATCH", 90)
        else:
            opts[0].step()
        opts[1].step()
    counts = [len(opt._group_steps[0].buckets[0].directions.batches) for opt in opts]
    assert counts == [2, 4]
    close_but_for_bfloat16(a, b, 1e-3, 2)


@backends
@pytest.mark.parametrize("layout", ["transposed", "slice", "gradient"])
def test_memory_layouts_do_not_change_the_result(layout: str, backend: str) -> None:
    (p,) = parameters([(6, 9)])
    w = p.detach().clone()
    if layout == "transposed":
        w = w.t().contiguous().t()
    elif layout == "slice":
        w = torch.zeros(6, 18)[:, ::2].copy_(w)
    q = nn.Parameter(w)
    opts = [quantopt.STAM([x], bits=1, base="muon", lr=0.1, backend=backend) for x in (p, q)]
    for i in range(3):
        set_grads(i, [p], [q])
        if layout == "gradient":
            q.grad = q.grad.t().contiguous().t()  # type: ignore[union-attr]
        for opt in opts:
            opt.step()
    torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(opts[1].state[q]["momentum_buffer"], opts[0].state[p]["momentum_buffer"])


def test_16_bits_and_a_bfloat16_momentum() -> None:
    exact = parameters()
    low = [nn.Parameter(p.detach().bfloat16()) for p in exact]
    with torch.no_grad():
        for p, q in zip(exact, low, strict=True):
            p.copy_(q)
    a, b = plain(exact, lr=0.01), plain(low, lr=0.01, momentum_dtype="bfloat16")
    for i in range(4):
        set_grads(i, low)
        for p, q in zip(exact, low, strict=True):
            p.grad = q.grad.float()  # type: ignore[union-attr]
        a.step()
        b.step()
    for p, q in zip(exact, low, strict=True):
        state = b.state[q]
        assert (state["momentum_buffer"].dtype, state["master"].dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(state["master"], p.detach(), atol=2e-3, rtol=0)


# ---- groups


def test_everything_else_on_adam_just_works() -> None:
    for options in (dict(), dict(nesterov=True), dict(momentum=0.9, ns_steps=4)):
        model = network()
        other = {"base": "adam", "lr": 3e-4}
        opt = quantopt.STAM(quantopt.param_groups(model, other=other), base="muon", **options)
        hidden, rest = opt.param_groups
        assert (hidden["lr"], rest["lr"], rest["base"]) == (1e-3, 3e-4, "adam")
        assert hidden["momentum"] == options.get("momentum", 0.95) and hidden["nesterov"] is True
        assert rest["nesterov"] is False
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        opt.step()
        assert not any(map(torch.equal, before, model.parameters()))
        assert all("exp_avg" in opt.state[p] for p in rest["params"])
        assert all("momentum_buffer" in opt.state[p] for p in hidden["params"])
    opt = quantopt.STAM(
        quantopt.param_groups(network(), other={"base": "sgd"}), base="muon", weight_decay=0.0
    )
    assert [opt.param_groups[1][key] for key in ("lr", "momentum", "nesterov")] == [1.0, 0.9, False]
    opt = quantopt.AskewSGD([{"params": parameters(), "base": "muon"}], bits=1, nesterov=False)
    assert [opt.param_groups[0][key] for key in ("lr", "momentum", "nesterov")] == [1e-3, 0.95, False]


def test_refusals_name_the_parameter_and_the_remedy() -> None:
    model = network()
    for name, groups in (
        ("0.bias", quantopt.param_groups(model)),
        ("0", [{"params": [model[0].bias], "bits": 0}]),
    ):
        with pytest.raises(ValueError, match=rf"{name}.* the shape \(5,\).*'base': 'adam', 'lr': 3e-4"):
            quantopt.AskewSGD(groups, base="muon")
    opt = plain(parameters())
    with pytest.raises(ValueError, match="parameter 0 of its group has the shape"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], "bits": 0})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=r"constrain='gradient' has no form on base='muon'.*'velocity'"):
        quantopt.AskewSGD(parameters(), bits=1, base="muon", constrain="gradient")
    for key, value in (("ns_steps", 0), ("ns_steps", 100), ("ns_steps", 5.0), ("adjust_lr_fn", "none")):
        with pytest.raises(ValueError, match=f"{key}="):
            plain(parameters(), **{key: value})


def test_a_base_that_is_changed_later_is_checked_before_anything_is_changed() -> None:
    p = nn.Parameter(torch.randn(6))
    opt = quantopt.AskewSGD([{"params": [p], "bits": 0, "base": "sgd"}], lr=0.1)
    p.grad = torch.ones(6)
    opt.step()
    saved, before = copy.deepcopy(opt.state_dict()), p.detach().clone()
    opt.param_groups[0].update(base="muon")
    with pytest.raises(ValueError, match="takes matrices"):
        opt.step()
    assert torch.equal(p, before)
    saved["param_groups"][0]["base"] = "muon"
    with pytest.raises(ValueError, match="takes matrices"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_group_may_change_to_muon(base: str) -> None:
    (p,) = parameters([(6, 4)])
    opt = quantopt.AskewSGD([{"params": [p], "bits": 0, "base": base}], lr=0.01)
    set_grads(0, [p])
    opt.step()
    opt.param_groups[0]["base"] = "muon"
    set_grads(1, [p])
    before = p.detach().clone()
    opt.step()
    assert set(opt.state[p]) == {"momentum_buffer"}
    moved = torch.linalg.svdvals((before - p.detach()) / (0.01 * math.sqrt(1.5)))
    assert 0.5 < float(moved.max()) < 1.5


def test_sharded_parameters_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        p = nn.Parameter(distribute_tensor(torch.randn(4, 4), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"parameter 0 .*sharded \(DTensor\).*base='adam'"):
            quantopt.AskewSGD([p], bits=1, base="muon")
    finally:
        dist.destroy_process_group()


def test_schedulers_that_cycle_momentum_find_it() -> None:
    opt = plain(parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    params = opt.param_groups[0]["params"]
    momenta = [torch.zeros_like(p) for p in params]
    for i in range(4):
        set_grads(i, params)
        for p, m in zip(params, momenta, strict=True):
            m.lerp_(p.grad, 1 - opt.param_groups[0]["momentum"])
        opt.step()
        scheduler.step()
    for p, m in zip(params, momenta, strict=True):
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], m)
    assert opt.param_groups[0]["momentum"] not in (0.95, 0.9)


# ---- with the rest of torch


@backends
def test_grad_scaler_with_fused_amp(backend: str) -> None:
    """The momentum is of gradients divided by the scale, and stays where a gradient is infinite."""
    ours = parameters()
    theirs = twins(ours)
    opt, other = plain(ours, fused_amp=True, backend=backend), plain(theirs, backend=backend)
    for i in range(4):
        set_grads(i, ours, factor=3.0)
        set_grads(i, theirs)
        opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        if i == 2:
            ours[0].grad[1, 2] = math.inf  # type: ignore[index]
            opt.found_inf.fill_(1.0)
            kept = copy.deepcopy([[p.detach(), opt.state[p]["momentum_buffer"]] for p in ours])
        opt.step()
        if i == 2:
            assert all(
                same([p, opt.state[p]["momentum_buffer"]], row) for p, row in zip(ours, kept, strict=True)
            )
        else:
            other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
    close_but_for_bfloat16(ours, theirs, 1e-3, 4)


def test_maximize_is_the_step_against_the_gradient() -> None:
    up, down = parameters(), twins(parameters())
    opts = [plain(up, maximize=True), plain(down)]
    for i in range(3):
        set_grads(i, up, factor=-1.0)
        set_grads(i, down)
        for opt in opts:
            opt.step()
    for p, q in zip(up, down, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(opts[0].state[p]["momentum_buffer"], opts[1].state[q]["momentum_buffer"])


def test_error_if_nonfinite_names_the_parameter_and_changes_nothing() -> None:
    params = parameters()
    opt = plain(params, error_if_nonfinite=True)
    set_grads(0, params)
    opt.step()
    set_grads(1, params)
    params[1].grad[0, 0] = math.nan  # type: ignore[index]
    kept = copy.deepcopy([[p.detach(), opt.state[p]["momentum_buffer"]] for p in params])
    with pytest.raises(FloatingPointError, match="parameter 1"):
        opt.step()
    assert all(same([p, opt.state[p]["momentum_buffer"]], row) for p, row in zip(params, kept, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_checkpoint_goes_on_bit_for_bit(capturable: bool) -> None:
    ours = parameters()
    opt = quantopt.STAM(ours, bits=1, base="muon", capturable=capturable)
    for i in range(3):
        set_grads(i, ours)
        opt.step()
    theirs = twins(ours)
    other = quantopt.STAM(theirs, bits=1, base="muon", capturable=capturable)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(3, 6):
        set_grads(i, ours, theirs)
        opt.step()
        other.step()
    assert same(list(ours), list(theirs))


def test_a_compiled_training_step_and_a_closure() -> None:
    """With gradients that do not depend on the weights."""
    results = []
    for compiled in (False, True):
        params = parameters([(6, 4), (4, 6)])
        opt = quantopt.AskewSGD(params, bits=1, base="muon", lr=0.01)

        def step(x: Tensor, params: list[nn.Parameter] = params, opt: Any = opt) -> None:
            opt.zero_grad()
            ((params[0] * x).sum() + (params[1] * x.t()).sum()).backward()
            opt.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for i in range(3):
            run(torch.randn(6, 4, generator=torch.Generator().manual_seed(i)))
        results.append([p.detach().clone() for p in params])
        loss = opt.step(lambda params=params: params[0].square().sum())
        assert float(loss) > 0 and not same(results[-1], list(params))
    assert same(*results)


def test_options_are_checked_together_when_a_group_changes() -> None:
    """What a constructor refuses is refused before a step too, and nothing is changed."""
    p = nn.Parameter(torch.randn(4, 6))
    cases = [
        (quantopt.STAM([p], bits=1, base="muon"), {"base": "adam"}, "nesterov=True"),
        (quantopt.AskewSGD([p], bits=1, constrain="gradient"), {"base": "muon"}, "constrain='gradient'"),
        (quantopt.AskewSGD([p], bits=1), {"scale": "sawb"}, "sawb"),
        (quantopt.AskewSGD([p], bits=1, clamp=False), {"memory": True}, "clamp=False"),
    ]
    for opt, changes, message in cases:
        p.grad = torch.ones(4, 6)
        opt.param_groups[0].update(changes)
        before = p.detach().clone()
        with pytest.raises(ValueError, match=message):
            opt.step()
        assert torch.equal(p, before) and not opt.state[p]


def test_state_of_groups_on_two_bases_loads_where_the_constructor_has_another() -> None:
    def made(base: str) -> tuple[nn.Parameter, quantopt.STAM]:
        torch.manual_seed(0)
        p, bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
        groups = [
            {"params": [p], "bits": 1, "base": "muon"},
            {"params": [bias], "bits": 0, "base": "adam", "nesterov": False},
        ]
        return p, quantopt.STAM(groups, base=base)

    p, opt = made("muon")
    q, other = made("adam")
    for group in opt.param_groups:
        for w in group["params"]:
            w.grad = torch.ones_like(w)
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[q]["latent"], opt.state[p]["latent"])
