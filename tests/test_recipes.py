"""The recipes: every file is read and builds its network and optimizer; files and overrides on the command line."""

import copy
import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

import quantopt
from quantopt.train import cli, models, optimizers, recipes
from quantopt.train.config import HYPERPARAMETERS, Config
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = ("vgg11", "vgg16", "resnet18")  # those of the GPU; cnn is for the CPU
PRINTED = (
    "askew",
    *(f"askew-adam{form}{end}" for form in ("", "-gradient") for end in ("", "-clamp")),
)
ALL_BINARY = ("sgd", "binaryconnect", "binaryconnect-adam", "proxquant", *PRINTED, "askew-latent", "stam")
SOME_FLOAT = (
    "sgd",
    "binaryconnect",
    "binaryconnect-adam",
    "askew-adam",
    "askew-adam-gradient",
    "askew-latent",
    "stam",
)


@pytest.fixture(scope="module")
def networks():
    return {name: models.build(name, (3, 32, 32), 10) for name in models.MODELS if name != "mlp"}


def test_the_package_has_a_recipe_per_network_optimizer_and_bits():
    grids = {name: ["1bit"] for name in ("binaryconnect", "binaryrelax", "proxquant")}
    grids |= {name: ["1bit", "ternary", "2bit", "4bit"] for name in ("askew", "askew-adam", "stam")}
    expected = {f"{optimizer}-{bits}" for optimizer, all_bits in grids.items() for bits in all_bits}
    expected |= {"sgd", "luq", "askew-w4a4"}
    small = {f"{optimizer}-1bit" for optimizer in (*grids, "askew-adam")} | {"sgd", "stam-early-1bit"}
    assert set(recipes.names()) == (
        {f"{n}-{rest}" for n in NETWORKS for rest in expected}
        | {f"cnn-{rest}" for rest in small}
        | {f"{network}-{rest}" for network in ("convnet-small", "paper-convnet") for rest in ALL_BINARY}
        | {f"paper-{network}-{rest}" for network in ("vgg-small", "resnet20") for rest in SOME_FLOAT}
        | {
            f"paper-resnet18-{rest}-{bits}"
            for rest in ("askew-adam", "askew-latent")
            for bits in ("w4a4", "w2a4")
        }
        | {"paper-resnet18-luq-w4a4", "paper-resnet18-sgd"}
        | set(optimizers.OPTIMIZERS)
    )


def test_recipes_have_the_values_of_0_1_0():
    """tests/data/recipes.json has a digest of the settings of each; a recipe that is meant to change gets a new one."""
    digests = json.loads((Path(__file__).parent / "data" / "recipes.json").read_text())
    assert digests == {
        name: hashlib.sha256(json.dumps(recipes.load(name), sort_keys=True).encode()).hexdigest()[:16]
        for name in recipes.names()
    }


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_builds(name, networks):
    settings = recipes.load(name)
    assert set(HYPERPARAMETERS) <= set(settings)
    config = recipes.complete(Config(**settings, init="runs" if "warm_start" in settings else None))
    assert all(getattr(config, key) == value for key, value in settings.items())
    if name in optimizers.OPTIMIZERS:
        assert config.optimizer == name
        return
    assert name.removeprefix("paper-").startswith(f"{config.model}-{config.optimizer.removesuffix('-adam')}")
    assert config.epochs >= {"cnn": 12, "convnet-small": 20}.get(config.model, 60)
    assert config.warm_start is None or recipes.load(config.warm_start)["model"] == config.model
    with torch.device("meta"):  # what the recipe makes of the network, without its memory
        model = models.build(config.model, (3, 32, 32), 10)
    model = model.to_empty(device="cpu")
    built = optimizers.build(config.optimizer, model, 10, settings)
    if config.optimizer == "luq":
        layers = [m for m in model.modules() if isinstance(m, quantopt.nn.LUQConv2d | quantopt.nn.LUQLinear)]
    elif config.activations:
        layers = [m for m in model.modules() if isinstance(m, quantopt.nn.SAWB)]
    elif config.optimizer == "sgd":
        return
    else:
        assert built.optimizer.param_groups[0]["bits"] == config.bits
        layers = built.optimizer.param_groups[0]["params"]
    kinds = torch.nn.Conv2d | torch.nn.Linear
    inner = sum(1 for m in networks[config.model].modules() if isinstance(m, kinds)) - len(config.skip)
    assert len(layers) == inner
    if config.optimizer not in optimizers.FLOAT and config.skip == []:
        assert len(built.optimizer.param_groups) == 1  # nothing is left in full precision


