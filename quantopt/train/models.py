"""The networks that the command line trains, each adapted to the images or refused with the reason.

Every network takes images [N, C, H, W] in 0..255 (uint8 or float) and returns logits [N, classes] (float32): its first
module subtracts the training set's mean and divides by its deviation, so that a saved network is complete.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantopt.nn import SignActivation


class Normalize(nn.Module):
    """(x - mean) / deviation for each channel. x [N, C, H, W] in 0..255; mean and deviation [1, C, 1, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.deviation


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def mlp(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """Three hidden layers of 512 with batch norm."""
    features = channels * height * width
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (features, 512, 512):
        layers += [nn.Linear(inputs, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, classes))


def cnn(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 64 channels with batch norm; each halves the image while it is
    at least 4 pixels wide and high."""
    _need("cnn", height, width, 4, "it halves the image at least once")
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (32, 64, 64):
        layers += [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        if min(height, width) >= 4:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, classes))


def _convnet(
    blocks: Sequence[Sequence[int]], channels: int, height: int, width: int, classes: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = channels
    for block in blocks:
        for outputs in block:
            layers += [_conv(inputs, outputs), nn.BatchNorm2d(outputs, affine=False), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    linear = nn.Linear(inputs * height * width, classes, bias=False)
    return nn.Sequential(*layers, nn.Flatten(), linear, nn.BatchNorm1d(classes, affine=False))


def convnet(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """A small convolutional network without any parameter but the weights of its layers: six 3x3 convolutions of 64 to
    256 channels and a linear layer, each followed by a batch norm without scale and bias, the last one too. With
    `skip = []` all of it is quantised, as in the experiments of Leconte, Schechtman, Moulines (AISTATS 2023), who do
    not say the sizes of theirs."""
    _need("convnet", height, width, 8, "it halves the image 3 times")
    return _convnet(((64, 64), (128, 128), (256, 256)), channels, height, width, classes)


def convnet_small(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """As `convnet`, of three convolutions with 24, 48 and 96 channels: it trains on a CPU in minutes."""
    _need("convnet-small", height, width, 8, "it halves the image 3 times")
    return _convnet(((24,), (48,), (96,)), channels, height, width, classes)


def vgg_small(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """VGG-small of the papers on binary networks (six 3x3 convolutions of 128, 256 and 512 channels, one linear layer)
    with sign activations: the input of every layer but the first is -1 or +1, made by a batch norm and its sign."""
    _need("vgg-small", height, width, 8, "it halves the image 3 times")
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (128, 256, 512):
        layers += [_conv(inputs, outputs), nn.BatchNorm2d(outputs), SignActivation()]
        layers += [_conv(outputs, outputs), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), SignActivation()]
        inputs, height, width = outputs, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, classes))


_VGG = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def _vgg(name: str, channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    _need(name, height, width, 32, "it halves the image 5 times")
    layers: list[nn.Module] = []
    inputs = channels
    for block in _VGG[name]:
        for outputs in block:
            layers += [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def vgg11(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """VGG-11 (Simonyan, Zisserman 2015, configuration A) with batch norm and one linear layer, for small images."""
    return _vgg("vgg11", channels, height, width, classes)


def vgg16(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """VGG-16 (configuration D) with batch norm and one linear layer, for small images."""
    return _vgg("vgg16", channels, height, width, classes)


class Subsampled(nn.Module):
    """A shortcut without parameters (He et al. 2016, option A): every `stride`-th pixel, and zeros for the channels
    that the input lacks."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.missing = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016): where the shape changes a 1x1 convolution, or, with
    project=False, `Subsampled`."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool = True) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()  # a module, so that it can be folded
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and inputs == outputs:
            return
        if project:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, stride, kernel=1), nn.BatchNorm2d(outputs))
        else:
            self.shortcut = Subsampled(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)  # in place: allocating a large tensor costs as much as the sum
        return F.relu(y, inplace=True)


def resnet18(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """ResNet-18 with the 3x3 stem used for small images."""
    _need("resnet18", height, width, 8, "it halves the image 3 times")
    return _resnet((64, 128, 256, 512), 2, channels, classes, project=True)


def resnet20(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): three stages of three blocks, shortcuts without parameters."""
    _need("resnet20", height, width, 4, "it halves the image 2 times")
    return _resnet((16, 32, 64), 3, channels, classes, project=False)


def _resnet(stages: Sequence[int], blocks: int, channels: int, classes: int, project: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(channels, stages[0]), nn.BatchNorm2d(stages[0]), nn.ReLU()]
    inputs = stages[0]
    for outputs in stages:
        layers.append(BasicBlock(inputs, outputs, 1 if outputs == inputs else 2, project))
        layers += [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _need(name: str, height: int, width: int, least: int, reason: str) -> None:
    if min(height, width) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least}: {reason}; these are {width}x{height}"
        )


MODELS: dict[str, Callable[[int, int, int, int], nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "convnet": convnet,
    "convnet-small": convnet_small,
    "vgg-small": vgg_small,
}


def build(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] | None = None,
    deviation: Sequence[float] | None = None,
) -> nn.Sequential:
    """The network `name` of `MODELS` for images of `shape` (channels, height, width), with random weights.

    mean and deviation: one per channel, in 0..255; 0 and 1 if left out (for a network whose weights will be
    loaded). Raises ValueError with the reason if the network does not fit the images.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    channels = shape[0]
    normalize = Normalize(mean or [0.0] * channels, deviation or [1.0] * channels)
    return nn.Sequential(normalize, *MODELS[name](*shape, classes))
