"""Training: what a run reports, packs and leaves behind, and that it can be killed and continued bit for bit."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantopt
from quantopt.train import augment, cli, data, demo, loop, recipes, report
from quantopt.train.errors import InputError
from quantopt.train.loop import Config, Trainer, train
from training_data import write_patterns

CONFIG = Config(data="patterns", epochs=4, batch_size=32)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("data") / "patterns")


@pytest.fixture(scope="module")
def dataset(patterns, tmp_path_factory) -> data.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return data.load(patterns, progress=False)


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """A cache of its own, and one thread, so that a run in another process computes the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(dataset: data.Dataset, **changes) -> loop.Result:
    out = changes.pop("out", None)
    return train(dataclasses.replace(CONFIG, **changes), dataset, out=out, progress=False)


def assert_equal(a: object, b: object, where: str = "checkpoint") -> None:
    """Bitwise equality of nested state."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        same = torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        )
        assert same, f"{where} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "update_seconds"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_every_recipe_learns_and_reports(dataset, optimizer):
    result = run(dataset, optimizer=optimizer, epochs=5)
    written = result.report
    assert set(written) == {
        "config",
        "versions",
        "seed",
        "curves",
        "accuracy_latent",
        "accuracy_quantized",
        "accuracy_packed",
        "seconds",
        "images_per_second",
        "optimizer_share",
        "device",
        "bytes_float",
        "bytes_packed",
        "images_per_second_float",
        "images_per_second_packed",
    }
    curves = written["curves"]
    assert set(curves) == set(loop.CURVES) and {len(curve) for curve in curves.values()} == {5}
    assert curves["loss"][-1] < 0.5 * curves["loss"][0] and curves["accuracy"][-1] > 90
    assert written["seconds"] > 0 and 0 < written["optimizer_share"] < 1 and written["device"] == "cpu"
    assert result.histograms.shape == (6, loop.HISTOGRAM_BINS)
    if optimizer in recipes.FLOAT:
        measured, other = "accuracy_latent", "accuracy_quantized"
        measured, other = (measured, other) if optimizer == "sgd" else (other, measured)
        absent = (other, "accuracy_packed", "bytes_float", "bytes_packed", "images_per_second_packed")
        assert (
            written[measured] > 80 and all(written[key] is None for key in absent) and result.packed is None
        )
        assert set(curves["fraction_feasible"]) == {None}
        return
    assert written["accuracy_quantized"] > 80 and written["accuracy_latent"] > 80
    assert written["accuracy_packed"] == written["accuracy_quantized"]
    assert curves["fraction_feasible"][-1] == 1.0 and all(
        type(flips) is int for flips in curves["sign_flips"]
    )
    assert sum(curves["sign_flips"]) > 0
    assert written["bytes_packed"] < written["bytes_float"] / 3
    relaxation = {
        "askew": "epsilon",
        "askew-adam": "epsilon",
        "stam": "kappa",
        "binaryrelax": "kappa",
        "proxquant": "reg_strength",
    }
    for key in ("epsilon", "kappa", "reg_strength"):
        assert (curves[key][0] is not None) == (relaxation.get(optimizer) == key)
    json.dumps(written, allow_nan=False)


def test_feasible_throughout_for_askew_with_memory(dataset):
    """Measured before the interval shrinks for the next step, the projection is inside it after every step."""
    assert set(run(dataset, epochs=5).report["curves"]["fraction_feasible"]) == {1.0}


@pytest.mark.parametrize(
    ("optimizer", "bits", "scale"),
    [
        ("askew", 2, "tensor"),
        ("askew", "ternary", "channel"),
        ("askew", 1, "none"),
        ("stam", 4, "channel"),
        ("stam", 1, "none"),
        ("binaryconnect", 1, "none"),
    ],
)
def test_grids_and_scales(dataset, optimizer, bits, scale):
    result = run(dataset, optimizer=optimizer, bits=bits, scale=scale, epochs=5)
    assert result.report["accuracy_packed"] == result.report["accuracy_quantized"] > 80
    assert result.report["config"]["bits"] == bits and result.report["config"]["scale"] == scale


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "channels_last": True},
        {"optimizer": "askew", "bits": 4, "activations": 4},
        {"optimizer": "stam", "skip": []},
    ],
)
def test_other_ways_to_train(dataset, tmp_path, changes):
    result = run(dataset, epochs=5, out=tmp_path, **changes)
    assert result.report["accuracy_quantized"] > (50 if changes.get("skip") == [] else 80)  # by chance 25
    assert abs(result.report["accuracy_packed"] - result.report["accuracy_quantized"]) < 4  # of 60 images
    resumed = train(
        dataclasses.replace(CONFIG, epochs=5, **changes), dataset, out=tmp_path, resume=True, progress=False
    )
    assert_equal(result.model.state_dict(), resumed.model.state_dict())
    layers = [
        m
        for m in result.packed.modules()
        if isinstance(m, quantopt.nn.BinaryConv2d | quantopt.nn.BinaryLinear)
    ]
    assert len(layers) == (4 if changes.get("skip") == [] else 2)


def test_channels_last_changes_the_layout_and_not_the_course(dataset):
    plain, other = (run(dataset, epochs=1, channels_last=layout) for layout in (False, True))
    weight = other.model[5].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.allclose(plain.model[5].weight, weight, atol=2e-3)
    assert plain.report["curves"]["loss"] == pytest.approx(other.report["curves"]["loss"], rel=1e-3)


def test_compiled_training_takes_the_same_course(dataset, tmp_path, monkeypatch):
    compiled = []

    def compile_without_inductor(model):
        compiled.append(model)
        return torch._dynamo.optimize("aot_eager")(model)

    plain = run(dataset, epochs=2)
    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    other = run(dataset, epochs=2, compile=True, out=tmp_path)
    assert len(compiled) == 1
    assert plain.report["curves"]["loss"] == pytest.approx(other.report["curves"]["loss"], rel=1e-3)
    assert checkpoint(tmp_path)["model"].keys() == plain.model.state_dict().keys()


def test_test_accuracy_is_measured_when_its_turn_comes(dataset):
    curves = {every: run(dataset, epochs=3, test_every=every).report["curves"] for every in (0, 1, 2)}
    assert curves[0]["test_accuracy"] == [None] * 3 and curves[1]["test_accuracy"][-1] > 60
    assert curves[2]["test_accuracy"] == [None, *curves[1]["test_accuracy"][1:]]  # the last always
    assert all(curve["loss"] == curves[0]["loss"] for curve in curves.values())


def test_part_of_the_images(dataset):
    trainer = Trainer(dataclasses.replace(CONFIG, limit=42, validation=20), dataset)
    assert len(trainer.train_labels) == 40 and len(trainer.test_labels) == 20
    assert torch.equal(trainer.test_images, dataset.validation(20).test_images)
    assert len(Trainer(CONFIG, dataset).train_labels) == 160


def graphed_and_eager(dataset, optimizer, device):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, device=device, augment="crop", epochs=3)
    return [
        train(dataclasses.replace(config, cuda_graph=graph), dataset, progress=False)
        for graph in (False, True)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_captured_training_takes_the_same_course(dataset, optimizer):
    eager, graphed = graphed_and_eager(dataset, optimizer, "cuda")
    if optimizer != "luq":  # whose random gradients a graph draws at other places
        assert graphed.report["curves"]["loss"] == pytest.approx(eager.report["curves"]["loss"], rel=0.05)
    assert graphed.report["curves"]["loss"][-1] < 0.5 * graphed.report["curves"]["loss"][0]
    assert graphed.report["optimizer_share"] is None


def test_training_starts_from_another_run(dataset, tmp_path):
    run(dataset, optimizer="sgd", epochs=5, out=tmp_path / "float")
    config = dataclasses.replace(CONFIG, optimizer="proxquant", init=str(tmp_path / "float"), epochs=1)
    state = checkpoint(tmp_path / "float")
    trainer = Trainer(config, dataset, state["model"])
    assert_equal(dict(trainer.model.state_dict()), dict(state["model"]))
    warm = train(config, dataset, out=tmp_path / "warm", progress=False).report["curves"]["loss"][0]
    cold = run(dataset, optimizer="proxquant", epochs=1).report["curves"]["loss"][0]
    assert warm < 0.5 * cold
    (tmp_path / "float" / "checkpoint.pt").unlink()
    train(config, dataset, out=tmp_path / "warm", resume=True, progress=False)
    with pytest.raises(InputError, match=r"--init: .*does not exist"):
        train(config, dataset, progress=False)
    with pytest.raises(InputError, match="--init: its network is not this one"):
        train(dataclasses.replace(config, model="mlp", init=str(tmp_path / "warm")), dataset, progress=False)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet18"])
def test_packed_logits_are_those_of_the_projected_network(dataset, model):
    config = dataclasses.replace(CONFIG, model=model, epochs=1, batch_size=80)
    trainer = Trainer(config, dataset)
    from tqdm import tqdm

    with tqdm(disable=True) as bar:
        trainer.train_epoch(bar)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    state = trainer.optimizer.optimizer.state_dict()
    kept = {i: {key: value.clone() for key, value in s.items()} for i, s in state["state"].items()}
    result = trainer.finish()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), "measuring must leave the weights as they were"
    assert_equal(kept, trainer.optimizer.optimizer.state_dict()["state"])
    trainer.model.eval()
    with trainer.optimizer.optimizer.quantized(), torch.no_grad():
        expected = trainer.model(dataset.test_images)
    packed = result.packed
    before, after = loop.weight_bytes(trainer.model, packed)
    quantised = [
        p for p in trainer.model.parameters() if trainer.optimizer.optimizer.quantization(p) is not None
    ]
    assert before == 4 * sum(p.numel() for p in quantised) and before / after > 28
    with torch.no_grad():
        assert (packed(dataset.test_images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_batch_norm_is_reestimated_for_the_projected_weights(dataset):
    trainer = Trainer(CONFIG, dataset)
    trainer.finish()
    norm = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d) and m.num_features == 64)
    found = norm.running_mean.clone()
    inputs = []
    handle = norm.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    trainer.model.eval()
    with trainer.optimizer.optimizer.quantized(), torch.no_grad():
        trainer.model.train()
        trainer.model(dataset.train_images)  # all in one batch: the exact mean
    handle.remove()
    assert torch.allclose(found, inputs[0].mean((0, 2, 3)), atol=1e-4)
    assert found.abs().max() > 0.01


def test_batch_norm_is_reestimated_on_images_as_in_training(dataset):
    norms = {}
    for mode in ("none", "crop"):
        trainer = Trainer(dataclasses.replace(CONFIG, augment=mode), dataset)
        trainer.finish()
        norms[mode] = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
    images = augment.apply(dataset.train_images, "crop", torch.Generator().manual_seed(1))  # other shifts
    with torch.no_grad():
        mean = trainer.model[:2](images).mean((0, 2, 3))  # of the first convolution
    distance = {mode: (norm.running_mean - mean).norm() for mode, norm in norms.items()}
    assert distance["crop"] < 0.2 * distance["none"]


def test_runs_with_one_seed_agree_and_with_another_differ(dataset):
    first, same, other = (run(dataset, epochs=1, seed=seed) for seed in (3, 3, 4))
    assert_equal(first.model.state_dict(), same.model.state_dict())
    assert not torch.equal(first.model[1].weight, other.model[1].weight)


def test_binary_digits_are_nearly_as_accurate_as_float():
    """One seed and a third of the default budget; docs and bench have the full numbers."""
    digits = data.digits()
    accuracy = {}
    for optimizer in ("sgd", "askew", "stam"):
        final = train(Config(optimizer=optimizer, epochs=10), digits, progress=False).report
        accuracy[optimizer] = final["accuracy_latent" if optimizer == "sgd" else "accuracy_packed"]
    assert min(accuracy.values()) > 96.5 and accuracy["sgd"] - min(accuracy.values()) < 2.5


def test_warmup_then_cosine():
    factors = [recipes.schedule(step, 100, 0.1) for step in range(101)]
    assert (
        factors[0] == pytest.approx(1 / 11)
        and factors[10] == 1
        and factors[100] == pytest.approx(0, abs=1e-12)
    )
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert recipes.schedule(0, 10, 0.0) == 1


def test_infinite_loss_stops_the_run(dataset, tmp_path):
    with pytest.raises(loop.TrainingError, match=r"the loss became .*smaller --lr"):
        run(dataset, optimizer="sgd", lr=1e30, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vgg11"}, "--model: vgg11 needs images of at least 32x32"),
        ({"lr": math.nan}, "--lr: nan is not accepted"),
        ({"epochs": 0}, "--epochs: 0 is not accepted"),
        ({"batch_size": 1}, "--batch-size: 1 is not accepted"),
        ({"bits": 5}, "--optimizer: bits=5"),
        ({"optimizer": "adam"}, "--optimizer: 'adam' is not accepted"),
        ({"optimizer": "sgd", "bits": 1}, "--bits: 1 is not accepted: sgd"),
        ({"optimizer": "luq", "activations": 0}, "--activations: 0 is not accepted: luq has 4"),
        ({"activations": 2}, "--activations: 2 is not accepted"),
        ({"cuda_graph": True}, "--cuda-graph: True is not accepted: needs --device cuda"),
        ({"test_every": -1}, "--test-every: -1 is not accepted"),
        ({"limit": 3}, "--limit: 3 is not one image for each of 4 classes"),
        ({"validation": 3}, "--validation: 3 is not one image for each of 4 classes"),
        ({"validation": 160}, "--validation: 160 leaves no training images"),
        ({"anneal": {"start": 0.1}}, "--optimizer: start=0.1: the schedule of AskewSGD has end, hold, last"),
        ({"optimizer": "sgd", "anneal": {"end": 0.1}}, "--optimizer: anneal=.*: sgd has nothing to anneal"),
        ({"precision": "float16"}, "--precision: 'float16' is not accepted"),
        ({"options": {"speed": 1}}, "--optimizer: options=.*speed"),
        ({"backend": "cuda"}, "--backend: backend='cuda' cannot run"),
    ],
)
def test_bad_configurations(dataset, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(dataset, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ resuming


class Interruption(Exception):
    pass


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_resume_is_bit_identical(dataset, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, augment="crop-flip", seed=5)
    whole = train(config, dataset, out=tmp_path / "whole", progress=False)

    def interrupt(trainer: Trainer) -> None:
        if trainer.epoch == 3:
            raise Interruption

    with pytest.raises(Interruption):
        train(config, dataset, out=tmp_path / "cut", progress=False, on_epoch=interrupt)
    assert checkpoint(tmp_path / "cut")["epoch"] == 3
    torch.manual_seed(99)
    resumed = train(config, dataset, out=tmp_path / "cut", resume=True, progress=False)
    assert_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.report["curves"], resumed.report["curves"])


def test_different_data_order_would_be_noticed(dataset, tmp_path):
    """The comparison of the tests above tells runs apart that differ in the generator's state alone."""
    train(CONFIG, dataset, out=tmp_path / "a", progress=False)

    def spoil(trainer: Trainer) -> None:
        if trainer.epoch == 3:
            trainer.generator.manual_seed(1)

    train(CONFIG, dataset, out=tmp_path / "b", progress=False, on_epoch=spoil)
    with pytest.raises(AssertionError, match="differs"):
        assert_equal(checkpoint(tmp_path / "a")["model"], checkpoint(tmp_path / "b")["model"])


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from quantopt.train import augment, cli
point, arguments = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
calls = 0
def killer(original, at):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
if point == "mid-epoch":  # the second of the five steps of epoch 3
    augment.apply = killer(augment.apply, 12)
