"""CIFAR: pickles, binary batches, what belongs together."""

import gzip
import pickle
import re
import tarfile

import numpy as np
import pytest

from data_files import RNG, add_to_tar, cifar_batch, load, refused, write_files
from quantopt.train import unpickle
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


# As Python 2's cPickle writes {'batch_label': 'testing batch', 'labels': [1], 'data': np.full((1, 3072), 65, 'uint8')}
PYTHON2 = (
    b"\x80\x02}q\x01(U\x0bbatch_labelU\x0dtesting batchU\x06labels]K\x01aU\x04data"
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x01M\x00\x0c\x86"
    b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"T\x00\x0c\x00\x00" + b"A" * 3072 + b"tbu."
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickles(tmp_path, protocol):
    batches = [cifar_batch(4, 2, f"training batch {i} of 2", protocol) for i in (1, 2)]
    for i, batch in enumerate(batches):
        (tmp_path / f"data_batch_{i}").write_bytes(batch)
    (tmp_path / "some test").write_bytes(PYTHON2)
    names = {b"label_names": [b"cat", b"dog"], b"num_vis": 3072}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog") and dataset.shape == (3, 32, 32)
    expected = np.concatenate([pickle.loads(batch)[b"data"] for batch in batches]).reshape(8, 3, 32, 32)
    assert np.array_equal(dataset.train_images.numpy(), expected)
    assert dataset.train_labels.tolist() == [0, 1] * 4
    assert dataset.test_labels.tolist() == [1] and (dataset.test_images == 65).all()


def test_cifar100_pickles_in_an_archive(tmp_path):
    with tarfile.open(tmp_path / "noname", "w:gz") as archive:
        for name, label in (("train", "training batch 1 of 1"), ("test", "testing batch 1 of 1")):
            add_to_tar(archive, f"cifar-100-python/{name}", cifar_batch(5, 5, label, fine=True))
    dataset = load(tmp_path / "noname")
    assert len(dataset.classes) == 5 and len(dataset.train_images) == len(dataset.test_images) == 5


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary(tmp_path, classes):
    prefix = 1 if classes == 10 else 2
    records = RNG.integers(0, 256, (6, prefix + 3072), dtype=np.uint8)
    records[:, :prefix] = 0
    records[:, prefix - 1] = np.array([0, 1, 2, 3, 4, classes - 1])
    (tmp_path / "a_train.bin").write_bytes(records[:4].tobytes())
    (tmp_path / "a_test.bin").write_bytes(records[4:].tobytes())
    dataset = load(tmp_path)
    assert len(dataset.classes) == classes
    assert np.array_equal(dataset.train_images.numpy().reshape(4, -1), records[:4, prefix:])
    assert dataset.test_labels.tolist() == [4, classes - 1]


class Hostile:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_hostile_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    import os

    for function, arguments in ((os.mkdir, (str(marker),)), (eval, (f"open({str(marker)!r}, 'w')",))):
        folder = tmp_path / function.__name__
        folder.mkdir()
        hostile = pickle.dumps({b"data": Hostile(function, *arguments)})
        (folder / "data_batch_1").write_bytes(hostile)
        with pytest.raises(InputError, match=r"data_batch_1 cannot be read: it asks for .*refused"):
            load(folder)
        assert not marker.exists()
        pickle.loads(hostile)  # shows that the pickle would do its work
        assert marker.exists()
        marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize(
    "contents",
    [
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02K\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02cnumpy\nndarray\n}q\x00b.",  # changes a class
        b"\x80\x02cnumpy\ndtype\n}q\x00b.",  # changes a function
        b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",  # object arrays
        PYTHON2.replace(b"\x00\x0c\x86", b"\xff\xff\x86"),  # more elements than bytes
        PYTHON2[:-100],
        b"\x80\x02}K\x01" + b"\x85" * 10**6 + b"Ns.",  # overflows the stack when it is hashed
        b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns.",  # takes 2**60 steps to be hashed
        b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"Ns.",
        b"\x80\x02}K\x01" + b"\x85N0q\x00h\x00\x86" * 60 + b"Ns.",
        b"\x80\x04}K\x01" + b"".join(b"\x94h%c\x86" % i for i in range(60)) + b"Ns.",
        b"\x80\x02cnumpy\ndtype\n]q\x00"
        + b"0](h\x00h\x00eq\x00" * 60
        + b"\x85R.",  # takes 2**60 letters to be shown
        b"\x80\x02c_codecs\nencode\nU\x00]q\x00" + b"0](h\x00h\x00eq\x00" * 60 + b"\x86R.",
        pickle.dumps({1: 2}),
        pickle.dumps({("a",): 2}),
        pickle.dumps({"data": 1, b"data": 2}),
        b"\x80\x05" + b"(" * 10 + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # a huge length
    ],
)
def test_malformed_pickles_are_refused(contents):
    with pytest.raises(pickle.UnpicklingError):
        unpickle.loads(contents)


