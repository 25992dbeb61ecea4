"""`torchrun -m quantopt train`: a run on several ranks is that on one, whoever of them fails."""

import contextlib
import copy
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from processes import free_port, start
from quantopt.train import augment, cli, report
from quantopt.train.directory import read_report
from training_data import checkpoint

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("cache", "one_thread", "blank_figures"),
]


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    options = [
        "--optimizer",
        "askew",
        "--epochs",
        "3",
        "--batch-size",
        "32",
        "--device",
        "cpu",
        "--quiet",
        "--model",
        "mlp",
    ]
    return ["train", "--data", str(data), *options, "--augment", "crop-flip", "--out", str(out), *more]


def commands(
    rank: int, folder: str, several: list[dict[int, list[str]]], ports: list[int], kill: int
) -> None:
    """Runs command lines (by rank, or that of rank 0), each in a process group of its own. Rank 1 is killed at the
    batch with the number `kill`."""
    report.save_figure = lambda figure, path: path.touch()
    original, calls = augment.apply, 0

    def apply(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    augment.apply = apply
    statuses = []
    for i, (by_rank, port) in enumerate(zip(several, ports, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                statuses.append(cli.main(by_rank.get(rank, by_rank[0])))
            except SystemExit as stop:  # of argparse
                statuses.append(int(str(stop.code)))
        Path(folder, f"{i}-{rank}").write_text(f"{out.getvalue()}{err.getvalue()}")
    sys.exit(statuses[-1] if len(several) == 1 else 0 if len(set(statuses)) == 1 else 99)


def torchrun(
    ranks: int, folder: Path, *several: dict[int, list[str]], kill: int = 0
) -> tuple[list[int | None], list[list[str]]]:
    """(exit codes, what each rank has printed at each command)."""
    folder.mkdir()
    codes = start(
        commands, ranks, str(folder), list(several), [free_port() for _ in several], kill, torchrun=True
    )
    said = [[Path(folder, f"{i}-{rank}") for rank in range(ranks)] for i in range(len(several))]
    return codes, [[file.read_text() if file.exists() else "" for file in files] for files in said]


def close(a: Path, b: Path) -> None:
    ours, theirs = checkpoint(a), checkpoint(b)
    assert ours["epoch"] == theirs["epoch"] == 3
    torch.testing.assert_close(ours["model"], theirs["model"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], atol=1e-5, rtol=1e-4)
    for name in ("loss", "accuracy", "test_accuracy", "epsilon", "fraction_feasible"):
        assert ours["curves"][name] == pytest.approx(theirs["curves"][name], abs=1e-5), name
    reports = [read_report(path / "report.json", "--model") for path in (a, b)]
    for name in ("accuracy_latent", "accuracy_quantized", "accuracy_packed"):
        assert reports[0][name] == reports[1][name]


def test_a_run_on_ranks_is_that_of_one_process(patterns: Path, tmp_path: Path) -> None:
    whole, two, cut = tmp_path / "whole", tmp_path / "two", tmp_path / "cut"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(arguments(patterns, whole)) == 0
    codes, said = torchrun(2, tmp_path / "a", {0: arguments(patterns, two)})
    assert codes == [0, 0]
    assert "written: " in said[0][0] and said[0][1] == ""
    close(two, whole)
    assert {file.name for file in two.iterdir()} == {file.name for file in whole.iterdir()}
    assert [read_report(path / "report.json", "--model")["processes"] for path in (whole, two)] == [1, 2]

    # Rank 1 of two is killed in the second epoch; three go on, with unequal parts of a batch.
    codes, said = torchrun(2, tmp_path / "b", {0: arguments(patterns, cut)}, kill=8)
    assert codes == [1, -signal.SIGKILL]
    assert "error: another rank has ended" in said[0][0] and "--resume" in said[0][0]
    assert checkpoint(cut)["epoch"] == 1 and not (cut / "report.json").exists()
    codes, said = torchrun(3, tmp_path / "c", {0: arguments(patterns, cut, "--resume")})
    assert codes == [0, 0, 0] and said[0][1:] == ["", ""]
    close(cut, whole)


def test_what_one_rank_refuses_ends_all(patterns: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    missing, other = arguments(tmp_path / "none", out), arguments(tmp_path / "other", out)
    from training_data import write_patterns

    write_patterns(tmp_path / "other", train=120)
    write_patterns(tmp_path / "large", size=10)
    started = tmp_path / "started"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*arguments(patterns, started, "--minutes", "1e-9")]) == 3
    resumed = arguments(patterns, started, "--resume")
    plain = arguments(patterns, out)
    both: dict[str, dict[int, list[str]]] = {
        "--batch-size: 2 images are less than 3 processes": {0: [*plain, "--batch-size", "2"]},
        "--activations: 4 takes statistics of all of a batch": {0: [*plain, "--activations", "4"]},
        "--optimizer: luq takes statistics": {0: [*plain, "--optimizer", "luq"]},
        "--compile: is for one process": {0: [*plain, "--compile"]},
        "invalid choice": {0: [*plain, "--model", "none"]},
        f"--data: rank 2: {tmp_path / 'none'} does not exist": {0: plain, 2: missing},
        "--data: rank 1: the fingerprint of the images here is": {0: plain, 1: other},
        "--resume: rank 2: the number of epochs in the checkpoint in --out here is 0, and 1": {
            0: resumed,
            2: arguments(patterns, out, "--resume"),
        },
        f"--init: rank 1: {tmp_path / 'none'} ": {0: plain, 1: [*plain, "--init", str(tmp_path / "none")]},
        "--data: rank 2: the fingerprint of the images here is": {
            0: plain,
            2: arguments(tmp_path / "large", out),
        },
        "torchrun: is for `quantopt train`; start `quantopt env` without it": {0: ["env"]},
    }
    codes, said = torchrun(3, tmp_path / "a", *both.values())
    assert codes == [0, 0, 0]  # the statuses of all ranks and commands are the same
    for expected, printed in zip(both, said, strict=True):
        assert expected in printed[0]
        assert printed[1:] == ["", ""]
    assert not out.exists()


def test_batch_norm_over_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    codes = start(batch_norm, 3)
    assert codes == [0, 0, 0]


def batch_norm(rank: int) -> None:
    from quantopt.train import ranks

    dist.init_process_group("gloo")
    for shape, make in (([7, 5], nn.BatchNorm1d), ([7, 5, 3, 3], nn.BatchNorm2d)):
        for options in ({}, {"affine": False}, {"momentum": None}):
            torch.manual_seed(1)
            first = nn.Linear(5, 5) if make is nn.BatchNorm1d else nn.Conv2d(5, 5, 1)
            plain = nn.Sequential(first, make(5, **options))
            model = copy.deepcopy(plain)
            parallel: Any = ranks.parallel(model)
            own = ranks.part(7)
            for _ in range(2):
                x, weight = torch.randn(shape), torch.randn(shape)
                whole, mine = x.clone().requires_grad_(), x[own].clone().requires_grad_()
                z = plain(whole)
                (z * weight).sum().backward()
                y = parallel(mine)
                (y * weight[own]).sum().backward()
                torch.testing.assert_close(y, z[own], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(mine.grad, whole.grad[own], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(3 * ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)
            assert type(model[1]) is make
    ranks.leave()
