"""Elements of a tensor: loads and stores as float32, and stochastic rounding to bfloat16."""

import triton
import triton.language as tl

# The kernels use no function of tl that is itself written with @triton.jit: the tests load them in Triton's
# interpreter beside the compiled ones, and such a function exists in one form only.


@triton.jit
def read(ptr, i, inside, WHOLE: tl.constexpr):
    """As float32. A whole block is read without a mask, 16 bytes at a time."""
    if WHOLE:
        x = tl.load(ptr + i)
    else:
        x = tl.load(ptr + i, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def write(ptr, i, x, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + i, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + i, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-7 on uint32 counters with a 64-bit key."""
    seed = seed.to(tl.uint64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_halves(first, step, index, seed, BLOCK: tl.constexpr):
    """The random 16 bits of BLOCK elements from ``first``, a multiple of 8: csrc/core/philox.h."""
    blocks = first // 8 + tl.arange(0, BLOCK // 8)
    low = blocks.to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, low, high, step + 0 * low, index + 0 * low)
    # the words in order 0..3 along the last dimension, then their halves
    words = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (0, 2, 1))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def random_halves_anywhere(i, step, index, seed):
    """The same of any elements ``i``, each of which makes its block of 8."""
    blocks = i // 8
    low = blocks.to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, low, high, step + 0 * low, index + 0 * low)
    lane = (i - blocks * 8).to(tl.uint32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return (word >> (lane % 2 * 16)) & 0xFFFF


@triton.jit
def stochastic_bfloat16(x, random):
    """csrc/core/rounding.h with 16 random bits for each element."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    special = tl.where(size > 0x7F800000, 0x7FC00000, tl.where(size == 0x7F800000, size, 0x7F7F0000))
    rounded = tl.where(size < 0x7F7F0000, bits + random, bits & 0x80000000 | special)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
