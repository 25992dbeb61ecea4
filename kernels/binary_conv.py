"""activation(conv2d(x, W) + b) in Triton, W = scale * sum_i plane_weights[i] * (±1 plane i) from its bits.

An implicit product: the rows are the pixels of y, K = (r, s, c), x is read channels last. Where the kernel reaches over
the border x is read as 0, and 0 times ±1 is 0. The bits are first put into the order in which a block reads them, one
step of K after the other; int8 activations share one scale per image, as on the CPU. K is split as in
kernels/binary_linear.py.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantopt.kernels.binary_linear import Config, config_for, processors_of, splits_for
from quantopt.kernels.epilogue import epilogue, epilogue_arguments, run_epilogue
from quantopt.kernels.quantize import quantize_images
from quantopt.packed_weight import ConvGeometry, PackedWeight


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def order_kernel(
    bits_ptr,  # [P, N, ceil(K/8)], K = (c, tap)
    out_ptr,  # [P, groups, taps, ceil(C/INPUTS), N/groups, INPUTS/8]
    count,  # bytes of out
    outputs,  # of a group
    channels,
    taps,
    steps,
    row_bytes,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bits tap by tap, in blocks of INPUTS channels; those beyond the last are 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bytes_each: tl.constexpr = INPUTS // 8
    byte = at % bytes_each
    row = at // bytes_each
    n = row % outputs
    row = row // outputs
    step = row % steps
    row = row // steps  # (plane, group)
    blocks = steps // taps
    eight = tl.arange(0, 8)
    c = (step % blocks * INPUTS + byte * 8)[:, None] + eight[None, :]
    k = c * taps + (step // blocks)[:, None]
    inside = (at < count)[:, None] & (c < channels)
    source = (row * outputs + n)[:, None] * row_bytes + k // 8
    packed = tl.load(bits_ptr + source, mask=inside, other=0).to(tl.int32)
    ones = ((packed >> (k % 8).to(tl.int32)) & 1) << eight[None, :]
    tl.store(out_ptr + at, tl.reduce(ones, 1, either).to(tl.uint8), mask=at < count)


@triton.jit(do_not_specialize=["rows", "steps_each"])
def conv_kernel(
    x_ptr,  # [images, height, width, all channels]
    bits_ptr,  # as order_kernel leaves them
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    out_ptr,  # y [pixels, all outputs], or with PARTIAL the sums [splits, pixels, all outputs]
    rows,  # pixels of y, all images
    height,
    width,
    all_channels,
    channels,  # of a group
    out_height,
    out_width,
    all_outputs,
    outputs,  # of a group
    kernel_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    steps,  # blocks of channels, of all taps
    blocks,  # of one tap
    steps_each,  # in one part
    PLANE_WEIGHTS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    PARTIAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    # Blocks that follow each other share pixels.
    across = (outputs + OUTPUTS - 1) // OUTPUTS
    n = (tl.program_id(0) % across) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, groups = tl.program_id(1), tl.num_programs(1)
    part = tl.program_id(2).to(tl.int64)
    image = m // (out_height * out_width)
    pixel = (m % (out_height * out_width)).to(tl.int32)
    h = pixel // out_width * stride_h - padding_h
    w = pixel % out_width * stride_w - padding_w
    corner = ((image * height + h) * width + w) * all_channels + group * channels

    total = tl.full([OUTPUTS, ROWS], 0, tl.int32 if INT8 else tl.float32)
    c = tl.arange(0, INPUTS)
    byte = tl.arange(0, INPUTS // 8)
    eight = tl.arange(0, 8)
    for step in range(part * steps_each, tl.minimum(steps, (part + 1) * steps_each)):
        tap = step // blocks
        first = step % blocks * INPUTS
        down = tap // kernel_width * dilation_h
        right = tap % kernel_width * dilation_w
        inside = (h + down >= 0) & (h + down < height) & (w + right >= 0) & (w + right < width) & (m < rows)
        at = corner + (down * width + right) * all_channels
        x = tl.load(
            x_ptr + at[None, :] + (first + c)[:, None],
            mask=inside[None, :] & (first + c < channels)[:, None],
            other=0,
        )
        for plane in tl.static_range(len(PLANE_WEIGHTS)):
            row = ((plane * groups + group).to(tl.int64) * steps + step) * outputs + n
            packed = tl.load(
                bits_ptr + row[:, None] * (INPUTS // 8) + byte[None, :],
                mask=(n < outputs)[:, None],
                other=0,
            )
            ones = (packed[:, :, None] >> eight[None, None, :].to(tl.uint8)) & 1
            if INT8:
                signs = 2 * ones.to(tl.int8) - 1
                product = tl.dot(signs.reshape(OUTPUTS, INPUTS), x)
            else:
                signs = tl.where(ones != 0, 1.0, -1.0).to(x.dtype)
                product = tl.dot(signs.reshape(OUTPUTS, INPUTS), x, input_precision="ieee")
            total += product * PLANE_WEIGHTS[plane]
    sums = tl.trans(total)
    column = group * outputs + n
    where = m[:, None] * all_outputs + column[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < outputs)
    if PARTIAL:
        tl.store(out_ptr + part * rows * all_outputs + where, sums, mask=mask)
    else:
        images = rows // (out_height * out_width)
        y = epilogue(
            sums,
            scale_ptr,
            bias_ptr,
            x_scale_ptr,
            image,
            column,
            images,
            all_outputs,
            ONE_SCALE,
            ACTIVATION,
        )
        tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)


def block_for(rows: int, outputs: int, channels: int) -> Config:
    """The block for so many pixels, outputs and channels of a group; tensor cores take at least 16 x 32."""
    config = config_for(rows, 0)
    return config._replace(
        outputs=min(config.outputs, max(16, triton.next_power_of_2(outputs))),
        inputs=min(config.inputs, max(32, triton.next_power_of_2(channels))),
    )


def binary_conv2d(
    x: Tensor, weight: PackedWeight, geometry: ConvGeometry, compute: str, activation: str
) -> Tensor:
    """:func:`quantopt.binary_conv2d` of checked arguments; x is [B, C, H, W]. No groups of weights."""
    kernel, stride, padding, dilation, groups = geometry
    images, all_channels, height, width = x.shape
    all_outputs, channels = weight.outputs, all_channels // groups
    outputs, taps = all_outputs // groups, geometry.taps
    size = geometry.output_size(x)
    y = torch.empty(
        [images, all_outputs, *size], dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if y.numel() == 0:
        return y
    rows = images * size[0] * size[1]
    # Triton launches on the current device.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        arguments = epilogue_arguments(weight, activation)
        values = x.to(torch.bfloat16) if compute == "bf16" else x
        values = values.contiguous(memory_format=torch.channels_last)
        if compute == "int8" and x.numel() > 0:
            values, arguments["x_scale_ptr"] = quantize_images(values)
        config = block_for(rows, outputs, channels)
        blocks = triton.cdiv(channels, config.inputs)
        steps = taps * blocks
        ordered = torch.empty(
            [weight.planes, groups, steps, outputs, config.inputs // 8],
            dtype=torch.uint8,
            device=x.device,
        )
        if ordered.numel() > 0:
            block = 256
            order_kernel[(triton.cdiv(ordered.numel(), block),)](
                weight.bits.contiguous(),
                ordered,
                ordered.numel(),
                outputs,
                channels,
                taps,
                steps,
                weight.bits.shape[-1],
                INPUTS=config.inputs,
                BLOCK=block,
            )
        pieces = triton.cdiv(outputs, config.outputs) * triton.cdiv(rows, config.rows)
        splits = splits_for(pieces * groups, steps, processors_of(x.device)) if steps > 0 else 1
        sums = y
        if splits > 1:
            whole = torch.int32 if compute == "int8" else torch.float32
            sums = torch.empty([splits, rows, all_outputs], dtype=whole, device=x.device)
        conv_kernel[(pieces, groups, splits)](
            x_ptr=values,
            bits_ptr=ordered,
            out_ptr=sums,
            rows=rows,
            height=height,
            width=width,
            all_channels=all_channels,
            channels=channels,
            out_height=size[0],
            out_width=size[1],
            all_outputs=all_outputs,
            outputs=outputs,
            kernel_width=kernel[1],
            stride_h=stride[0],
            stride_w=stride[1],
            padding_h=padding[0],
            padding_w=padding[1],
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            steps=steps,
            blocks=blocks,
            steps_each=triton.cdiv(steps, splits),
            PLANE_WEIGHTS=tuple(weight.plane_weights),
            INT8=values.dtype == torch.int8,
            PARTIAL=splits > 1,
            ROWS=config.rows,
            OUTPUTS=config.outputs,
            INPUTS=config.inputs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # As in binary_linear: not fused with the sum, scale and bias give the bits of the CPU.
            enable_fp_fusion=values.dtype == torch.float32,
            **arguments,
        )
        if splits > 1:
            run_epilogue(sums, y, arguments, rows_of_scale=size[0] * size[1])
    return y
