"""Training: what a run reports, packs and leaves behind, and what is refused."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import quantopt
from quantopt.train import augment, data, demo, loop, measure, optimizers, report
from quantopt.train.config import Config
from quantopt.train.errors import InputError, TrainingError
from quantopt.train.loop import Trainer, train
from training_data import CONFIG, assert_equal, checkpoint, run

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_every_recipe_learns_and_reports(dataset, optimizer):
    result = run(dataset, optimizer=optimizer, epochs=5)
    written = result.report
    assert set(written) == {
        "config",
        "versions",
        "seed",
        "left_out",
        "curves",
        "histograms",
        "layers",
        "accuracy_latent",
        "accuracy_quantized",
        "accuracy_packed",
        "processes",
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
    assert result.histograms.shape == (6, measure.HISTOGRAM_BINS)
    if optimizer in optimizers.FLOAT:
        measured, other = "accuracy_latent", "accuracy_quantized"
        measured, other = (other, measured) if optimizer == "luq" else (measured, other)
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
        ("stam", "17-level", "sawb"),
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
@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_captured_training_takes_the_same_course(dataset, optimizer):
    eager, graphed = graphed_and_eager(dataset, optimizer, "cuda")
    if optimizer != "luq":  # whose random gradients a graph draws at other places
        assert graphed.report["curves"]["loss"] == pytest.approx(eager.report["curves"]["loss"], rel=0.05)
    assert graphed.report["curves"]["loss"][-1] < 0.5 * graphed.report["curves"]["loss"][0]
    assert graphed.report["optimizer_share"] is None


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet18"])
def test_packed_logits_are_those_of_the_projected_network(dataset, model):
    config = dataclasses.replace(CONFIG, model=model, epochs=1, batch_size=80, limit=80)
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
    before, after = measure.weight_bytes(trainer.model, packed)
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
    """One seed and few epochs; docs and bench have the full numbers."""
    digits = data.digits()
    accuracy = {}
    for optimizer in ("sgd", "askew", "stam"):
        final = train(Config(optimizer=optimizer, epochs=4), digits, progress=False).report
        accuracy[optimizer] = final["accuracy_latent" if optimizer == "sgd" else "accuracy_packed"]
    assert min(accuracy.values()) > 96.5 and accuracy["sgd"] - min(accuracy.values()) < 2.5


def test_warmup_then_cosine():
    factors = [optimizers.schedule(step, 100, 0.1) for step in range(101)]
    assert (
        factors[0] == pytest.approx(1 / 11)
        and factors[10] == 1
        and factors[100] == pytest.approx(0, abs=1e-12)
    )
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert optimizers.schedule(0, 10, 0.0) == 1


def test_infinite_loss_stops_the_run(dataset, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss became .*smaller --lr"):
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


# ------------------------------------------------------------------------------------------------ the demo


def test_demo_prints_a_row_per_optimizer_and_writes_its_files(patterns, tmp_path, capsys, monkeypatch):
    from PIL import Image

    draw = report.save_figure
    monkeypatch.setattr(  # the figures of the demo alone are looked at
        report,
        "save_figure",
        lambda figure, path: draw(figure, path) if path.parent.name == "demo" else path.touch(),
    )

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