elif point == "writing":  # the second checkpoint is written, but not renamed
    Path.replace = killer(Path.replace, 3)
elif point == "finished":  # all epochs done, nothing measured
    cli.write_run = killer(cli.write_run, 1)
sys.exit(cli.main(arguments))
"""


@pytest.mark.parametrize(
    ("point", "optimizer", "epoch"),
    [("mid-epoch", "askew", 2), ("writing", "stam", 1), ("finished", "askew", 4)],
)
def test_killed_run_ends_as_if_it_had_not_been(patterns, tmp_path, capsys, point, optimizer, epoch):
    def arguments(out: str) -> list[str]:
        options = [
            "--optimizer",
            optimizer,
            "--epochs",
            "4",
            "--batch-size",
            "32",
            "--device",
            "cpu",
            "--quiet",
        ]
        return ["train", "--data", str(patterns), *options, "--augment", "crop", "--out", str(tmp_path / out)]

    command = [sys.executable, "-c", KILLED, point, *arguments("cut")]
    killed = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint(tmp_path / "cut")["epoch"] == epoch
    assert not (tmp_path / "cut" / "report.json").exists()
    assert cli.main([*arguments("cut"), "--resume"]) == 0
    assert cli.main(arguments("whole")) == 0
    capsys.readouterr()
    assert_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))
    packed = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut")]
    assert_equal(*packed)
    names = {file.name for file in (tmp_path / "cut").iterdir()}
    assert names == {"checkpoint.pt", "report.json", "model.safetensors", "curves.png", "weights.png"}


def test_resume_refuses_another_configuration(dataset, tmp_path):
    run(dataset, epochs=1, out=tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    config = dataclasses.replace(CONFIG, epochs=2, lr=0.25)
    with pytest.raises(InputError) as raised:
        train(config, dataset, out=tmp_path / "run", resume=True, progress=False)
    message = str(raised.value)
    assert message.startswith("--resume: ") and "epochs is 1 in the checkpoint and 2 now" in message
    assert "lr is 1.0 in the checkpoint and 0.25 now" in message and "seed" not in message
    other = dataclasses.replace(dataset, train_labels=dataset.train_labels.flip(0))
    with pytest.raises(InputError, match="fingerprint is"):
        train(dataclasses.replace(CONFIG, epochs=1), other, out=tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_a_damaged_checkpoint(dataset, tmp_path):
    run(dataset, epochs=2, out=tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    good = file.read_bytes()
    state = torch.load(file, weights_only=True)
    del state["generator"]
    for damage in (
        lambda: file.write_bytes(good[:-1000]),
        lambda: file.write_bytes(b""),
        lambda: torch.save(state, file),
    ):
        damage()
        with pytest.raises(InputError, match="--resume: "):
            train(
                dataclasses.replace(CONFIG, epochs=2),
                dataset,
                out=tmp_path / "run",
                resume=True,
                progress=False,
            )


class Hostile:
    def __reduce__(self):
        return (eval, ("open('hostile-checkpoint-ran', 'w')",))


def test_hostile_checkpoint_runs_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save({"config": {}, "model": Hostile()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match="is damaged, or holds more than"):
        train(CONFIG, dataset, out=tmp_path / "run", resume=True, progress=False)
    assert not (tmp_path / "hostile-checkpoint-ran").exists()


def test_resume_without_a_checkpoint_starts(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    train(config, dataset, out=tmp_path / "run", resume=True, progress=False)
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_new_run_replaces_an_old_one(dataset, tmp_path):
    for stale in ("report.json", "model.safetensors", ".checkpoint.pt.1.tmp"):
        (tmp_path / stale).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    run(dataset, epochs=1, out=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "notes.txt"}


# ------------------------------------------------------------------------------------------------ the demo


def test_demo_prints_a_row_per_optimizer_and_writes_its_files(patterns, tmp_path, capsys):
    from PIL import Image

    assert demo.main(["--data", str(patterns), "--epochs", "2", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert list(written["runs"]) == ["sgd", "binaryconnect", "binaryrelax", "proxquant", "askew", "stam"]
    for name, run_report in written["runs"].items():
        row = next(line for line in out.splitlines() if line.startswith(name)).split()
        assert row[1] == f"{run_report['accuracy_latent']:.2f}"
        quantised = run_report["accuracy_quantized"]
        assert row[2:4] == (["-", "-"] if quantised is None else [f"{quantised:.2f}"] * 2)
    for name in ("curves.png", "weights.png"):
        with Image.open(tmp_path / "demo" / name) as image:
            image.load()
            assert min(image.size) > 300 and len(image.getcolors(1 << 24)) > 20


def test_table_aligns_its_columns():
    shared = {"accuracy_latent": 99.5, "seconds": 1.0}
    quantised = {
        "accuracy_quantized": 98.25,
        "accuracy_packed": 98.25,
        "bytes_float": 2000,
        "bytes_packed": 100,
    }
    missing = dict.fromkeys(quantised)
    lines = report.table({"sgd": shared | missing, "a long name": shared | quantised}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["sgd", "99.50", "-", "-", "-", "-", "-", "1.0"]
    assert lines[3].split()[-3:] == ["100", "20.0x", "1.0"]


def test_damaged_checkpoints_are_refused(dataset, tmp_path):
    """Every part that is missing or of the wrong kind is an InputError that names --resume."""
    config = Config(optimizer="stam", model="mlp", epochs=1, batch_size=64)
    train(config, dataset, out=tmp_path, progress=False)
    path = tmp_path / "checkpoint.pt"
    good = torch.load(path, weights_only=True)

    def attempt(change):
        state = torch.load(path, weights_only=True)
        change(state)
        trainer = Trainer(config, dataset)
        with pytest.raises(InputError, match="--resume"):
            trainer.load_state_dict(state)

    assert good["epoch"] == 1
    attempt(lambda s: s.update(optimizer=None))
    attempt(lambda s: s.update(epoch=-5))
    attempt(lambda s: s.update(histograms=torch.zeros(0)))
    attempt(lambda s: s["curves"].update(loss=["a"]))
    attempt(lambda s: s["optimizer"]["state"][0].update(latent=[1]))
    attempt(lambda s: s["optimizer"]["state"][0].update(scale=torch.ones(7)))
    attempt(lambda s: s["optimizer"]["state"][0].pop("latent"))
