"""Augmentation of batches of images."""

import torch

from quantopt.train import augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pad_crop_shifts_each_image_as_a_loop_would():
    images = torch.randint(1, 256, (50, 3, 7, 5), dtype=torch.uint8, generator=generator())
    out = augment.pad_crop(images, 2, generator(3))
    corner = torch.randint(0, 5, (2, 50), generator=generator(3))
    padded = torch.zeros(50, 3, 11, 9, dtype=torch.uint8)
    padded[:, :, 2:9, 2:7] = images
    for i in range(50):
        y, x = corner[:, i].tolist()
        assert torch.equal(out[i], padded[i, :, y : y + 7, x : x + 5])
    assert len({tuple(c) for c in corner.T.tolist()}) > 10


def test_flip_mirrors_about_half():
    images = torch.randint(0, 256, (400, 1, 3, 4), dtype=torch.uint8, generator=generator())
    out = augment.flip(images, generator(1))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < int(mirrored.sum()) < 250


def test_augmentation_depends_on_the_generator_alone():
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator())
    torch.manual_seed(1)
    first = augment.apply(images, "crop-flip", generator(5))
    torch.manual_seed(2)
    assert torch.equal(first, augment.apply(images, "crop-flip", generator(5)))
    assert not torch.equal(first, augment.apply(images, "crop-flip", generator(6)))
    assert torch.equal(augment.apply(images, "none", generator(5)), images)
    modes = [augment.default_mode(*shape) for shape in ((1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 15, 99))]
    assert modes == ["crop", "crop-flip", "none", "none"]
