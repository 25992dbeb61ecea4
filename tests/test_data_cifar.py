"""CIFAR: pickles, binary batches, what belongs together."""

import pickle
import tarfile

import numpy as np
import pytest

from data_files import RNG, add_to_tar, cifar_batch, load
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
