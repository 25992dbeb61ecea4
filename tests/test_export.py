"""Packed models out of Python modules: torch.export with its layout, AOTInductor, torch.fx, ONNX."""

import copy
import io
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import quantopt
from conftest import force_isa, supported_isas
from quantopt import _extension
from quantopt.nn import BinaryConv1d, BinaryConv2d, BinaryLinear, SignActivation
from quantopt.nn.joined import join
from quantopt.nn.linear import BinaryModule, BinaryOutProjection
from quantopt.ops.inputs import COMPUTE
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def filled(layer: BinaryModule) -> BinaryModule:
    layer.bits.random_(0, 256)
    layer.scale.uniform_(0.05, 0.1)
    if layer.bias is not None:
        layer.bias.uniform_(-1, 1)
    return layer.prepare()


# ---- torch.export with the layout

LAYERS: dict[str, tuple[Callable[[], BinaryModule], tuple[int, ...]]] = {
    "linear": (lambda: BinaryLinear(128, 64), (1, 128)),
    "group": (lambda: BinaryLinear(128, 64, scale="group", group_size=32), (1, 128)),
    "conv": (lambda: BinaryConv2d(32, 32, 3), (1, 32, 5, 5)),
}


def saved(layer: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, (x,)), file)
    return file.getvalue()


def loaded(program: bytes) -> Any:
    return torch.export.load(io.BytesIO(program)).module()