def test_pickles_of_something_else(tmp_path):
    for contents, message in (
        ({b"weights": 1}, "no `data` array"),
        ({b"data": np.zeros((2, 10), np.uint8), b"labels": [0, 1]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.float64), b"labels": [0, 1]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": 3}, "no `data` array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, None]}, "not integers"),
    ):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(contents, 2))
        with pytest.raises(InputError, match=message):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------ what fits


def cifar10(count: int = 2) -> dict[str, bytes]:
    """As torchvision leaves it: five batches, a test batch, the names of the classes and a page."""
    folder = "cifar-10-batches-py"
    files = {
        f"{folder}/data_batch_{i}": cifar_batch(count, 2, f"training batch {i} of 5") for i in range(1, 6)
    }
    files[f"{folder}/test_batch"] = cifar_batch(count, 2, "testing batch 1 of 1")
    names = {b"label_names": [b"cat", b"dog"], b"num_cases_per_batch": count, b"num_vis": 3072}
    files[f"{folder}/batches.meta"] = pickle.dumps(names, 2)
    files[f"{folder}/readme.html"] = b"<html>"
    return files


def cifar100() -> dict[str, bytes]:
    folder = "cifar-100-python"
    names = {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"fruit", b"animal"]}
    return {
        f"{folder}/train": cifar_batch(3, 2, "training batch 1 of 1", fine=True),
        f"{folder}/test": cifar_batch(2, 2, "testing batch 1 of 1", fine=True),
        f"{folder}/meta": pickle.dumps(names, 2),
        f"{folder}/file.txt~": b"",
    }


def binary10(count: int = 2) -> dict[str, bytes]:
    def batch() -> bytes:
        records = RNG.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        return records.tobytes()

    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {f"cifar-10-batches-bin/{name}": batch() for name in names}


def titled(label: bytes | None, contents: bytes, first_label: int = 0) -> bytes:
    """A copy of a batch with another title, None for none, and another label of its first image."""
    batch = pickle.loads(contents)
    batch.pop(b"batch_label", None)
    batch |= {b"labels": [first_label, *batch[b"labels"][1:]]} | ({b"batch_label": label} if label else {})
    return pickle.dumps(batch, 2)


def untitled10() -> dict[str, bytes]:
    return {
        name: titled(b"testing batch 1 of 1" if "test" in name else None, contents)
        for name, contents in cifar10().items()
        if "batch_" in name or "test" in name
    }


