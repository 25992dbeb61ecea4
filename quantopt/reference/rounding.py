"""Stochastic rounding to bfloat16 by Philox4x32-7 (Salmon et al., SC 2011), bit for bit as the kernels do it.

Element i (in memory) of tensor n at step k takes the 16-bit half i % 8 of the block with counter (i/8 low, i/8 high, k,
n) and the 64-bit seed as key, so the result does not depend on chunks, threads or vector width.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
STATE_TENSOR = 2**31  # exp_avg_sq of tensor n takes the random numbers of tensor n + 2^31
ROUNDS = 7


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, for 32-bit numbers held in int64."""
    low = (constant & 0xFFFF) * x
    high = (constant >> 16) * x + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(blocks: Tensor, step: int, tensor: int, seed: int, rounds: int = ROUNDS) -> Tensor:
    """[n] block numbers (int64) -> [n, 4] random 32-bit words in int64."""
    c0, c1 = blocks & _MASK, (blocks >> 32) & _MASK
    c2, c3 = torch.full_like(blocks, step & _MASK), torch.full_like(blocks, tensor & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        (h0, l0), (h1, l1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def stochastic_bfloat16(x: Tensor, step: int, tensor: int, seed: int) -> Tensor:
    """Rounds float32 ``x`` to bfloat16 up or down with the probabilities that keep the mean; a finite value never
    becomes infinite."""
    if not x.is_contiguous():  # of dense memory, in the order in which the elements lie there
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        rounded = stochastic_bfloat16(x.permute(order).contiguous(), step, tensor, seed)
        return rounded.permute([order.index(d) for d in range(x.dim())])
    n = x.numel()
    words = philox(torch.arange((n + 7) // 8, device=x.device), step, tensor, seed)
    random = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[:n]
    bits = x.reshape(-1).view(torch.int32).to(torch.int64) & _MASK
    size = bits & 0x7FFFFFFF
    rounded = (size + random).clamp(max=0x7F7FFFFF)
    kept = torch.where(size < 0x7F800000, rounded, torch.where(size > 0x7F800000, 0x7FC00000, size))
    out = ((bits & 0x80000000) | kept) & 0xFFFF0000
    out = torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
    return out.view(torch.float32).to(torch.bfloat16).reshape(x.shape)
