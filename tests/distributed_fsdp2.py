"""Cases of FSDP2: training, the views of gathered weights, checkpoints."""

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import quantopt
from distributed_network import (
    MAKERS,
    RANKS,
    WRAPPINGS,
    backward,
    batch,
    case,
    close,
    full_weights,
    groups,
    mine,
    network,
    same_network,
    sharded,
    train,
    whole,
)


@case
def sharded_training_is_the_training_of_the_whole() -> None:
    for name, make in MAKERS.items():
        for scale in ("tensor", "channel", "group"):
            if scale == "group" and name not in ("askew", "stam", "binaryconnect"):
                continue
            model, plain = sharded(network()), network()
            opt, reference = (
                make(groups(model, scale, group_size=4)),
                make(groups(plain, scale, group_size=4)),
            )
            for i in range(4):
                train(model, opt, mine(batch(i)))
                train(plain, reference, batch(i))
            same_network(model, plain)
            ours, theirs = (dict(m.named_parameters())["2.2.weight"] for m in (model, plain))
            assert torch.equal(opt.quantization(ours).codes, reference.quantization(theirs).codes)
            saved = dcp.get_optimizer_state_dict(model, opt)["state"]["2.2.weight"]
            close({key: whole(value) for key, value in saved.items()}, dict(reference.state[theirs]))


@case
def second_moments_in_bfloat16_are_sharded_and_loaded() -> None:
    """Random numbers go by the element in the shard, so the whole network draws others: no equal bits."""
    model, plain = sharded(network()), network()
    options = dict(lr=0.01, memory=True, momentum_dtype="bfloat16", exp_avg_sq_dtype="bfloat16")
    opt, reference = (quantopt.AskewAdam(groups(m), **options) for m in (model, plain))
    for i in range(3):
        train(model, opt, mine(batch(i)))
        train(plain, reference, batch(i))
    for name, p in model.named_parameters():
        ours, theirs = opt.state[p], reference.state[dict(plain.named_parameters())[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            assert ours[key].placements == p.placements
            assert ours[key].dtype == theirs[key].dtype == torch.bfloat16
        torch.testing.assert_close(whole(ours["exp_avg_sq"]), theirs["exp_avg_sq"], rtol=0.05, atol=1e-7)
    again = sharded(network())
    restored = quantopt.AskewAdam(groups(again), **options)
    again.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(again, restored, dcp.get_optimizer_state_dict(model, opt))
    for m, o in ((model, opt), (again, restored)):
        train(m, o, mine(batch(3)))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), whole(q.detach()))
        assert all(torch.equal(whole(opt.state[p][k]), whole(restored.state[q][k])) for k in opt.state[p])


@case
def views_show_the_right_network_and_leave_nothing() -> None:
    for wrapping, wrap in WRAPPINGS.items():
        for rule in ("askew", "binaryconnect") if wrapping in ("root", "kept after forward") else ("askew",):
            model, plain = wrap(network()), network()
            opt, reference = MAKERS[rule](groups(model)), MAKERS[rule](groups(plain))
            for i in range(2):
                train(model, opt, mine(batch(i)))
                train(plain, reference, batch(i))
            same_network(model, plain)
            with opt.quantized(), reference.quantized():
                same_network(model, plain)
                with opt.latent(), reference.latent():
                    same_network(model, plain)
                same_network(model, plain)
            same_network(model, plain)
            for i in range(2, 4):
                with opt.quantized(), reference.quantized():
                    same_network(model, plain)
                train(model, opt, mine(batch(i)))
                train(plain, reference, batch(i))
            same_network(model, plain)


