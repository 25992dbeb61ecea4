"""Networks for images of 224x224 that the command line does not train: ResNet-50 and ViT-S, plain."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantopt.train.models import Normalize

SIZE, CLASSES = 224, 1000


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3 (which has the stride), 1x1 back, and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        layers = [*_conv(inputs, inner, 1), nn.ReLU(), *_conv(inner, inner, 3, stride), nn.ReLU()]
        self.body = nn.Sequential(*layers, *_conv(inner, outputs, 1))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def resnet50() -> nn.Sequential:
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride, blocks in ((256, 1, 3), (512, 2, 4), (1024, 2, 6), (2048, 2, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, outputs, 1 if block else stride))
            inputs = outputs
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))
    return nn.Sequential(Normalize([120.0] * 3, [60.0] * 3), *layers, *head)


class Attention(nn.Module):
    """Of all tokens to all. x [batch, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Norm before attention and before the MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021): patches, a class token, learned positions."""

    def __init__(self, patch: int, width: int, blocks: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.normalize = Normalize([120.0] * 3, [60.0] * 3)
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (SIZE // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(self.normalize(images)).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_s() -> VisionTransformer:
    return VisionTransformer(patch=16, width=384, blocks=12, heads=6, hidden=1536)


NETWORKS = {"resnet50": resnet50, "vit-s": vit_s}
