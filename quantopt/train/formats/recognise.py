"""Decides by its contents, its name and its folder what each file of a source is."""

from pathlib import Path

from quantopt.train import sources
from quantopt.train.formats import cifar, folders, idx
from quantopt.train.formats.parts import Gathered, Parts
from quantopt.train.left_out import ARCHIVE, LeftOut
from quantopt.train.progress import bar
from quantopt.train.sources import DataError


def read(path: Path, left_out: LeftOut, progress: bool) -> Parts:
    """The images of `path`; what is not read is added to `left_out`. Raises DataError, which names the member."""
    gathered = Gathered(left_out)
    files, batches, images = idx.Files(gathered), cifar.Batches(gathered), folders.Images(gathered)
    with bar(progress, f"decoding {path.name}", unit="files", leave=False, delay=0.5) as shown:
        for member in sources.members(path, left_out):
            name = member.name
            shown.update()
            if member.stream is None:
                images.add_folder(name)
                continue
            if name.lower().endswith(sources.ARCHIVES):
                left_out.add(ARCHIVE, name)
                continue
            data = sources.decompressed(name, member.read())
            if files.takes(name, data):
                files.add(name, data)
            elif batches.takes_pickle(name, data):
                batches.add_pickle(name, data)
            elif images.takes(name):
                images.add(name, data)
            elif batches.takes_binary(name, data):
                batches.add_binary(name, data)
            else:
                images.add_elsewhere(name)
    present = [reader for reader in (images, files, batches) if reader]
    if not present:
        raise DataError(
            "no data found: expected IDX (MNIST) files, CIFAR pickles or binary batches, or images in train/CLASS/ and "
            "test/CLASS/" + (f"; {batches.refused}" if batches.refused else "")
        )
    if len(present) > 1:
        kinds = " and ".join(reader.kind for reader in present)
        raise DataError(f"holds more than one data set: {kinds}")
    return present[0].parts()