def is_read(module: Any, x: Tensor) -> bool:
    """Whether a call reads the module's layout: a write that torch does not count shows in the result."""
    before = module(x)
    module.tiles.data.bitwise_not_()
    after = module(x)
    module.tiles.data.bitwise_not_()
    assert torch.equal(module(x), before)
    return not torch.equal(after, before)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_program_uses_its_layout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each instruction set, whichever it was saved on, until its bits change."""
    make, shape = LAYERS[kind]
    layer, x = filled(make()), torch.randn(shape)
    used = []
    for isa in supported_isas():
        force_isa(monkeypatch, isa)
        program = saved(layer, x)
        for other in (isa, "portable"):
            force_isa(monkeypatch, other)
            module = loaded(program)
            with torch.inference_mode():
                assert torch.equal(module(x), layer(x))
                used.append(is_read(module, x))
                assert used[-1] == is_read(layer, x)
                assert torch.equal(module(x), layer(x))
    assert any(used) or supported_isas() == ["portable"]
    module.bits.bitwise_not_()
    module.scale.mul_(2)
    changed = copy.deepcopy(layer)
    changed.set_weights(~layer.bits, 2 * layer.scale, layer.bias)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(module(x), changed(x)) and not is_read(module, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_wrong_layout_in_a_file_is_not_used(kind: str) -> None:
    """Of other bits, or of a GPU."""
    make, shape = LAYERS[kind]
    layer, x = filled(make()), torch.randn(shape)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        for wrong in (~layer.tiles, torch.zeros_like(layer.tiles, dtype=torch.int32)):  # type: ignore[operator]
            program.constants["tiles"] = wrong
            file = io.BytesIO()
            torch.export.save(program, file)
            module = loaded(file.getvalue())
            for _ in range(2):
                assert torch.equal(module(x), layer(x))


def test_layouts_in_memory_that_is_used_again() -> None:
    x, scale = torch.randn(1, 64), torch.ones(1)
    for _ in range(50):
        bits = pack_signs(torch.randn(32, 64))
        tiles = torch.ops.quantopt.binary_tiles(bits, 64).clone()
        want = binary_linear(x, bits, scale, in_features=64)
        for _ in range(2):
            assert torch.equal(binary_linear(x, bits, scale, in_features=64, tiles=tiles), want)
        other = ~bits
        assert torch.equal(binary_linear(x, other, scale, in_features=64, tiles=tiles), -want)


def test_a_loaded_program_in_threads() -> None:
    layer = filled(BinaryLinear(256, 128, scale="group", group_size=32, compute="int8"))
    x = torch.randn(1, 256)
    want, program = layer(x), saved(layer, x)
    right: list[bool] = []

    def work(module: Any, start: threading.Barrier) -> None:
        start.wait()
        for _ in range(20):
            right.append(torch.equal(module(x), want))

    for _ in range(3):
        module, start = loaded(program), threading.Barrier(4)
        threads = [threading.Thread(target=work, args=(module, start)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * (3 * 4 * 20)


def test_layouts_in_one_storage() -> None:
    x, scale = torch.randn(1, 64), torch.ones(1)
    first, second = (quantopt.pack_signs(torch.randn(32, 64)) for _ in range(2))
    both = torch.stack([torch.ops.quantopt.binary_tiles(bits, 64) for bits in (first, second)])
    want = quantopt.binary_linear(x, first, scale, in_features=64)
    for tiles in (both[0], both[1], both[0]):
        assert torch.equal(quantopt.binary_linear(x, first, scale, in_features=64, tiles=tiles), want)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    """Activations are in the layers, so that nothing but calls of their operator is compiled, without the checks of
    what the compiler can do."""
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    model = nn.Sequential(
        filled(BinaryLinear(64, 48, activation="relu")),
        filled(BinaryLinear(48, 10, scale="group", group_size=16, compute="int8")),
    ).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)),
            package_path=str(tmp_path / "mlp.pt2"),
            inductor_configs={"cpp.vec_isa_ok": False, "aot_inductor.precompile_headers": False},
        )
        valid_vec_isa_list.cache_clear()
        run = torch._inductor.aoti_load_package(package)
        for _ in range(2):
            assert torch.equal(run(x), model(x))


# ---- torch.fx


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = filled(BinaryConv2d(3, 8, 3))
        self.along = filled(BinaryConv1d(8, 8, 3, compute="int8"))
        self.linear = filled(BinaryLinear(7, 6))
        self.sign = SignActivation()
        self.q, self.k = join([BinaryLinear.from_linear(nn.Linear(6, n)) for n in (4, 5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.sign(self.linear(x=self.along(self.conv(x).mean(2))))
        return torch.cat([self.q(x), self.k(x)], -1)


def test_packed_layers_are_leaves_of_torch_fx() -> None:
    model, x = Mixed().eval(), torch.randn(2, 3, 5, 11)
    traced = fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["conv", "along", "linear", "q", "k"]
    assert traced.linear is model.linear
    for module in (traced, copy.deepcopy(traced), fx.Transformer(traced).transform()):
        assert torch.equal(module(x), model(x))


def test_what_torch_fx_cannot_trace() -> None:
    model = Mixed()
    with pytest.raises(TypeError, match="nothing to trace in a BinaryConv2d alone"):
        fx.symbolic_trace(model.conv)
    model.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="a BinaryLinear with hooks cannot be traced"):
        fx.symbolic_trace(model)


# ---- ONNX


def in_onnxruntime(
    model: nn.Module, x: Tensor, path: Path, **options: Any
) -> tuple[Any, Callable[[Tensor], list[Tensor]]]:
    """The exported program, and its file in onnxruntime."""
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    runtime = pytest.importorskip("onnxruntime")
    from quantopt.integrations.onnx import translation_table

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        program = torch.onnx.export(
            model, (x,), dynamo=True, custom_translation_table=translation_table(), verbose=False, **options
        )
    assert program is not None
    program.save(str(path / "model.onnx"))
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = runtime.InferenceSession(path / "model.onnx", settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return program, lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


class Beside(nn.Module):
    """Layers beside each other, so that what one rounds does not depend on another. x: [B, 16, 5, 6]."""

    def __init__(self, compute: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"compute": compute}
        grouped = {"scale": "group", "group_size": 16, **options}
        self.linear = nn.ModuleList(
            map(
                filled,
                [  # rows that fill no byte, no group, less than one
                    BinaryLinear(6, 64, activation="gelu", **options),
                    BinaryLinear(6, 33, levels=17, scale="tensor", bias=False, **options),
                    BinaryLinear(6, 32, levels=3, scale="group", group_size=4, activation="silu", **options),
                    BinaryLinear(6, 20, levels=4, scale="group", group_size=3, **options),
                    BinaryLinear(6, 20, **grouped),
                ],
            )
        )
        self.conv = nn.ModuleList(
            map(
                filled,
                [
                    BinaryConv2d(16, 32, 3, stride=(2, 1), padding=(1, 2), activation="relu", **options),
                    BinaryConv2d(16, 64, (3, 2), padding="same", padding_mode="reflect", levels=3, **grouped),
                    BinaryConv2d(16, 32, 3, dilation=2, groups=2, bias=False, **options),
                    BinaryConv2d(16, 64, 1, levels=4, **grouped),
                ],
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.linear] + [layer(x) for layer in self.conv]


def test_onnx(tmp_path: Path) -> None:
    """Every mode, any batch."""
    model = nn.ModuleList(map(Beside, COMPUTE))
    model.forward = lambda x: [layer(x) for layer in model]  # type: ignore[method-assign]
    batch = torch.export.Dim("batch", min=1, max=64)
    _, run = in_onnxruntime(model.eval(), torch.randn(2, 16, 5, 6), tmp_path, dynamic_shapes=({0: batch},))
    x = torch.randn(5, 16, 5, 6)
    x[1] = 0
    x[2, 3, 1, 2] = torch.nan
    x[4, 5, 0, 1] = torch.inf
    with torch.inference_mode():
        want = [y for outputs in model(x) for y in outputs]
    modes = [compute for compute in COMPUTE for _ in range(len(want) // len(COMPUTE))]
    for y, expected, compute in zip(run(x), want, modes, strict=True):
        finite = slice(None) if compute == "int8" else slice(0, 2)  # int8: NaN for what is not finite
        torch.testing.assert_close(y[finite], expected[finite], equal_nan=True, rtol=2e-6, atol=2e-6)


def test_onnx_files_hold_bits(tmp_path: Path) -> None:
    """As they are without the exporter's optimizer; without the layout."""
    model = nn.Sequential(
        filled(BinaryLinear(512, 256)), filled(BinaryLinear(256, 64, scale="group", group_size=64))
    )
    half, x = model.eval().to(torch.float16), torch.randn(3, 512, dtype=torch.float16)
    program, run = in_onnxruntime(half, x, tmp_path, optimize=False)
    tensors = {name: list(value.shape) for name, value in program.model.graph.initializers.items()}
    assert tensors == {name: list(value.shape) for name, value in model.state_dict().items()}
    with torch.inference_mode():
        torch.testing.assert_close(run(x)[0], half(x))
    sizes = [tensor.numel() * tensor.itemsize for tensor in model.state_dict().values()]
    assert (tmp_path / "model.onnx").stat().st_size < sum(sizes) + 2**16


def test_onnx_attention(tmp_path: Path) -> None:
    """torch reads the weight of the output projection, which is unpacked outside of quantopt's operators."""
    model = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).eval()
    model.self_attn.out_proj = filled(BinaryOutProjection(32, 32, levels=3))  # type: ignore[assignment]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = model(x)
    _, run = in_onnxruntime(model, x, tmp_path)
    torch.testing.assert_close(run(x)[0], want, rtol=1e-5, atol=1e-5)


def test_onnx_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, BinaryLinear.from_linear(linear))
    tokens = torch.randint(0, 64, (2, 9))
    length = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    _, run = in_onnxruntime(
        model, tokens, tmp_path, kwargs={"use_cache": False}, dynamic_shapes={"input_ids": length, "use_cache": None}
    )  # fmt: skip
    tokens = torch.randint(0, 64, (3, 12))
    with torch.inference_mode():
        torch.testing.assert_close(run(tokens)[0], model(tokens).logits, rtol=1e-4, atol=1e-5)
