"""Whole packed networks as bench/ times them: right on the CPU, compiled whole, and the benchmarks' logic."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import quantopt
from quantopt.nn import BinaryConv2d, BinaryLinear

Contenders = dict[str, tuple[int, Callable[[int], Tensor]]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Modules of bench/, on the CPU: with one call of each contender in place of timed graphs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))

    def compare(contenders: Contenders, min_time: float) -> dict[str, float]:
        for count, call in contenders.values():
            assert bool(call(count - 1).isfinite().all())
        return {name: 1.0 + i for i, name in enumerate(contenders)}

    monkeypatch.setattr(importlib.import_module("gemm_cuda"), "compare", compare)
    for name in ("packed_models", "conv_cuda"):
        monkeypatch.setattr(importlib.import_module(name), "DEVICE", "cpu")
    return importlib.import_module


def close(y: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((y - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
def test_llama_block(bench: Callable[[str], ModuleType], scale: str) -> None:
    """All seven products packed; equal to the projected block; one graph."""
    llama = bench("llama")
    torch.manual_seed(0)
    model = llama.Block(llama.Sizes(64, 4, 2, 96), tokens=12).eval()
    groups = quantopt.param_groups(model, bits=1, scale=scale, skip=())
    if scale == "group":
        groups[0]["group_size"] = 32
    opt = quantopt.BinaryConnect(groups, lr=0.1)
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        with opt.quantized():
            expected = model(x)
        exact, rough = (quantopt.pack(model, opt, compute=c, fold_batchnorm=True) for c in ("exact", "int8"))
        assert sum(isinstance(m, BinaryLinear) for m in exact.modules()) == 7
        assert exact.gate.activation == "silu"
        assert close(exact(x), expected, 1e-5) and close(rough(x), expected, 3e-2)
        half = copy.deepcopy(exact).bfloat16()
        assert close(half(x.bfloat16()).float(), expected, 3e-2)
        if scale != "channel":
            return
        for network, values in ((exact, x), (rough, x), (half, x.bfloat16())):
            torch.compiler.reset()
            compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(values), network(values))
            torch.testing.assert_close(network(values[:, :5]), network(values)[:, :5])  # causal


def test_rope_turns_by_the_distance(bench: Callable[[str], ModuleType]) -> None:
    """Products of queries and keys depend on the distance of their tokens alone."""
    llama = bench("llama")
    block = llama.Block(llama.Sizes(32, 2, 1, 32), tokens=20)
    q, k = torch.randn(16).expand(20, 16), torch.randn(16).expand(20, 16)
    scores = llama.rotate(q, block.cos, block.sin) @ llama.rotate(k, block.cos, block.sin).T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert float((scores[0] - scores[0, 0]).abs().max()) > 0.1


def test_resnet18_on_large_images(bench: Callable[[str], ModuleType]) -> None:
    network = bench("packed_models").network("resnet18", 224)
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 20 and convs[0].kernel_size == (7, 7)
    with torch.device("meta"):
        assert bench("packed_models").network("resnet18", 224)(torch.empty(2, 3, 224, 224)).shape == (2, 10)


def test_layers_of_the_networks(bench: Callable[[str], ModuleType]) -> None:
    conv_cuda = bench("conv_cuda")
    found = [str(layer) for layer in conv_cuda.layers("resnet18", 224)]
    assert found[0] == "3x3/1 64->64 on 56x56" and "1x1/2 256->512 on 14x14" in found and len(found) == 10
    assert [str(layer) for layer in conv_cuda.layers("vgg16", 32)][-2:] == [
        "3x3/1 512->512 on 4x4",
        "3x3/1 512->512 on 2x2",
    ]


def test_rows_of_layers(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    conv_cuda = bench("conv_cuda")
    small = [conv_cuda.Layer(8, 16, 3, 2, 7, 5), conv_cuda.Layer(16, 8, 1, 1, 4, 4)]
    monkeypatch.setattr(conv_cuda, "layers", lambda name, size: small)
    lengths: list[int] = []
    assert conv_cuda.run((32,), (1, 3), 0.0, lambda done: lengths.append(len(done))) == 0
    assert lengths == list(range(1, 2 * 2 * 3 + 1))
    *each, mean = conv_cuda.rows("vgg16", 32, 2, 0.0)
    assert [r["ratio"] for r in each] == [2.0, 2.0] and mean["ratio"] == pytest.approx(2.0) and mean["ok"]
    # a wrong layer stops its network, and is counted
    monkeypatch.setattr(BinaryConv2d, "forward", lambda self, x: torch.zeros(2, 1, 1, 1))
    assert conv_cuda.run((32,), (1,), 0.0, lengths.append) == 2


def test_rows_of_networks(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    packed_models, llama = bench("packed_models"), bench("llama")
    monkeypatch.setattr(packed_models, "IMAGE_SIZES", (32,))
    monkeypatch.setattr(packed_models, "CUDA_TARGETS", {2: 2.0})
    monkeypatch.setattr(packed_models, "NETWORKS", ("cnn",))
    monkeypatch.setattr(packed_models, "LLAMA_INPUTS", ((2, 1), (1, 9)))
    monkeypatch.setattr(llama, "LLAMA_3_8B", llama.Sizes(64, 4, 2, 96))
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **form: compile_(m, backend="aot_eager", **form))
    done: list[dict[str, object]] = []
    assert packed_models.cuda_rows(0.0, None, lambda rows: done.append(rows[-1])) == 0
    assert [r["case"] for r in done] == [
        "cnn 32x32, batch 2, packed int8",
        "Llama block 64/96, batch 2, 1 tokens, packed int8",
        "Llama block 64/96, batch 1, 9 tokens, packed int8",
    ]
    assert [r["ratio"] for r in done] == [2.0] * 3