@case
def views_with_gathered_weights_of_another_dtype() -> None:
    for rule in ("askew", "binaryconnect"):
        model = sharded(
            network(),
            mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
            reshard_after_forward=False,
        )
        opt = MAKERS[rule](groups(model))

        def runs_with_its_weights(model: Any = model) -> Tensor:
            plain = network()
            with torch.no_grad():
                seen = model(batch(9))
                plain.load_state_dict({name: whole(p) for name, p in model.state_dict().items()})
                assert torch.equal(seen, plain.bfloat16()(batch(9).bfloat16()))
            return seen

        for i in range(3):
            train(model, opt, mine(batch(i)))
            before = runs_with_its_weights()
            with opt.quantized() if rule == "askew" else opt.latent():
                assert not torch.equal(runs_with_its_weights(), before)
            assert torch.equal(runs_with_its_weights(), before)


@case
def views_while_weights_are_gathered_by_hand_in_advance_and_after_an_exception() -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    model, plain = sharded(network(), reshard_after_forward=False), network()
    opt, reference = MAKERS["askew"](groups(model)), MAKERS["askew"](groups(plain))
    train(model, opt, mine(batch(0)))
    train(plain, reference, batch(0))
    weight = model[0].weight
    for _ in range(2):
        model[0].unshard()
        model[4].unshard(async_op=True)
        with opt.quantized(), reference.quantized():
            assert model[0].weight is weight
            model[0].unshard()
            close(model[0].weight.detach(), plain[0].weight.detach())
            same_network(model, plain)
            model[0].unshard()
            model[2][0].unshard(async_op=True)
        assert model[0].weight is weight
        same_network(model, plain)

    model, plain = fully_shard(network()), network()
    opt, reference = MAKERS["askew"](groups(model)), MAKERS["askew"](groups(plain))
    train(model, opt, mine(batch(0)))
    train(plain, reference, batch(0))
    handle = model[3].register_forward_hook(stop)
    with pytest.raises(Stop), torch.no_grad(), opt.quantized():
        model(batch(1))
    handle.remove()
    same_network(model, plain)


@case
def a_forward_after_a_step_sees_what_it_would_with_sgd() -> None:
    def forward(model: Any) -> None:
        with torch.no_grad():
            model(batch(7))

    def sees_the_step(make: Callable[[Any], Any], keep: bool, between: Callable[[Any], Any] | None) -> bool:
        model = sharded(network(), reshard_after_forward=not keep)
        opt = make(model)
        train(model, opt, mine(batch(0)))
        model.set_reshard_after_backward(not keep)
        for i in (1, 2):
            backward(model, mine(batch(i)))
            if between is not None:
                between(model)
            opt.step()
        plain = network()
        with torch.no_grad():
            seen = model(batch(9))
            plain.load_state_dict({name: whole(p) for name, p in model.state_dict().items()})
            return torch.allclose(seen, plain(batch(9)), atol=1e-6)

    for keep in (False, True):
        for between in (None, forward, lambda model: model.unshard()):
            with_sgd = sees_the_step(
                lambda model: torch.optim.SGD(model.parameters(), lr=0.05), keep, between
            )
            assert with_sgd or keep
            for rule in ("askew", "binaryconnect"):
                make = lambda model: MAKERS[rule](groups(model))  # noqa: B023,E731
                assert sees_the_step(make, keep, between) >= with_sgd


@case
def codes_metrics_and_checkpoints_with_gathered_weights() -> None:
    for rule in ("askew", "binaryconnect"):
        model, plain = fully_shard(network()), network()
        opt, reference = MAKERS[rule](groups(model)), MAKERS[rule](groups(plain))
        for i in range(2):
            train(model, opt, mine(batch(i)))
            train(plain, reference, batch(i))
            with torch.no_grad():
                model(batch(7))
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert not hasattr(ours, "full_tensor")  # gathered
                a, b = opt.quantization(ours), reference.quantization(theirs)
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a.codes, b.codes)
            with pytest.raises(
                ValueError, match=r"'0.weight' is a copy that fully_shard .* call reshard\(\)"
            ):
                MAKERS[rule](groups(model))
            numbers, right = opt.metrics()[0], reference.metrics()[0]
            sums = torch.tensor([float(numbers["numel"]), float(numbers["sign_flips"])])
            dist.all_reduce(sums)
            assert sums.tolist() == [right["numel"], right["sign_flips"]]
            with opt.quantized(), reference.quantized():
                with torch.no_grad():
                    model(batch(7))
                close(full_weights(model), dict(plain.state_dict()))
            close(full_weights(model), dict(plain.state_dict()))


