"""The toy problems: signs of a logistic regression, two moons against all 512 binary networks."""

import pytest
import torch
from torch import nn

from quantopt.train import toys

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("c", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("optimizer", ["askew", "stam"])
def test_signs_of_a_logistic_regression(optimizer, c):
    signs, path = toys.logistic(toys.OPTIMIZERS[optimizer], c, seed=1)
    assert set(signs.tolist()) == {-1.0, 1.0} and not torch.equal(path[0].sign(), signs)
    assert torch.equal(path[-1], signs)


def test_the_512_networks_are_enumerated():
    x, y = toys.moons(samples=200)
    accuracies = toys.binary_networks(x, y)
    assert accuracies.shape == (512,)
    seen = set()
    for index in range(0, 512, 37):
        bits = torch.tensor([index >> i & 1 for i in range(9)])
        model = toys.moons_network()
        nn.utils.vector_to_parameters(bits * 2.0 - 1, model.parameters())
        seen.add(tuple(bits.tolist()))
        with torch.no_grad():
            right = (model(x).squeeze(-1) > 0) == (y > 0.5)
        assert accuracies[index] == pytest.approx(100 * right.float().mean().item())
    assert len(seen) == 14
    assert accuracies.max() > 80 and accuracies.min() < 20


@pytest.mark.parametrize("optimizer", toys.OPTIMIZERS)
def test_no_training_beats_the_enumeration(optimizer):
    x, y = toys.moons(samples=200)
    accuracies = toys.binary_networks(x, y)
    reached = accuracies[toys.train_moons(toys.OPTIMIZERS[optimizer], x, y, steps=150)]
    assert accuracies.median() < reached <= accuracies.max()
    weights = toys.train(
        toys.OPTIMIZERS[optimizer], toys.moons_network(), x, y, 3, 20, torch.Generator().manual_seed(0)
    )
    assert len(weights) == 4 and set(weights[-1].tolist()) <= {-1.0, 1.0}


def test_command_draws_the_figure(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(toys, "OPTIMIZERS", {"askew": toys.OPTIMIZERS["askew"]})
    assert toys.main(["--seeds", "1", "--out", str(tmp_path / "toys")]) == 0
    assert "the best of 512 binary networks" in capsys.readouterr().out
    with Image.open(tmp_path / "toys" / "toys.png") as image:
        image.load()
        assert min(image.size) > 200
