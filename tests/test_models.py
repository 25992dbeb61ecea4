"""The networks of the command line: shapes, adaptation, refusals."""

import pytest
import torch
from torch import nn

from quantopt.train import models


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("mlp", (1, 8, 8), 10),
        ("mlp", (3, 5, 9), 3),
        ("cnn", (1, 8, 8), 10),
        ("cnn", (1, 28, 28), 7),
        ("cnn", (3, 32, 32), 100),
        ("cnn", (3, 4, 7), 2),
        ("vgg11", (3, 32, 32), 10),
        ("vgg11", (1, 40, 33), 5),
        ("vgg16", (3, 32, 32), 10),
        ("resnet18", (3, 32, 32), 10),
        ("resnet18", (1, 8, 8), 4),
    ],
)
def test_network_adapts_to_the_images(name, shape, classes):
    network = models.build(name, shape, classes, [10.0] * shape[0], [3.0] * shape[0])
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    logits = network(images)
    assert logits.shape == (3, classes) and logits.dtype == torch.float32 and logits.isfinite().all()
    logits.sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in network.named_parameters() if "bias" in n
    )


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (
            "vgg11",
            (1, 8, 8),
            "vgg11 needs images of at least 32x32: it halves the image 5 times; these are 8x8",
        ),
        ("vgg16", (3, 32, 28), "at least 32x32"),
        ("resnet18", (3, 7, 32), "at least 8x8"),
        ("cnn", (1, 3, 3), "at least 4x4"),
        ("alexnet", (3, 32, 32), "unknown model 'alexnet'"),
    ],
)
def test_network_refuses_images_that_are_too_small(name, shape, reason):
    with pytest.raises(ValueError, match=reason):
        models.build(name, shape, 10)


def test_depth_and_size_are_those_of_the_papers():
    def weights(name: str) -> list[nn.Parameter]:
        return [p for p in models.build(name, (3, 32, 32), 10).parameters() if p.dim() >= 2]

    assert [len(weights(name)) for name in ("vgg11", "vgg16")] == [9, 14]
    assert len(weights("resnet18")) == 18 + 3
    assert [w.shape[0] for w in weights("cnn")] == [32, 64, 64, 10]
    assert sum(p.numel() for p in models.build("resnet18", (3, 32, 32), 10).parameters()) == 11_173_962


def test_first_module_normalises():
    network = models.build("mlp", (2, 4, 4), 3, [100.0, 50.0], [10.0, 20.0])
    images = torch.randint(0, 256, (5, 2, 4, 4), dtype=torch.uint8)
    expected = torch.stack([(images[:, 0].float() - 100) / 10, (images[:, 1].float() - 50) / 20], 1)
    assert torch.allclose(network[0](images), expected, atol=1e-6)
    assert {"0.mean", "0.deviation"} <= network.state_dict().keys()