@case
def checkpoints_are_taken_up_by_another_number_of_ranks() -> None:
    whole_states = dcp.StateDictOptions(full_state_dict=True)
    for scale in ("tensor", "channel", "group"):
        for rule in ("askew-memory", "binaryconnect"):
            makers = (network, lambda: sharded(network()))
            for before, after in (makers, makers[::-1]):
                model = before()
                opt = MAKERS[rule](groups(model, scale, group_size=4))
                other = after()
                resumed = MAKERS[rule](groups(other, scale, group_size=4))
                for i in range(2):
                    train(model, opt, batch(i))
                with pytest.raises(
                    ValueError, match=r"unlike the parameter; load it by .*set_optimizer_state_dict"
                ):
                    resumed.load_state_dict(opt.state_dict())
                saved = copy.deepcopy(dcp.get_state_dict(model, opt, options=whole_states))
                dcp.set_optimizer_state_dict(other, resumed, saved[1], options=whole_states)
                dcp.set_model_state_dict(other, saved[0], options=whole_states)
                train(model, opt, batch(2))
                train(other, resumed, batch(2))
                close(full_weights(model), full_weights(other))


@case
def moving_scales_of_another_layout_are_taken_up() -> None:
    """Groups take those per channel, as where a state of earlier versions was loaded, and one of the tensor."""
    for before in ("channel", "none"):
        take_up_scales_of_another_layout(before)


def take_up_scales_of_another_layout(before: str) -> None:
    model, plain = sharded(network()), network()
    opts = [MAKERS["binaryconnect"](groups(m, before, group_size=4)) for m in (model, plain)]
    for i in range(4):
        for opt in opts if i == 1 else ():
            opt.param_groups[0]["scale"] = "group"
        for opt in opts if i == 2 else ():
            opt.param_groups[0]["group_size"] = 3
        train(model, opts[0], mine(batch(i)))
        train(plain, opts[1], batch(i))
    same_network(model, plain)
    ours, theirs = (dict(m.named_parameters())["2.2.weight"] for m in (model, plain))
    scale = opts[1].state[theirs]["scale"]
    assert scale.dim() == 2
    close({"scale": whole(opts[0].state[ours]["scale"])}, {"scale": scale})


@case
def the_gathers_of_a_view_do_not_rely_on_an_event_of_before() -> None:
    model = sharded(network())
    opt = MAKERS["askew"](groups(model))
    train(model, opt, batch(0))
    model.set_post_optim_event(torch.Event())
    with opt.quantized():
        assert model._get_fsdp_state()._state_ctx.post_optim_event is None


@case
def unknown_inner_parts_of_fsdp_are_an_error_that_names_the_version() -> None:
    model = sharded(network())
    opt = MAKERS["askew"](groups(model))
    before = full_weights(model)
    with mock.patch.object(type(model), "_get_fsdp_state", side_effect=AttributeError("moved")):
        with (
            pytest.raises(RuntimeError, match=f"torch {re.escape(torch.__version__)} .*moved"),
            opt.quantized(),
        ):
            pass
    close(full_weights(model), before)


@case
def a_sharded_parameter_may_have_no_dimensions() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    p = torch.nn.Parameter(distribute_tensor(torch.tensor(0.7), mesh, [Replicate()]))
    opt = MAKERS["askew"]([{"params": [p], "bits": 1, "scale": "channel"}])
    assert opt.metrics()[0]["numel"] == 1
