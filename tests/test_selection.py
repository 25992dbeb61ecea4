"""What of a model is quantised, the table of it, and messages that lead out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import network
from quantopt.selection import choose


class Conv1D(nn.Module):
    """As the layer of that name of the transformers library."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.1 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class LM(nn.Module):
    """The shape of GPT-2: embeddings, layers of one kind, a head."""

    def __init__(self, layer: Any, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 24)
        self.up, self.down = layer(48, 24), layer(24, 48)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 50, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        self.aside = nn.Linear(24, 24)  # defined after the head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, i: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.aside(self.down(self.up(self.wte(i)).relu()))))


def linear(outputs: int, inputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def left_out(groups: Any) -> dict[str, str]:
    return {row.name: row.left_out for row in groups.table}


def quantised(groups: Any) -> list[str]:
    return [name for group in groups if group["bits"] for name in group["param_names"]]


@pytest.mark.parametrize("layer", [linear, Conv1D])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(layer: Any, tied: bool) -> None:
    """The embedding sees the input: no layer is skipped as the first. The head is skipped though it is not the last."""
    groups = quantopt.param_groups(LM(layer, tied))
    assert quantised(groups) == ["up.weight", "down.weight", "aside.weight"]
    out = left_out(groups)
    head = {"wte.weight, lm_head.weight": "tied to an embedding"} if tied else {"lm_head.weight": "last"}
    assert head.items() <= out.items() and out["norm.weight"] == "1-d"
    assert tied or out["wte.weight"] == "embedding"


def test_the_first_layer_is_that_which_sees_the_input() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Embedding(10, 8)
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 2)

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.patch = nn.Linear(4, 4), nn.Sequential(nn.Conv2d(3, 4, 2))
            self.head = nn.Linear(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.patch

    assert quantised(quantopt.param_groups(Conditional())) == ["body.weight"]
    assert quantised(quantopt.param_groups(Patches())) == ["before.weight"]


def test_every_parameter_has_a_row() -> None:
    model = network()
    model.insert(8, nn.Linear(3, 3))
    model.append(nn.Linear(3, 3))
    model[8].requires_grad_(False)
    groups = quantopt.param_groups(model, bits=3, scale="channel", skip=("first", "last", "2.*"))
    assert [(row.name, row.layer, row.shape, row.bits, row.scale, row.left_out) for row in groups.table] == [
        ("0.weight", "Conv2d", (5, 2, 3, 3), 0, "", "first"),
        ("0.bias", "Conv2d", (5,), 0, "", "1-d"),
        ("2.weight", "Conv2d", (7, 5, 3, 3), 0, "", "skip='2.*'"),
        ("5.weight", "Linear", (9, 28), 3, "channel", ""),
        ("5.bias", "Linear", (9,), 0, "", "1-d"),
        ("7.weight", "Linear", (3, 9), 3, "channel", ""),
        ("7.bias", "Linear", (3,), 0, "", "1-d"),
        ("8.weight", "Linear", (3, 3), 0, "", "frozen (requires_grad=False)"),
        ("8.bias", "Linear", (3,), 0, "", "frozen (requires_grad=False)"),
        ("9.weight", "Linear", (3, 3), 0, "", "last"),
        ("9.bias", "Linear", (3,), 0, "", "1-d"),
    ]
    lines = str(groups.table).splitlines()
    assert lines[0].split() == ["name", "layer", "shape", "bits", "scale", "left", "out"]
    assert lines[4].split() == ["5.weight", "Linear", "9x28", "3", "channel"]
    in_groups = [p for group in groups for p in group["params"]]
    assert len(in_groups) == 9 and not any(p is q for p in in_groups for q in model[8].parameters())


def test_frozen_weights_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    model[1].requires_grad_(False)
    frozen = model[1].weight.clone()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    for _ in range(3):
        model(torch.randn(8, 16)).square().mean().backward()
        opt.step()
    packed = quantopt.pack(model, opt)
    assert torch.equal(packed[1].weight, frozen) and isinstance(packed[2], quantopt.nn.BinaryLinear)


def test_adapters_are_not_quantised() -> None:
    class Adapted(nn.Module):
        adapter_layer_names = ("extra",)

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A, self.extra = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}), nn.Linear(2, 8)

    model = nn.Sequential(nn.Linear(8, 8), Adapted(), nn.Linear(8, 8), Adapted())
    groups = quantopt.param_groups(model)
    assert quantised(groups) == ["1.base_layer.weight", "2.weight"]  # the last layer is 3.base_layer
    out = left_out(groups)
    assert out["1.lora_A.default.weight"] == out["1.extra.weight"] == "low-rank adapter"
    assert out["3.base_layer.weight"] == "last"


