"""The networks of the command line: shapes, adaptation, refusals."""

import pytest
import torch
from torch import nn

import quantopt
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
        ("resnet20", (3, 32, 32), 10),
        ("resnet20", (2, 4, 5), 3),
        ("convnet", (3, 32, 32), 10),
        ("convnet-small", (1, 9, 8), 4),
        ("vgg-small", (3, 8, 11), 10),
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
        ("convnet", (3, 32, 7), "convnet needs images of at least 8x8: it halves the image 3 times"),
        ("convnet-small", (3, 7, 7), "at least 8x8"),
        ("vgg-small", (3, 7, 32), "at least 8x8"),
        ("resnet20", (3, 3, 32), "at least 4x4"),
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
    assert len(weights("resnet20")) == 20  # shortcuts without weights
    assert sum(p.numel() for p in models.build("resnet20", (3, 32, 32), 10).parameters()) == 269_722
    assert [w.shape[0] for w in weights("vgg-small")] == [128, 128, 256, 256, 512, 512, 10]


@pytest.mark.parametrize("name", ["convnet", "convnet-small"])
def test_convnet_has_no_parameter_but_the_weights_of_its_layers(name):
    network = models.build(name, (3, 32, 32), 10)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(layers) == (7 if name == "convnet" else 4) == len(norms)  # one after each, the last too
    assert isinstance(network[-1], nn.BatchNorm1d)
    (quantised,) = quantopt.param_groups(network, bits=1, skip=())  # no group of float parameters
    assert {id(p) for p in quantised["params"]} == {id(layer.weight) for layer in layers}
    logits = network(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8))
    assert torch.allclose(logits.mean(0), torch.zeros(10), atol=1e-4)
    assert torch.allclose(logits.std(0, correction=0), torch.ones(10), atol=1e-2)


def test_the_layers_of_vgg_small_see_signs():
    network = models.build("vgg-small", (3, 16, 16), 10)
    seen = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    network(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    first, *others = seen.values()
    assert len(others) == 6 and all(x.abs().eq(1).all() for x in others) and not first.abs().eq(1).all()
    order = [type(m).__name__ for m in network]
    assert all(order[i - 1] == "BatchNorm2d" for i, name in enumerate(order) if name == "SignActivation")


def test_shortcuts_of_resnet20_are_the_input():
    block = models.BasicBlock(2, 6, 2, project=False)
    x = torch.randn(3, 2, 5, 8)
    shortcut = block.shortcut(x)
    assert shortcut.shape == block.bn2(block.conv2(block.bn1(block.conv1(x)))).shape
    assert torch.equal(shortcut[:, :2], x[:, :, ::2, ::2]) and not shortcut[:, 2:].any()


def test_first_module_normalises():
    network = models.build("mlp", (2, 4, 4), 3, [100.0, 50.0], [10.0, 20.0])
    images = torch.randint(0, 256, (5, 2, 4, 4), dtype=torch.uint8)
    expected = torch.stack([(images[:, 0].float() - 100) / 10, (images[:, 1].float() - 50) / 20], 1)
    assert torch.allclose(network[0](images), expected, atol=1e-6)
    assert {"0.mean", "0.deviation"} <= network.state_dict().keys()
