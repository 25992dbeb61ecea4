"""Augmentation of whole batches in tensor code, on the device the images are on.

All randomness comes from the `torch.Generator` given, so a run can be checkpointed and repeated exactly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_crop(
    images: Tensor, padding: int, generator: torch.Generator, first: int = 0, total: int | None = None
) -> Tensor:
    """Shifts every image by its own random (dy, dx), each uniform in -padding..padding, filling with zeros.

    images [N, C, H, W] of any dtype; the result has the same shape. The generator is on the images' device.
    first, total: the images are those from number ``first`` on of a batch of ``total``, and get what they get there.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    drawn = (2, count if total is None else total)
    corner = torch.randint(0, 2 * padding + 1, drawn, generator=generator, device=images.device)
    corner = corner[:, first : first + count]
    rows = corner[0, :, None] + torch.arange(height, device=images.device)
    columns = corner[1, :, None] + torch.arange(width, device=images.device)
    n = torch.arange(count, device=images.device)
    c = torch.arange(channels, device=images.device)
    return padded[n[:, None, None, None], c[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
    """Mirrors every image left to right with probability 1/2. images [N, C, H, W] of any dtype; first, total: as in
    `pad_crop`."""
    drawn = (len(images) if total is None else total, 1, 1, 1)
    chosen = torch.randint(0, 2, drawn, generator=generator, device=images.device)
    return torch.where(chosen[first : first + len(images)] == 1, images.flip(-1), images)


MODES = ("none", "crop", "crop-flip")


def default_mode(channels: int, height: int, width: int) -> str:
    """ "crop-flip" for colour images; "crop" for grey ones, which may be digits or letters; "none" below 16 pixels,
    where a shift by one moves the picture too far."""
    if min(height, width) < 16:
        return "none"
    return "crop-flip" if channels == 3 else "crop"


def apply(
    images: Tensor, mode: str, generator: torch.Generator, first: int = 0, total: int | None = None
) -> Tensor:
    """Augments uint8 images [N, C, H, W] by a mode of `MODES`; the shift is up to an eighth of the smaller side.
    first, total: as in `pad_crop`."""
    if mode != "none":
        images = pad_crop(images, max(1, min(images.shape[-2:]) // 8), generator, first, total)
    if mode == "crop-flip":
        images = flip(images, generator, first, total)
    return images
