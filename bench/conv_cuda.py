"""The convolutions of VGG-16 and ResNet-18 with packed weights on a GPU, against cuDNN in bf16, channels last.

    python bench/conv_cuda.py [--json FILE] [--min-time SECONDS] [--size 32|224] [--batch 1|64|256]

Every time is that of a CUDA graph of calls in a row on one set of weights, which for the peer stay in the second-level
cache as far as they fit; the contenders take turns, and medians are compared. x is bfloat16 and channels last. "ours"
is what the package chooses, rounding of x to int8 included; the Triton kernel is timed beside it. Each is checked
against float64 before it is timed. A layer that is wrong or does not run is no row: it is printed, and the exit status
is 1.
"""

import argparse
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import common
import gemm_cuda
import packed_models
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantopt import backends
from quantopt.nn import BinaryConv2d

DEVICE = "cuda"
BATCHES = (1, 64, 256)
TARGET, LEAST = (
    1.3,
    0.95,
)  # targets of a network and batch: the geometric mean over its layers, and the slowest layer


class Layer(NamedTuple):
    """A convolution without bias, and the images it sees."""

    channels: int
    outputs: int
    kernel: int
    stride: int
    height: int
    width: int

    def __str__(self) -> str:
        taps, size = f"{self.kernel}x{self.kernel}/{self.stride}", f"{self.height}x{self.width}"
        return f"{taps} {self.channels}->{self.outputs} on {size}"


def layers(name: str, size: int) -> list[Layer]:
    """The different packed convolutions of a network, in its order: all but the first."""
    found: dict[Layer, None] = {}

    def look(conv: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        shape = inputs[0].shape[2:]
        layer = Layer(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], *shape)
        if conv.in_channels > 3:
            found[layer] = None

    with torch.device("meta"):
        model = packed_models.network(name, size).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(look)
        model(torch.empty(1, 3, size, size))
    return list(found)


def contenders(layer: Layer, batch: int) -> dict[str, tuple[int, Callable[[int], Tensor]]]:
    conv = nn.Conv2d(layer.channels, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2, bias=False)
    packed = BinaryConv2d.from_conv2d(conv, compute="int8").to(DEVICE)
    x = torch.randn(batch, layer.channels, layer.height, layer.width, device=DEVICE)
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    weight = packed.weight.bfloat16().contiguous(memory_format=torch.channels_last)
    result: dict[str, tuple[int, Callable[[int], Tensor]]] = {
        "ours": (1, lambda _: packed(x)),
        "cuDNN bf16": (1, lambda _: F.conv2d(x, weight, None, conv.stride, conv.padding)),
    }
    if backends.choose("binary_conv2d", x.device, x.dtype).name == "cuda":
        head = (x, packed.bits, packed.scale, None, *packed.geometry, packed.plane_weights)
        result["Triton"] = (1, lambda _: torch.ops.quantopt.binary_conv2d_triton(*head, "int8", "none"))
    few = slice(0, 2)
    expected = F.conv2d(
        x[few].double(), packed.weight.double(), None, packed.stride, packed.padding, packed.dilation
    )
    for name, (_, function) in result.items():
        y = function(0)
        packed_models.check(f"{layer}, batch {batch}, {name}", y[few].double(), expected, 3e-2)
    return result


def rows(name: str, size: int, batch: int, min_time: float) -> Iterator[dict[str, Any]]:
    """Each layer, then the mean and the least over them."""
    ratios = {}
    for layer in layers(name, size):
        case = f"{name} {size}x{size}, batch {batch}: {layer}, int8"
        seconds = gemm_cuda.compare(contenders(layer, batch), min_time)
        result = common.row(case, "cuDNN bf16", seconds["ours"], seconds["cuDNN bf16"], LEAST)
        ratios[layer] = result["ratio"]
        yield result
        if "Triton" in seconds:
            yield common.row(f"{case}, Triton", "cuDNN bf16", seconds["Triton"], seconds["cuDNN bf16"])
    mean = float(torch.tensor(list(ratios.values()), dtype=torch.float64).log().mean().exp())
    yield {
        "case": f"{name} {size}x{size}, batch {batch}: geometric mean of the layers, int8",
        "peer": "cuDNN bf16",
        "ratio": mean,
        "target": TARGET,
        "ok": mean >= TARGET,
    }


def run(
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    min_time: float,
    write: Callable[[list[dict[str, Any]]], object],
) -> int:
    """Calls ``write`` with all rows so far after each; returns how many networks did not run to their end."""
    done: list[dict[str, Any]] = []
    failed = 0
    for size, batch, name in (
        (size, batch, name) for size in sizes for batch in batches for name in packed_models.NETWORKS
    ):
        try:
            with torch.no_grad():
                for each in rows(name, size, batch, min_time):
                    done.append(each)
                    write(done)
        except (Exception, SystemExit):
            traceback.print_exc()
            failed += 1
    return failed


def main() -> None:
    parser: argparse.ArgumentParser = common.parser(
        "Convolutions with packed weights against cuDNN in bfloat16."
    )
    parser.add_argument("--size", type=int, choices=packed_models.IMAGE_SIZES, help="of the images")
    parser.add_argument("--batch", type=int, choices=BATCHES)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    path = arguments.json or common.results_path("conv")

    def write(done: list[dict[str, Any]]) -> None:
        common.write_json(done, path, arguments.threads, device=DEVICE)
        print(common.table(done[-1:]).splitlines()[-1], flush=True)

    sizes = (arguments.size,) if arguments.size else packed_models.IMAGE_SIZES
    batches = (arguments.batch,) if arguments.batch else BATCHES
    if run(sizes, batches, arguments.min_time, write):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