@pytest.mark.parametrize("name", [name for name, (_, key) in optimizers.OPTIMIZERS.items() if key])
def test_recipes_of_the_optimizers_state_the_schedule_of_the_class(name):
    settings = recipes.load(name)
    built = optimizers.build(name, models.build("mlp", (1, 8, 8), 4), 100, settings)
    group = built.optimizer.param_groups[0]
    assert settings["anneal"]
    for step in range(101):
        assert built.anneal.schedule(group, step, 100) == built.optimizer.annealed(group, step, 100)


@pytest.mark.parametrize("network", ["convnet-small", "paper-convnet"])
def test_the_printed_forms_are_those_of_the_paper(network):
    for name in PRINTED:
        settings = recipes.load(f"{network}-{name}")
        model = models.build(settings["model"], (3, 32, 32), 10)
        drawn = [p.detach().clone() for p in model.parameters()]
        built = optimizers.build(settings["optimizer"], model, 1000, settings)
        assert all(map(torch.equal, model.parameters(), drawn))  # not rescaled
        (group,) = built.optimizer.param_groups
        assert (group["scale"], group["memory"], group["lr"]) == ("none", False, settings["lr"])
        assert group.get("clamp", True) == name.endswith("-clamp")
        assert group["constrain"] == ("gradient" if "gradient" in name else "velocity")
        assert built.optimizer._base == ("adam" if "adam" in name else "sgd") and not group.get("momentum")
        assert group["weight_decay"] == 0
        expected = {
            0: (1, 1),
            199: (1, 1),
            200: (1, 0.5),
            400: (1, 0.25),
            500: (1, 0.25),
            650: (0.88**15, 0.25),
        }
        for step, (epsilon, factor) in expected.items():
            built.seek(step)
            assert group["epsilon"] == pytest.approx(epsilon)
            assert group["lr"] == pytest.approx(factor * settings["lr"])


