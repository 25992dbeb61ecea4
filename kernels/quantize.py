"""Symmetric quantisation to int8 in Triton, as csrc/core/quantize.h: s = max|x| / 127, q = x / s rounded half to even.

Zeros give s = 0 and q = 0; an infinity or NaN gives s = NaN and q = 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def magnitude(x):
    """|x| as an integer: as such magnitudes order like floats, infinities and NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """(s, whether it divides) from the largest magnitude."""
    finite = largest < 0x7F800000
    s = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    return tl.where(finite, s, float("nan")), finite & (s > 0.0)


@triton.jit
def quantized(x, s, usable):
    quotient = tl.div_rn(tl.where(usable, x.to(tl.float32), 0.0), tl.where(usable, s, 1.0))
    whole = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: no fraction is left
    return tl.where(whole > 127.0, 127.0, tl.where(whole < -127.0, -127.0, whole)).to(tl.int8)


@triton.jit
def quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, inputs, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0, tl.int32)
    for first in range(0, inputs, BLOCK):
        k = first + at
        x = tl.load(x_ptr + row * stride + k, mask=k < inputs, other=0.0)
        largest = tl.maximum(largest, magnitude(x))
    s, usable = scale_of(tl.reduce(largest, 0, larger))
    for first in range(0, columns, BLOCK):
        k = first + at
        x = tl.load(x_ptr + row * stride + k, mask=k < inputs, other=0.0)
        tl.store(q_ptr + row * columns + k, quantized(x, s, usable), mask=k < columns)
    tl.store(scale_ptr + row, s)


def quantize_rows(x: Tensor, q: Tensor, x_scale: Tensor) -> None:
    """Rows of x [M, K] into q [at least M, at least K], zeros from K on, and their scales."""
    rows, inputs = x.shape
    block = max(32, min(4096, triton.next_power_of_2(inputs)))
    quantize_rows_kernel[(rows,)](x, q, x_scale, inputs, q.shape[1], x.stride(0), BLOCK=block)


@triton.jit
def largest_kernel(x_ptr, parts_ptr, size, BLOCK: tl.constexpr):
    """The largest magnitude in one part of an image."""
    image, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0, tl.int32)
    for first in range(part * BLOCK, size, parts * BLOCK):
        k = first + at
        largest = tl.maximum(largest, magnitude(tl.load(x_ptr + image * size + k, mask=k < size, other=0.0)))
    tl.store(parts_ptr + image * parts + part, tl.reduce(largest, 0, larger))


@triton.jit
def quantize_image_kernel(x_ptr, q_ptr, scale_ptr, parts_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    image, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    each = tl.arange(0, PARTS)
    largest = tl.reduce(tl.load(parts_ptr + image * parts + each, mask=each < parts, other=0), 0, larger)
    s, usable = scale_of(largest)
    at = tl.arange(0, BLOCK)
    for first in range(part * BLOCK, size, parts * BLOCK):
        k = first + at
        x = tl.load(x_ptr + image * size + k, mask=k < size, other=0.0)
        tl.store(q_ptr + image * size + k, quantized(x, s, usable), mask=k < size)
    if part == 0:
        tl.store(scale_ptr + image, s)


def quantize_images(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q of int8, s [images]); x is channels last. Several blocks share an image."""
    images, size, block = x.shape[0], x[0].numel(), 1024
    q = torch.empty_like(x, dtype=torch.int8)
    s = torch.empty([images], dtype=torch.float32, device=x.device)
    parts = max(1, min(256, triton.cdiv(size, 4 * block)))
    largest = torch.empty([images, parts], dtype=torch.int32, device=x.device)
    largest_kernel[(images, parts)](x, largest, size, BLOCK=block)
    quantize_image_kernel[(images, parts)](
        x, q, s, largest, size, PARTS=triton.next_power_of_2(parts), BLOCK=block
    )
    return q, s
