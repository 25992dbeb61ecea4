"""The toys of the AskewSGD paper: their data, the 512 networks, batched training, what the methods reach."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantopt.train import stationarity, toy_problems, toys

pytestmark = pytest.mark.usefixtures("one_thread")

PRINTED = ("askew printed, velocity", "askew printed, gradient")
TINY = toy_problems.Settings(
    samples=200, regressions=((50, 2),), seeds=2, runs=2, moons_epochs=1, noises=(0.3,), caps=(0.5,), draws=2
)


def test_regressions_are_those_of_the_paper():
    problem, signs = toy_problems.regressions(4000, 3)
    assert problem.x.shape == (3, 4000, 10) and problem.y.shape == (3, 4000) and signs.shape == (3, 10)
    assert problem.x.min() < -0.99 and problem.x.max() > 0.99 and problem.x.abs().max() <= 1
    assert set(signs.flatten().tolist()) == {-1.0, 1.0} and set(problem.y.flatten().tolist()) == {0.0, 1.0}
    # E[(y - 1/2) x] has the signs of w*.
    assert torch.equal(((problem.y - 0.5)[..., None] * problem.x).mean(1).sign(), signs)
    fewer, same = toy_problems.regressions(4000, 2)
    assert torch.equal(fewer.x, problem.x[:2]) and torch.equal(same, signs[:2])
    assert not torch.equal(problem.x[0], problem.x[1])


def test_float_optimum_has_no_gradient():
    problem, _ = toy_problems.regressions(500, 2)
    best = toy_problems.float_optimum(problem)
    w = torch.zeros(2, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = toy_problems.losses([w], problem.x.double(), problem.y.double()).sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(
        toy_problems.losses([w.detach()], problem.x.double(), problem.y.double()), best
    )


def test_moons_have_the_points_of_the_paper():
    training, test = toy_problems.moons(0.5)
    assert training.x.shape == (1, 2000, 2) and test.x.shape == (1, 200, 2)
    torch.testing.assert_close(training.x[0].std(0), torch.ones(2))
    torch.testing.assert_close(training.x[0].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    raw, _ = toy_problems.moons(0.5, standardised=False)
    assert torch.equal(raw.y, training.y) and not torch.equal(raw.x, training.x)
    assert not torch.equal(toy_problems.moons(0.5, draw=1)[0].x, training.x)
    unit = toy_problems.moons_losses([torch.zeros(1, 3, 2), torch.zeros(1, 3)], test)
    assert unit.item() == pytest.approx(1000 * 0.6931472 / 200)


def test_the_512_networks_are_enumerated():
    _, test = toy_problems.moons(0.3)
    enumerated = toy_problems.enumerate_networks(test)
    assert enumerated.shape == (512,)
    hidden, last = toy_problems.binary_networks()
    assert len({tuple(w.tolist()) for w in torch.cat([hidden.flatten(1), last], 1)}) == 512
    for index in range(0, 512, 7):
        signs = torch.tensor([1.0 if index >> i & 1 else -1.0 for i in range(9)])
        model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        nn.utils.vector_to_parameters(signs, model.parameters())
        with torch.no_grad():
            loss = F.binary_cross_entropy_with_logits(model(test.x[0]).squeeze(-1), test.y[0])
        assert enumerated[index].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", toy_problems.METHODS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_runs_do_not_mix(name, base):
    """A run of a batch of runs is the run alone."""
    training, _ = toy_problems.moons(0.3)
    problem = training._replace(x=training.x[:, :60], y=training.y[:, :60])
    options = dict(epochs=3, batch=25, base=base, alpha=2.0)  # the last batch of an epoch has 10 points
    together = toy_problems.train(toy_problems.METHODS[name], problem, runs=3, **options)
    alone = toy_problems.train(toy_problems.METHODS[name], problem, runs=1, first=1, **options)
    assert together.curve.shape == together.projected.shape == (4, 3)
    for many, one in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(many[1:2], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.curve[:, 1:2], alone.curve, rtol=1e-4, atol=1e-5)
    assert len(set(together.curve[0].tolist())) == 3  # each from weights of its own


def test_float_is_plain_sgd():
    problem, _ = toy_problems.regressions(40, 1)
    run = toy_problems.train(
        toy_problems.METHODS["float"], problem, runs=1, epochs=2, batch=10, base="sgd", alpha=1.0
    )
    generator = torch.Generator().manual_seed(0)
    w = (2 * torch.rand(10, generator=generator) - 1).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=1.0)
    for _ in range(2):
        for chosen in torch.randperm(40, generator=generator).split(10):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(problem.x[0, chosen] @ w, problem.y[0, chosen]).backward()
            optimizer.step()
    torch.testing.assert_close(run.weights[0][0], w.detach(), rtol=1e-4, atol=1e-5)


def test_signs_of_the_regression_are_found():
    settings = toy_problems.Settings(samples=2000, regressions=((200, 10),), seeds=3)
    result, _ = toy_problems.solve_regressions(settings)
    for rows in result["rows"].values():
        found = {row["method"]: row for row in rows}
        for name in ("float", *PRINTED, "stam splitting"):
            assert found[name]["seeds_all_right"] == 3
            assert found[name]["largest_excess_percent"] == pytest.approx(0, abs=1e-4)
        assert result["loss_float_optimum"] <= found["float"]["loss_network"]


def test_askew_ends_near_the_best_network_and_binaryconnect_does_not():
    settings = toy_problems.Settings(runs=6)
    training, test = toy_problems.moons(settings.noise)
    best = toy_problems.UNIT * toy_problems.enumerate_networks(test).min()

    def above_best(name):
        run = toy_problems.train_on_moons(toy_problems.METHODS[name], training, settings)
        loss = toy_problems.moons_losses(toy_problems.vertices(run.weights), test)
        assert (loss >= best - 1e-5).all()
        return loss.mean() - best

    assert above_best(PRINTED[0]) <= 0.02
    assert above_best("binaryconnect") >= 0.1


def test_command_writes_tables_and_figures(tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "toys"
    toys.run(out, TINY, stationarity.Settings(dimensions=5, samples=20, seeds=2, horizons=(4, 8)))
    printed = capsys.readouterr().out
    for text in (
        "batch 50, 2 epochs, constant rate",
        "best of the 512 networks",
        "splitting, kappa = L gamma: R",
    ):
        assert text in printed
    contents = json.loads((out / toys.TOYS_JSON).read_text())
    assert contents["threads"] == 1 and "torch" in contents["versions"]
    assert set(contents["logistic"]["rows"]) == {
        f"batch 50, 2 epochs, {rate} rate" for rate in ("constant", "cosine")
    }
    assert [row["method"] for row in contents["moons"]["rows"]["cosine"]][:2] == [
        "float",
        "float at the vertices",
    ]
    for name in (toys.LOGISTIC_PNG, toys.MOONS_PNG, toys.STATIONARITY_PNG):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 200


def test_directory_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert toys.main(["--out", str(tmp_path / "file" / "toys")]) == 2
    assert "--out" in capsys.readouterr().err
