"""A decoder block of Llama's shape (Touvron et al. 2023): RMSNorm, attention with RoPE and shared heads, SwiGLU."""

from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F


class Sizes(NamedTuple):
    """Features of the residual stream, heads of the queries and of keys and values, hidden features of the SwiGLU."""

    width: int
    heads: int
    shared_heads: int
    hidden: int


LLAMA_3_8B = Sizes(4096, 32, 8, 14336)


@torch.fx.wrap  # a leaf for folding, which traces the block: a tracer does not know how many tokens there are
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al. 2021) of x [..., tokens, features]: the halves of the features are parts of complex numbers."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    real, imaginary = x.chunk(2, -1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)


class Block(nn.Module):
    """x [batch, tokens, width] -> the same shape; each token sees those before it. No bias anywhere."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        super().__init__()
        self.sizes = sizes
        features = sizes.width // sizes.heads
        self.norm1, self.norm2 = (nn.RMSNorm(sizes.width, eps=1e-5) for _ in range(2))
        self.q = nn.Linear(sizes.width, sizes.heads * features, bias=False)
        self.k, self.v = (nn.Linear(sizes.width, sizes.shared_heads * features, bias=False) for _ in range(2))
        self.o = nn.Linear(sizes.heads * features, sizes.width, bias=False)
        self.gate, self.up = (nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        self.act = nn.SiLU()  # a module, so that it can be folded
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)
        rates = 500_000.0 ** (-torch.arange(0, features, 2) / features)
        angles = torch.outer(torch.arange(tokens), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = rotate(self.heads(self.q(y), self.sizes.heads), self.cos, self.sin)
        k = rotate(self.heads(self.k(y), self.sizes.shared_heads), self.cos, self.sin)
        v = self.heads(self.v(y), self.sizes.shared_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))