def binary100(count: int = 2) -> dict[str, bytes]:
    files = {}
    for name in ("train.bin", "test.bin"):
        records = RNG.integers(0, 256, (count, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = 19, 98 + np.arange(count) % 2
        files[f"cifar-100-binary/{name}"] = records.tobytes()
    return files


@pytest.mark.parametrize("kind", ["directory", "tar.gz"])
@pytest.mark.parametrize(
    ("files", "classes", "counts", "left_out"),
    [
        (cifar10(), ("cat", "dog"), (10, 2), "1 file of no known format (cifar-10-batches-py/readme.html)"),
        (cifar100(), ("apple", "bear"), (3, 2), "1 file of no known format (cifar-100-python/file.txt~)"),
    ],
)
def test_the_layouts_of_torchvision(tmp_path, kind, files, classes, counts, left_out):
    dataset = load(write_files(tmp_path / "source", kind, files))
    assert dataset.classes == classes and dataset.left_out == f"left out: {left_out}"
    assert (len(dataset.train_labels), len(dataset.test_labels)) == counts


def test_what_lies_beside_a_downloaded_archive(tmp_path):
    """torchvision keeps the archive in the folder into which it unpacks it."""
    files = cifar10() | {"cifar-10-python.tar.gz": b"\x1f\x8bnot looked into"}
    dataset = load(write_files(tmp_path / "source", "directory", files))
    assert "1 archive inside (cifar-10-python.tar.gz)" in dataset.left_out and len(dataset.train_labels) == 10


B, BIN = "cifar-10-batches-py", "cifar-10-batches-bin"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (cifar10() | cifar100(), f"{B}/.* is a pickle of CIFAR-10, cifar-100-python/.* is a pickle of CIFAR-100"),
        (binary10() | binary100(), f"{BIN}/.* of CIFAR-10, cifar-100-binary/.* of CIFAR-100"),
        (cifar10() | binary10(), f"{BIN}/.* is a binary batch of CIFAR-10, {B}/.* is a pickle"),
        (cifar10() | {f"{B}/meta": cifar100()["cifar-100-python/meta"]}, f"{B}/batches.meta and {B}/meta both name"),
        (
            cifar10() | {f"{B}/batches.meta": cifar100()["cifar-100-python/meta"]},
            "data_batch_1 is a pickle of CIFAR-10, .*batches.meta names the classes of CIFAR-100",
        ),
        (
            {f"a/{name}": contents for name, contents in cifar10().items() if "data" in name}
            | {f"b/{name}": contents for name, contents in cifar10().items() if "test" in name},
            f"a/{B}/data_batch_1 and b/{B}/test_batch lie in different folders",
        ),
        (
            {f"a/{name}": contents for name, contents in binary10().items()}
            | {f"b/{name}": contents for name, contents in binary10().items()},
            f"a/{BIN}/data_batch_1.bin and b/{BIN}/data_batch_1.bin lie in different folders",
        ),
        (
            {f"a/{name}" if "meta" in name else f"b/{name}": contents for name, contents in cifar10().items()},
            f"b/{B}/data_batch_1 and a/{B}/batches.meta lie in different folders",
        ),
        (
            cifar10() | {f"{B}/data_batch_3": cifar_batch(0, 2, "training batch 3 of 5", 4)},
            "data_batch_3 has no images",
        ),
        # batches that are missing, there twice, or of other sizes
        (cifar10() | {f"{B}/data_batch_3": None}, f"training batch 3 is missing beside {B}/data_batch_1"),
        (cifar10() | {f"{B}/data_batch_5": None}, "training batch 5 is missing"),
        (binary10() | {f"{BIN}/data_batch_1.bin": None}, "training batch 1 is missing"),
        (binary10() | {f"{BIN}/data_batch_5.bin": None}, "training batch 5 is missing"),
        (cifar10() | {f"{B}/test_batch": None}, "has no test batch"),
        (
            cifar10() | {f"{B}/data_batch_3": cifar_batch(2, 2, "training batch 2 of 5")},
            f"{B}/data_batch_2 and {B}/data_batch_3 are both training batch 2",
        ),
        (
            binary10()
            | dict.fromkeys((f"{BIN}/data_batch_2.bin", f"{BIN}/data_batch_4.bin"), bytes(3073)),
            f"{BIN}/data_batch_2.bin and {BIN}/data_batch_4.bin hold the same images",
        ),
        (binary10() | dict.fromkeys((f"{BIN}/data_batch_2.bin", f"{BIN}/test_batch.bin"), bytes(3073)), "the same"),
        (
            cifar10() | {f"{B}/data_batch_3": cifar_batch(3, 2, "training batch 3 of 5")},
            f"{B}/data_batch_3 has 3 images where {B}/batches.meta says 2",
        ),
        (
            cifar10() | {f"{B}/test_batch": cifar_batch(2, 2, "training batch 5 of 5")},
            f"{B}/test_batch holds 'training batch 5 of 5'",
        ),
        (cifar10() | {f"{B}/data_batch_3.gz": gzip.compress(b"x")}, f"{B}/data_batch_3.gz is damaged"),
        (
            cifar10() | {f"{B}/data_batch_3.gz": gzip.compress(cifar_batch(2, 2, "training batch 3 of 5"))},
            f"{B}/data_batch_3 and {B}/data_batch_3.gz differ in contents",
        ),
        # copies, edited copies and others
        *[
            (files | {f"{B}/{name}": titled(title, files[f"{B}/data_batch_5"], 1)}, message)
            for files in (cifar10(), untitled10())
            for name, title, message in (
                ("data_batch_5~", None, "data_batch_5 and .*data_batch_5~ hold the same images with other labels"),
                ("other", b"training batch 6 of 6", "data_batch_5 and .*other hold the same images with other labels"),
            )
        ],
        *[
            (files | {f"{B}/{name}": titled(title, cifar_batch(2, 2, ""))}, message)
            for files in (cifar10(), untitled10())
            for name, title, message in (
                ("extra.pkl", None, f"{B}/extra.pkl is a training batch beside {B}/data_batch_1 and has no number"),
                ("data_batch_1 (1)", None, r"data_batch_1 \(1\) is a training batch beside"),
                ("data_batch_1.orig", None, "data_batch_1 and .*data_batch_1.orig are both training batch 1"),
                ("extra", b"training batch 5 of 5", "data_batch_5 and .*extra are both training batch 5"),
                ("test_batch_old", None, f"{B}/test_batch_old is a test batch beside {B}/test_batch"),
            )
        ],
        (
            cifar10() | {f"{B}/data_batch_6": titled(None, cifar_batch(2, 2, ""))},
            "data_batch_6 is training batch 6, and the titles count 5",
        ),
        (
            binary10() | {f"{BIN}/extra.bin": binary10()[f"{BIN}/data_batch_1.bin"]},
            f"{BIN}/extra.bin is a training batch beside {BIN}/data_batch_1.bin and has no number",
        ),
        (
            binary100() | {"cifar-100-binary/x.bin": binary100()["cifar-100-binary/train.bin"]},
            "x.bin is a training batch beside .*train.bin and has no number",
        ),
        # damaged batches
        (binary10() | {f"{BIN}/data_batch_5.bin": bytes(6000)}, f"{BIN}/data_batch_5.bin is damaged"),
        (binary10() | {f"{BIN}/test_batch.bin": b""}, f"{BIN}/test_batch.bin is empty"),
        (binary10() | {f"{BIN}/other.bin": bytes(6000)}, f"{BIN}/other.bin is damaged"),
        (binary10() | {f"{BIN}/test_batch.bin": bytes(3073) + b"\x0a" * 3073}, "image 1 has the label 10"),
        (binary100() | {"cifar-100-binary/train.bin": b"\x14" * 3074}, "train.bin is damaged: .* the label 20"),
        (binary100() | {"cifar-100-binary/test.bin": bytes(3000)}, "test.bin is damaged"),
        (cifar10() | {f"{B}/data_batch_2": b"\x00" + cifar10()[f"{B}/data_batch_2"]}, "data_batch_2 is damaged"),
        (cifar10() | {f"{B}/data_batch_2": cifar10()[f"{B}/data_batch_2"][:-50]}, "data_batch_2 cannot be read"),
        (cifar100() | {"cifar-100-python/train": b""}, "cifar-100-python/train is empty"),
        (cifar100() | {"cifar-100-python/meta": b"x"}, "cifar-100-python/meta is damaged"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, files, message):
    present = {name: contents for name, contents in files.items() if contents is not None}
    assert re.search(message, refused(write_files(tmp_path / "source", "directory", present)))


def test_a_copy_in_another_compression_is_read_once(tmp_path):
    files = binary10()
    files |= {f"{name}.gz": gzip.compress(contents) for name, contents in files.items()}
    dataset = load(write_files(tmp_path / "source", "zip", files))
    assert len(dataset.train_labels) == 10 and "6 copies of the files beside them" in dataset.left_out


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-100, "train: image 1 has the label -100, and the labels are 0..9"),
        (-1, "train: image 1 has the label -1, and"),
        (10, "train: image 1 has the label 10, and"),
        (2**63 - 1, "train: image 1 has the label 9223372036854775807, and"),
        (1 << 1000, "train: image 1 has the label an integer of more than 64 bits"),
        (1.0, "train has labels that are not integers: image 1 has 1.0"),
        (True, "train has labels that are not integers: image 1 has True"),
        (b"1", "train has labels that are not integers: image 1 has b'1'"),
        ([1], "train has labels that are not integers: image 1 has list"),
    ],
)
def test_labels_that_are_no_class(tmp_path, label, message):
    batch = {b"data": RNG.integers(0, 256, (2, 3072), dtype=np.uint8), b"labels": [0, label]}
    (tmp_path / "train").write_bytes(pickle.dumps(batch, 2))
    (tmp_path / "test").write_bytes(cifar_batch(2, 2, "testing batch 1 of 1"))
    assert message in refused(tmp_path)
    if label == 10:  # which is a class if there are eleven
        names = {b"label_names": [f"{i}" for i in range(11)]}
        (tmp_path / "meta").write_bytes(pickle.dumps(names, 2))
        assert load(tmp_path).train_labels.tolist() == [0, 10]
        (tmp_path / "meta").write_bytes(pickle.dumps({b"label_names": names[b"label_names"][:10]}, 2))
        assert "the labels are 0..9 (by meta)" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_labels_in_an_array(tmp_path, dtype):
    batch = {b"data": RNG.integers(0, 256, (2, 3072), dtype=np.uint8), b"labels": np.array([1, 0], dtype)}
    (tmp_path / "train").write_bytes(pickle.dumps(batch, 2))
    (tmp_path / "test").write_bytes(cifar_batch(2, 2, "testing batch 1 of 1"))
    if dtype is np.float32:
        assert "image 0 has 1.0" in refused(tmp_path)
    else:
        assert load(tmp_path).train_labels.tolist() == [1, 0]


def test_classes_without_images_are_said(tmp_path):
    files = cifar10()
    names = {b"label_names": [b"cat", b"dog", b"owl"]}
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps(names, 2)
    del files["cifar-10-batches-py/readme.html"]
    files["cifar-10-batches-py/test_batch"] = cifar_batch(1, 2, "testing batch 1 of 1")
    dataset = load(write_files(tmp_path / "source", "zip", files))
    assert dataset.classes == ("cat", "dog", "owl")
    assert (
        dataset.left_out == "missing: training images of 1 class (owl), test images of 2 classes (dog, owl)"
    )


@pytest.mark.parametrize(
    "names",
    [
        {b"label_names": [b"cat", b"cat"]},
        {b"label_names": [b"cat", 1]},
        {b"label_names": b"cat"},
        {b"label_names": []},
        {b"label_names": [b"cat", b"dog"], b"num_vis": 3073},
        {b"label_names": [b"cat", b"dog"], b"num_cases_per_batch": 2.0},
    ],
)
def test_names_of_classes_that_are_none(tmp_path, names):
    files = cifar10() | {"cifar-10-batches-py/batches.meta": pickle.dumps(names, 2)}
    assert "batches.meta" in refused(write_files(tmp_path / "source", "zip", files))
