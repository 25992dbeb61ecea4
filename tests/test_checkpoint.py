"""Checkpoints that are damaged or hold something else: refused, or the run that they continue is the same."""

import copy
import dataclasses
import math
import random
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from old_files import tiny
from quantopt.train import checkpoint, models
from quantopt.train.directory import read_checkpoint
from quantopt.train.errors import InputError
from quantopt.train.loop import Trainer, train
from training_data import CONFIG, assert_equal, run

pytestmark = pytest.mark.usefixtures("cache", "one_thread")

NASTY = [
    torch.zeros(3, 2), torch.zeros(1, device="meta"), torch.eye(2).to_sparse(), torch.tensor([math.nan]),
    None, "", "x" * 1000, -1, 2**70, 10**400, 10**5000, math.nan, -math.inf, True, [], {}, [[]], {"step": 1},
]  # fmt: skip


def paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of everything within nested dictionaries and lists."""
    children: Any = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def parent(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        state = state[key]
    return state


@pytest.fixture
def trained(dataset, tmp_path, monkeypatch):
    """makes (a trainer, the checkpoint of a run after two of its three epochs, its file), for changes of CONFIG."""
    monkeypatch.setattr(models, "build", tiny)

    def make(**changes):
        config = dataclasses.replace(CONFIG, epochs=3, **changes)

        def stop(trainer: Trainer) -> None:
            if trainer.epoch == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, out=tmp_path, progress=False, on_epoch=stop)
        file = tmp_path / "checkpoint.pt"
        return Trainer(config, dataset), read_checkpoint(file, "--resume"), file

    return make


CONFIGURATIONS = [
    {"optimizer": "sgd"},
    {"optimizer": "luq", "test_every": 2},
    {"optimizer": "askew-adam"},
    {"optimizer": "stam", "scale": "none", "bits": 2, "test_every": 0},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=lambda changes: changes["optimizer"])
def test_values_of_wrong_kinds_are_refused_or_change_nothing(trained, changes):
    trainer, good, file = trained(**changes)
    whole = copy.deepcopy(good)
    refused = 0

    def attempt(state, what) -> None:
        nonlocal refused
        try:
            checkpoint.check_parts(state)
            trainer.load_state_dict(state, "--resume", file)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"--resume: {file} ") and "\n" not in str(error), what
            assert len(str(error)) < 900
        except ValueError as error:  # of check_parts
            refused += 1
            assert len(str(error)) < 900
        else:
            assert_equal(trainer.state_dict(), whole, str(what))

    attempt(good, "nothing is changed")
    assert refused == 0
    count = 0
    for path in list(paths(good)):
        if path == ("config", "data"):
            continue  # may differ: the fingerprint tells
        container, key = parent(good, path), path[-1]
        value = container[key]
        for nasty in NASTY:
            if nasty is None and path[0] == "layer_flips":
                continue  # as earlier versions had it
            container[key] = nasty
            attempt(good, (path, nasty))
            count += 1
        container[key] = value
        if isinstance(container, dict) and path != ("layer_flips",):
            del container[key]
            attempt(good, (path, "is missing"))
            container[key] = value
        if isinstance(value, dict):
            for name in ("step", "optimizer", 7):
                attempt_with = value.setdefault(name, attempt) is attempt
                if attempt_with:
                    value[name] = 1
                    attempt(good, (path, "has", name))
                    del value[name]
    assert refused > 0.9 * count
    attempt(good, "the same as at first")


def test_a_refused_checkpoint_changes_no_file(dataset, trained, tmp_path):
    trainer, good, file = trained()
    for path, value in (
        (("scheduler", "step"), 3),
        (("scheduler", "last_epoch"), 10**9),
        (("curves", "loss", 0), math.nan),
        (("config", "lr"), torch.ones(2)),
        (("rng",), torch.zeros(7, dtype=torch.uint8)),
        (("rng",), torch.full_like(good["rng"], 255)),
        (("epoch",), 3),
        (("model", "2.weight"), torch.full((4,), math.nan)),
    ):
        state = copy.deepcopy(good)
        parent(state, path)[path[-1]] = value
        torch.save(state, file)
        before = file.read_bytes()
        with pytest.raises(InputError, match=f"--resume: {file} "):
            train(trainer.config, dataset, out=tmp_path, resume=True, progress=False)
        assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"] and file.read_bytes() == before


def test_flipped_bits_are_noticed(trained):
    _, good, file = trained()
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        directory = archive.start_dir
    places = random.Random(0).sample(range(directory), 60) + list(range(directory, len(whole), 7))
    places += range(len(whole) - 90, len(whole), 3)
    for place in places:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            with pytest.raises(ValueError, match="is damaged"):
                checkpoint.decode(bytes(data))
    assert_equal(checkpoint.decode(whole), good)


def test_a_damaged_end_is_noticed(trained):
    _, good, file = trained()
    whole = file.read_bytes()
    for less in (1, 2, 63, 64, 65, 79, 80, 81, 90, 101, 102, 103, 1000):
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.decode(whole[:-less])
    torch.save(good, file)  # without the checksum
    plain = file.read_bytes()
    for data in (whole, plain):
        for more in (b"x", b"\0\0", b"x" * 80, b"x" * 5000, whole[-80:]):
            with pytest.raises(ValueError, match="is damaged"):
                checkpoint.decode(data + more)


def test_times_that_no_report_can_hold_are_refused(trained):
    trainer, good, _ = trained()
    for name, value in (("update_seconds", 1e308), ("seconds", 1e308), ("seconds", 1e-300), ("seconds", 0.0)):
        with pytest.raises(InputError, match=f"--resume: the checkpoint does not fit: {name} is "):
            trainer.load_state_dict({**good, name: value})


def test_the_file_is_one_of_torch(trained):
    _, good, file = trained()
    assert_equal(torch.load(file, weights_only=True), good)
    torch.save(good, file)  # without the checksum, as by version 0.1.0
    assert_equal(read_checkpoint(file, "--resume"), good)


def test_weights_to_start_from_are_checked(dataset, tmp_path):
    run(dataset, epochs=1, out=tmp_path / "first")
    file = tmp_path / "first" / "checkpoint.pt"
    good = torch.load(file, weights_only=True)
    for value in (torch.full_like(good["model"]["1.weight"], math.nan), torch.zeros(3), "text", None):
        torch.save({**good, "model": {**good["model"], "1.weight": value}}, file)
        with pytest.raises(InputError, match=r"--init: .* does not fit: model: 1\.weight"):
            run(dataset, init=str(file), out=tmp_path / "second")
    assert not (tmp_path / "second").exists()