def test_the_script_for_a_gpu_names_recipes_that_exist():
    text = (Path(__file__).parent.parent / "bench" / "accuracy_gpu.sh").read_text()
    listing = text[text.index("networks=(") : text.index("# shellcheck")] + '\necho "${recipes[@]}"'
    named = subprocess.run(["bash", "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(named)) == len(named) > 30 and set(named) <= set(recipes.names())
    assert {name for name in recipes.names() if name.startswith("paper-")} <= set(named)


def test_milestones_and_warm_up():
    factors = [optimizers.schedule(step, 100, 0.03, [0.2, 0.4]) for step in range(101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1] and set(factors[3:20]) == {1}
    assert set(factors[20:40]) == {0.5} and set(factors[40:]) == {0.25}
    assert optimizers.schedule(7, 10, 0.0, [0.65]) == 0.5 and optimizers.schedule(5, 10, 0.0, [0.65]) == 1
    assert optimizers.schedule(50, 100, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("optimizer", ["askew", "askew-adam"])
def test_weights_in_units_of_their_deviation_take_the_same_course(optimizer):
    """With the rates that belong to them; Adam's directions do not grow with the gradient."""
    settings = {**recipes.load(optimizer), "skip": [], "scale": "none", "weight_decay": 0.01, "lr": 0.002}
    settings |= {"options": {"memory": False, "clamp": False}}  # and epsilon is 1: the base step alone
    courses = []
    for rescale in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 1, bias=False))
        deviation = float(model[0].weight.detach().std())
        built = optimizers.build(optimizer, model, 100, {**settings, "rescale": rescale})
        unit = deviation if rescale else 1.0
        course = []
        for step in range(6):
            gradient = torch.randn(1, 12, generator=torch.Generator().manual_seed(step))
            # That of a function of the weights in front of a batch norm.
            model[0].weight.grad = unit * gradient
            built.update()
            course.append(unit * model[0].weight.detach())
        courses.append(torch.stack(course))
    assert torch.allclose(*courses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_rates_in_tensors_take_the_same_course(name):
    ends = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = models.build("mlp", (1, 8, 8), 4)
        built = optimizers.build(name, model, 6, recipes.load(name), capturable=capturable)
        rate = built.optimizer.param_groups[0]["lr"]
        assert isinstance(rate, torch.Tensor) == capturable
        for step in range(6):
            if step == 3:
                built.load_state_dict(copy.deepcopy(built.state_dict()), step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            built.update()
            built.advance()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [2, "17-level"])
def test_a_recipe_of_the_grids_of_askewsgd_s_paper(tmp_path, bits):
    file = tmp_path / "mine.toml"
    file.write_text(f'base = "askew"\nbits = {json.dumps(bits)}\nscale = "sawb"\nactivations = 4')
    config = recipes.complete(Config(**recipes.load(str(file))))
    model = models.build("mlp", (1, 8, 8), 4)
    built = optimizers.build("askew", model, 6, dataclasses.asdict(config))
    group = built.optimizer.param_groups[0]
    assert (group["bits"], group["scale"]) == (bits, "sawb")
    assert any(isinstance(module, quantopt.nn.SAWB) for module in model.modules())
    with pytest.raises(InputError, match="--scale: scale='sawb'"):
        recipes.complete(Config(**{**recipes.load(str(file)), "bits": 1}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer = ", "is not TOML"),
        ("lr = 1.0", "optimizer must be one of"),
        ('base = "nothing"', "must be a recipe of the package without a base"),
        ('base = "vgg11-askew-1bit"', "must be a recipe of the package without a base"),
        ('base = "askew"\nspeed = 3', "unknown key 'speed'; known: bits"),
        ('base = "askew"\nlr = "fast"', "lr = 'fast' must be of type float"),
        ('base = "askew"\nepochs = true', "epochs = True must be of type int"),
        ('base = "askew"\nepochs = 0', "epochs = 0 must be at least 1"),
        ('base = "askew"\nepochs = ' + "9" * 400, "epochs = a number of 1329 bits must be below 2\\^63"),
        ('base = "askew"\nepochs = ' + "9" * 5000, "is not TOML: Exceeds the limit"),
        ('base = "askew"\nmilestones = 0.5', "milestones = 0.5 must be of type list"),
        ('base = "askew"\nwarm_start = 3', "warm_start = 3 must be of type str"),
        ('base = "askew"\nlr = nan', "lr = nan must be a positive finite number"),
        ('base = "askew"\nwarmup = -1.0', "warmup = -1.0 must be a finite number of at least 0, at most 1"),
        ('base = "askew"\nmodel = "alexnet"', "model = 'alexnet' must be one of mlp, "),
        ('base = "askew"\nskip = [1]', "skip = \\[1\\] must be a list of values of type str"),
        (
            'base = "askew"\nanneal = { end = ["late"] }',
            "anneal = a dict must be a dict of values of type float or str",
        ),
        ("a = " + 10_000 * "[", "is nested too deeply"),
        ("a = " + 3_000 * "{a = ", "is nested too deeply"),
        (
            'base = "askew"\noptions' + 7_000 * ".a" + " = 1",
            "options = a dict must be a dict of values of type",
        ),
        ("a" + 100_000 * ".a" + " = 1", "mine.toml is not a recipe: it is longer than 16,384 bytes"),
        ("[a" + 100_000 * ".a" + "]", "mine.toml is not a recipe: it is longer than 16,384 bytes"),
        ("base = " + 50 * "[" + 50 * "]", "base = a list must be a recipe of the package"),
    ],
    ids=lambda text: text[:30],
)
def test_bad_recipes(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"--recipe: .*{message}"):
        recipes.load(str(file))
    with pytest.raises(InputError, match="neither a recipe of the package nor a readable file"):
        recipes.load(str(tmp_path / "none.toml"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 7", "--optimizer: bits=7"),
        ('bits = "many"', "--optimizer: bits='many'"),
        ('scale = "wide"', "--optimizer: scale='wide'"),
        ("momentum = 1", "--optimizer: momentum=1"),
        ("options = { speed = 1 }", "--optimizer: options=['speed']"),
        ("options = { memory = 2 }", "--optimizer: memory=2"),
        ("options = { lr = 2 }", "--optimizer: options=['lr']: unknown to askew"),
        ("anneal = { speed = 1.0 }", "--optimizer: speed=1.0"),
        ('anneal = { schedule = "slow" }', "--optimizer: schedule='slow'"),
        (
            "milestones = [0.5, 1.0]",
            "--milestones: [0.5, 1.0] is not accepted: fractions are above 0 and below 1",
        ),
        ("projected_at = [0.0]", "--projected-at: [0.0] is not accepted: fractions are above 0 and below 1"),
        ("anneal = { total_steps = 1e300 }", "--optimizer: anneal=['total_steps']: the training sets that"),
        ("anneal = { optimizer = 1, self = 2 }", "--optimizer: anneal=['optimizer', 'self']: "),
        ("anneal = { last_step = 1 }", "--optimizer: anneal=['last_step']: "),
        ('model = "vgg11"', "--model: vgg11 needs images of at least 32x32"),
        ("cuda_graph = true", "--cuda-graph: True is not accepted: needs --device cuda"),
        (
            'optimizer = "sgd"\noptions = { dampening = "a" }\nanneal = {}\nbits = 0',
            "--optimizer: dampening='a'",
        ),
    ],
)
def test_settings_that_do_not_fit_name_the_recipe(patterns, tmp_path, capsys, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(f'base = "askew"\n{text}\n')
    command = ["train", "--data", str(patterns), "--quiet", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--recipe", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --recipe: {file}: {message}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("cache", "blank_figures")
def test_recipe_on_the_command_line(patterns, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('base = "askew"\nbits = 2\nlr = 0.7\nepochs = 9\nmodel = "mlp"\nprecision = "bfloat16"\n')
    common = ["train", "--data", str(patterns), "--quiet", "--device", "cpu", "--recipe", str(file)]
    run = [*common, "--out", str(tmp_path / "run"), "--epochs", "2", "--bits", "4", "--activations", "4"]
    assert cli.main([*run, "--skip", "none"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    config = report["config"]
    assert (config["lr"], config["model"], config["precision"]) == (0.7, "mlp", "bfloat16")
    assert (config["epochs"], config["bits"], config["activations"], config["skip"]) == (2, 4, 4, [])
    assert config["options"] == {"memory": True, "bound": 2.0} and config["batch_size"] == 64
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"accuracy {report['accuracy_packed']:.2f} %")
    assert (
        cli.main(["pack", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "again.safetensors")]) == 0
    )
    assert cli.main([*common, "--optimizer", "stam"]) == 2
    assert "--optimizer: is part of the recipe" in capsys.readouterr().err


@pytest.mark.usefixtures("cache", "blank_figures")
def test_luq_has_no_packed_network(patterns, tmp_path, capsys):
    out = str(tmp_path / "luq")
    assert (
        cli.main(
            ["train", "--data", str(patterns), "--quiet", "--epochs", "1", "--optimizer", "luq", "--out", out]
        )
        == 0
    )
    for command in (["pack", "--run", out], ["eval", "--model", out]):
        assert cli.main(command) == 2
        assert "whose weights lie on the grid -8..7" in capsys.readouterr().err
