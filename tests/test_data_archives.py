"""Archives and compressed files: hostile, damaged, of several streams."""

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from data_files import RNG, add_to_tar, folder_files, load, png, refused, write_files, write_mnist
from quantopt.train import sources
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("prefix", ["../../", "/", "./", "//a/../../"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_in_an_archive_reach_no_file(tmp_path, kind, prefix):
    """Traversal and absolute names are names only: nothing is written."""
    (tmp_path / "inside").mkdir()
    files = {f"{prefix}{tmp_path}/{name}": contents for name, contents in folder_files().items()}
    path = write_files(tmp_path / "inside" / "hostile", kind, files)
    before = sorted(tmp_path.rglob("*"))
    assert len(load(path).train_images) == 6
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, "zip"])
def test_links_in_an_archive_are_refused(tmp_path, kind):
    """A link to a file outside would read it, and one that is left out would be an image that is missing."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(np.full((6, 5, 3), 77, np.uint8)))
    path = tmp_path / "source"
    write_files(path, "zip" if kind == "zip" else "tar", folder_files())
    if kind == "zip":
        link = zipfile.ZipInfo("pets/train/cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, str(secret))
    else:
        info = tarfile.TarInfo("pets/train/cat/link.png")
        info.type, info.linkname = kind, str(secret)
        with tarfile.open(path, "a") as archive:
            archive.addfile(info)
    assert "pets/train/cat/link.png is a link" in refused(path)


def test_devices_in_an_archive_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "source", "w") as archive:
        for name, contents in folder_files().items():
            add_to_tar(archive, name, contents)
        for name, kind in (("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"pets/train/cat/{name}.png")
            info.type = kind
            archive.addfile(info)
    dataset = load(tmp_path / "source")
    assert len(dataset.train_images) == 6
    assert dataset.left_out == (
        "left out: 2 special files (pets/train/cat/device.png, pets/train/cat/pipe.png)"
    )


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path, kind):
    path = write_files(tmp_path / "source", kind, folder_files())
    name = "./pets/train/cat/0.img"
    if kind == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"other")
    else:
        with tarfile.open(path, "a") as archive:
            add_to_tar(archive, name, b"other")
    assert "pets/train/cat/0.img is in the archive twice" in refused(path)


def test_names_of_members_do_not_reach_the_terminal(tmp_path, capsys):
    files = folder_files() | {"pets/\x1b[31m\nred\udcff": b"x"}
    dataset = load(write_files(tmp_path / "source", "tar", files))
    assert dataset.left_out == r"left out: 1 file of no known format (pets/\x1b[31m\nred\udcff)"
    assert load(tmp_path / "source").left_out == dataset.left_out  # from the cache
    assert capsys.readouterr().err.count("\n") == 2


# ------------------------------------------------------------------------------------------------ compression


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", COMPRESS)
def test_all_members_of_a_compressed_file_are_read(tmp_path, kind):
    compress = COMPRESS[kind]
    arrays = write_mnist(tmp_path / "mnist")
    plain = tmp_path / "mnist" / "train-images-idx3-ubyte"
    raw = plain.read_bytes()
    plain.unlink()
    file = plain.with_name(f"{plain.name}.{kind}")
    whole = compress(raw[:50]) + compress(b"") + compress(raw[50:])
    file.write_bytes(whole)
    assert np.array_equal(load(tmp_path / "mnist").train_images[:, 0].numpy(), arrays[plain.name])
    file.write_bytes(whole + bytes(512))  # padding
    assert len(load(tmp_path / "mnist").train_images) == 7
    for damaged in (whole + b"garbage", whole[:-3], compress(raw) + compress(b"")[:7]):
        file.write_bytes(damaged)
        assert f"{file.name} cannot be read" in refused(tmp_path / "mnist")


@pytest.mark.parametrize("kind", COMPRESS)
def test_all_members_of_a_compressed_archive_are_read(tmp_path, kind):
    raw = write_files(tmp_path / "tar", "tar", folder_files()).read_bytes()
    compress, source = COMPRESS[kind], tmp_path / "source"
    whole = compress(raw[:3000]) + compress(raw[3000:])
    source.write_bytes(whole)
    assert len(load(source).train_images) == 6
    for damaged in (whole + b"garbage", compress(raw[:3000]) + b"x" + compress(raw[3000:])):
        source.write_bytes(damaged)
        refused(source)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_one_after_the_other_are_refused(tmp_path, kind):
    one = write_files(tmp_path / "one", kind, folder_files())
    other = write_files(
        tmp_path / "other", kind, {"pets/train/cat/7.img": folder_files()["pets/train/cat/0.img"]}
    )
    (tmp_path / "both").write_bytes(one.read_bytes() + other.read_bytes())
    assert "data" in refused(tmp_path / "both")
    (tmp_path / "both").write_bytes(one.read_bytes() + b"garbage")
    assert "data" in refused(tmp_path / "both")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_bombs_are_bounded(tmp_path, monkeypatch, kind):
    """The bound holds for the sum of all members."""
    monkeypatch.setattr(sources, "MAX_MEMBER", 1 << 16)
    compress = COMPRESS[kind]
    for name, bomb in (("one", compress(bytes(1 << 20))), ("many", compress(bytes(1 << 14)) * 5)):
        assert "train-images.z is larger" in refused(
            write_files(tmp_path / name, "directory", {"train-images.z": bomb})
        )
    name = f"pets/train/cat/0.{kind}"
    assert f"{name} is larger" in refused(write_files(tmp_path / "zip", "zip", {name: bytes(1 << 20)}))
    assert f"{name} is larger" in refused(
        write_files(tmp_path / "tar", f"tar.{kind}", {name: bytes(1 << 20)})
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_another_method_than_deflate_is_refused(tmp_path, method):
    """zipfile decompresses those without a bound on what comes out at once."""
    with zipfile.ZipFile(tmp_path / "source", "w", method) as archive:
        archive.writestr("pets/train/cat/0.img", bytes(1 << 20))
    assert "pets/train/cat/0.img is compressed by another method" in refused(tmp_path / "source")


def test_a_damaged_header_does_not_end_an_archive(tmp_path):
    """tarfile takes a header with a wrong checksum, or none, for the end: the members after it would be left out."""
    source = write_files(tmp_path / "source", "tar", folder_files())
    raw = bytearray(source.read_bytes())
    at = raw.index(b"pets/train/dog/1.img")
    raw[at] ^= 1
    source.write_bytes(raw)
    assert "a header is damaged or missing" in refused(source)
    raw[at] ^= 1
    source.write_bytes(raw[:at])
    assert "a header is damaged or missing" in refused(source)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_truncated_archives(tmp_path, kind):
    noise = {
        f"pets/train/cat/{i}.img": png(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for i in range(6)
    }
    source = write_files(tmp_path / "source", kind, noise)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(InputError, match=r"--data: .*source"):
        load(source)


def test_encrypted_zip(tmp_path):
    source = write_files(tmp_path / "source", "zip", folder_files())
    raw = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = raw.find(signature)
        while start >= 0:
            raw[start + offset] |= 1
            start = raw.find(signature, start + 4)
    source.write_bytes(raw)
    with pytest.raises(InputError, match="is encrypted"):
        load(source)