def test_a_tied_weight_is_found_under_each_of_its_names() -> None:
    for name in ("wte.weight", "lm_head.weight", "lm_*"):
        assert "up.weight" in quantised(quantopt.param_groups(LM(linear), skip=(name,)))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert quantised(quantopt.param_groups(model, skip=("1.weight",))) == ["2.weight"]
    wrapped = torch.compile(model, backend="eager")  # names with _orig_mod
    assert quantised(quantopt.param_groups(wrapped, skip=("2.*",))) == ["_orig_mod.0.weight"]


def test_bits_of_each_layer() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), *(nn.Linear(8, 8) for _ in range(5)))
    model[3].weight = model[2].weight
    asked: dict[str, nn.Module] = {}

    def bits(module: nn.Module, name: str) -> Any:
        asked[name] = module
        return {"1": 4, "2": "ternary", "3": "ternary", "4": 1}.get(name)

    groups = quantopt.param_groups(model, filter_fn=bits, skip=())
    assert [(group["bits"], group["param_names"]) for group in groups[:-1]] == [
        (1, ["4.weight"]), ("ternary", ["2.weight"]), (4, ["1.weight"]),
    ]  # fmt: skip
    assert asked == {str(i): model[i] for i in range(1, 6)}  # no embedding
    assert left_out(groups)["5.weight"] == "filter_fn"
    opt = quantopt.AskewSGD(groups, lr=0.1)
    assert [group["bits"] for group in opt.param_groups] == [1, "ternary", 4, 0]
    for wrong, message in [
        (lambda m, n: 7, "filter_fn for '1': bits=7"),
        (lambda m, n: True, "bits=True"),
        (lambda m, n: int(n), "tied between layers, different bits: {'2': 2, '3': 3}"),
        (lambda m, n: None, r"filter_fn \(filter_fn returns their bits\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantopt.param_groups(model, filter_fn=wrong, skip=())


def test_refusals_lead_out() -> None:
    """What a message advises works."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0\.weight: first \(pass skip=\(\) .*1\.weight: last"):
        quantopt.param_groups(model)
    assert len(quantised(quantopt.param_groups(model, skip=()))) == 2
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen .*requires_grad_\(True\)") as caught:
        quantopt.param_groups(model, skip=())
    assert "skip" not in str(caught.value)
    for empty in (nn.Embedding(4, 4), nn.LayerNorm(4)):
        for skip in ((), ("first", "last")):
            with pytest.raises(ValueError, match=r"no linear or convolution layer.* pass bits=0") as caught:
                quantopt.param_groups(empty, skip=skip)
            assert "skip" not in str(caught.value)
        assert [group["bits"] for group in quantopt.param_groups(empty, bits=0)] == [0]
    with pytest.raises(ValueError, match=r"names of parameters, such as 'up\.\*'"):
        quantopt.param_groups(LM(linear), skip="up")
    with pytest.raises(ValueError, match="skip=3"):
        quantopt.param_groups(LM(linear), skip=(3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every parameter"):
        quantopt.param_groups(model, bits=0)


@pytest.mark.parametrize("scale", ["channel", "group"])
def test_scales_of_a_transposed_weight_are_refused_with_the_way_out(scale: str) -> None:
    model = LM(Conv1D)
    with pytest.raises(ValueError, match=r"up\.weight is the \[in, out\] .*conv1d_to_linear"):
        quantopt.param_groups(model, scale=scale)
    i = torch.arange(50)
    before = model(i)
    assert quantopt.nn.conv1d_to_linear(model) is model
    torch.testing.assert_close(model(i), before)
    assert model.up.weight.shape == (48, 24) and isinstance(model.up, nn.Linear)
    assert quantised(quantopt.param_groups(model, scale=scale)) == [
        "up.weight",
        "down.weight",
        "aside.weight",
    ]
    with pytest.raises(ValueError, match="wrap it"):
        quantopt.nn.conv1d_to_linear(Conv1D(4, 4))


def test_conv1d_to_linear_keeps_sharing() -> None:
    a, b = Conv1D(6, 6), Conv1D(6, 6)
    b.weight = a.weight
    model = quantopt.nn.conv1d_to_linear(nn.ModuleDict({"a": a, "again": a, "b": b}))
    assert model["a"] is model["again"] and model["b"].weight is model["a"].weight
    assert torch.equal(model["a"].weight, a.weight.t()) and model["a"].bias is a.bias


def test_groups_must_say_their_bits() -> None:
    model = network()
    for make in (quantopt.AskewSGD, quantopt.STAM, quantopt.ProxQuant):
        with pytest.raises(ValueError, match=r"bits=None.*quantopt\.param_groups\(model\)"):
            make(model.parameters())
        opt = make(model.parameters(), bits=0)
        with pytest.raises(ValueError, match="bits=None"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], "bits": None})
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})  # as the constructor says
        assert [group["bits"] for group in opt.param_groups] == [0, 0]
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    with pytest.raises(ValueError, match="bits=None"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(opt.param_groups) == 2


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=50, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    names = [name for c in choose(model, 1) if not c.left_out for name in c.names]
    assert [name.removeprefix("transformer.h.0.") for name in names] == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip


class Speech(nn.Module):
    """The shape of Whisper: a stem of convolutions, and the embedding of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.body = nn.Conv1d(3, 8, 3), nn.Linear(8, 8)
        self.embed_tokens, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.proj_out = nn.Linear(8, 9)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


class Columns(nn.Module):
    """A net of tables: categories by embeddings, and numbers as they are."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.emb_a, self.num = nn.Embedding(5, 8), nn.Linear(numbers, 8)
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 2)


class Before(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.emb = nn.Linear(8, 8), nn.EmbeddingBag(5, 8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("model", "first", "names"),
    [
        (Speech(), "conv1", ["body.weight", "decoder.weight"]),
        (Columns(3), "num", ["body.weight"]),
        (Columns(8), "none: an embedding (emb_a)", ["num.weight", "body.weight"]),
        (Before(), "stem", ["body.weight"]),
        (LM(Conv1D), "none: an embedding (wte)", ["up.weight", "down.weight", "aside.weight"]),
    ],
)
def test_an_embedding_takes_the_place_of_the_first_layer_only_where_it_feeds_it(
    model: nn.Module, first: str, names: list[str]
) -> None:
    groups = quantopt.param_groups(model)
    assert quantised(groups) == names
    assert str(groups.table).splitlines()[-1] == f"first: {first}"
    assert "first:" not in str(quantopt.param_groups(model, skip="last").table)


def test_full_precision_has_one_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    groups = quantopt.param_groups(model, bits=0, skip=(), other={"lr": 0.5})
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {"param_names": [name for name, _ in model.named_parameters()], "bits": 0, "lr": 0.5}
    ]
    assert left_out(groups)["0.weight"] == "bits=0" and left_out(groups)["1.weight"] == "1-d"


def test_the_bias_of_a_lazy_layer_is_a_bias() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyConv2d(4, 1))
    assert left_out(quantopt.param_groups(model, skip=()))["0.bias"] == "1-d"


@pytest.mark.parametrize("key", ["params", "param_names", "bits", "scale"])
def test_the_last_group_is_not_quantised(key: str) -> None:
    with pytest.raises(ValueError, match=rf"other\['{key}'\].*filter_fn="):
        quantopt.param_groups(network(), other={key: 1})


def test_arguments_of_another_kind() -> None:
    model: Any = network()
    for arguments, message in [
        (dict(model=[model[0].weight]), "model must be a torch.nn.Module, not list.*'bits': 1"),
        (dict(model=model.parameters()), "not generator"),
        (dict(model=model, skip=None), r"skip=None: .*\(\) for none"),
        (dict(model=model, other=0.1), "other=0.1: must be a dict"),
    ]:
        with pytest.raises(TypeError, match=message):
            quantopt.param_groups(**arguments)


def test_advice_is_not_what_was_done() -> None:
    model = network()
    with pytest.raises(ValueError, match="pass bits=0, without filter_fn"):
        quantopt.param_groups(model, bits=0, skip=(), filter_fn=lambda module, name: None)
    assert len(quantopt.param_groups(model, bits=0, skip=())) == 1
    model.requires_grad_(False)
    for bits in (0, 1):
        with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_\(True\)") as caught:
            quantopt.param_groups(model, bits=bits, skip=())
        assert "bits=0" not in str(caught.value)
    with pytest.raises(ValueError, match="the model has no parameters"):
        quantopt.param_groups(nn.ReLU(), bits=0)
