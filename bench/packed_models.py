"""Whole packed networks against the same networks in torch's bf16.

    python bench/packed_models.py [--json FILE] [--threads N] [--min-time SECONDS] [--profile]
    python bench/packed_models.py --device cuda [--json FILE] [--min-time SECONDS] [--only NAME]

On the CPU: VGG-16 and ResNet-18 of the command line on images of 32x32, ResNet-50 and ViT-S on images of 224x224,
random weights, all layers but the first and the last at one bit, packed with int8 activations and batch norms folded.
The peer is the network with the same levels in bfloat16, channels last. Both are checked against fp32, the packed
network in exact mode too, before they are timed.

On a GPU both are compiled by torch.compile and replayed from CUDA graphs, x is bfloat16, and there are images of
224x224 and decoder blocks of Llama's shape too. A network whose outputs are wrong or that does not run is no row: it
is printed, and the exit status is 1.
"""

import argparse
import copy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import common
import gemm_cuda
import llama
import networks as large
import targets
import torch
from torch import Tensor, nn

import quantopt
from quantopt.train import models

DEVICE = "cuda"  # of the part for GPUs
NETWORKS = ("vgg16", "resnet18")
# On the CPU: networks with the size of their images.
CPU_NETWORKS = {**dict.fromkeys(NETWORKS, 32), **dict.fromkeys(large.NETWORKS, large.SIZE)}
BATCHES = (1, 64)
# On a GPU: sizes of images, and batch -> times faster than bf16.
IMAGE_SIZES = (32, 224)
CUDA_TARGETS = {1: 2.0, 256: 1.3}
# (batch, tokens) of the decoder blocks; one token attends to itself alone, as without a cache.
LLAMA_INPUTS = ((1, 1), (16, 1), (1, 2048))

Pair = tuple[nn.Module, nn.Module]  # packed with int8 activations, its peer in bfloat16


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (batch, 3, size, size)).float().to(memory_format=torch.channels_last)


def network(name: str, size: int) -> nn.Module:
    """With random weights; ResNet-18 begins on large images as in He et al. (2016)."""
    if name in large.NETWORKS:
        return large.NETWORKS[name]()
    layers = models.build(name, (3, size, size), 10, [120.0] * 3, [60.0] * 3)
    if name != "resnet18" or size < 100:
        return layers
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(layers[0], *stem, *layers[4:])


def packed_pair(
    name: str, model: nn.Module, opt: Any, expected: Tensor, x: Tensor, half: nn.Module, **options: bool
) -> Pair:
    """(packed, half): both, and the packed network in exact mode, checked against the projected network."""
    exact, ours = (quantopt.pack(model, opt, compute=c, **options) for c in ("exact", "int8"))
    for what, y, tolerance in (
        ("exact", exact(x), 1e-4),
        ("int8", ours(x), 0.2),
        ("bf16", half(x.bfloat16()), 0.2),
    ):
        check(f"{name}, {what}", y, expected, tolerance)
    return ours, half


def check(what: str, y: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((y - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise SystemExit(f"{what}: relative error {error}")


@torch.inference_mode(False)
@torch.no_grad()
def networks(name: str, size: int = 32) -> tuple[nn.Module, nn.Module]:
    """(packed, its peer), both checked against the projected network."""
    torch.manual_seed(0)
    model = network(name, size)
    opt = quantopt.BinaryConnect(quantopt.param_groups(model, bits=1), lr=0.1)
    x = images(4, size)
    with opt.quantized():
        calibration = images(64 if size < 100 else 8, size)
        torch.optim.swa_utils.update_bn([calibration], model)  # as after training
        expected = model.eval()(x)
        half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, half = packed_pair(name, model, opt, expected, x, half, fold_batchnorm=True)
    return ours.to(memory_format=torch.channels_last), half


@torch.inference_mode(False)
@torch.no_grad()
def decoder_block(sizes: llama.Sizes, tokens: int) -> Pair:
    """The same for a block of all linear layers at one bit, one scale for each output."""
    torch.manual_seed(0)
    model = llama.Block(sizes, tokens).eval()
    opt = quantopt.BinaryConnect(quantopt.param_groups(model, bits=1, scale="channel", skip=()), lr=0.1)
    x = torch.randn(1, min(tokens, 16), sizes.width)
    with opt.quantized():
        expected = model(x)
        half = copy.deepcopy(model).bfloat16()
    return packed_pair("Llama block", model, opt, expected, x, half, fold_batchnorm=True)


@torch.inference_mode()
def rows_of(
    name: str, size: int, batch: int, ours: nn.Module, half: nn.Module, min_time: float
) -> list[dict[str, object]]:
    """The packed network as it is, and with its other layers and images in bfloat16, as its peer has them."""
    x = images(batch, size)
    short = x.bfloat16()
    ours_short = copy.deepcopy(ours).bfloat16()
    check(f"{name}, int8, in bf16", ours_short(short[:4]).float(), half(short[:4]).float(), 0.3)
    functions = {
        "packed int8": lambda: ours(x),
        "packed int8, in bf16": lambda: ours_short(short),
        "bf16": lambda: half(short),
    }
    long = size * batch > 10_000  # seconds for each call
    options = dict(repeat=3, warmup=0) if long else {}
    seconds = common.compare_products(functions, min_time=min_time, **options)
    case, peer = f"{name} {size}x{size}, batch {batch}", "torch bf16 channels_last"
    targets_of = {"packed int8": targets.of(case, peer), "packed int8, in bf16": None}
    return [common.row(f"{case}, {k}", peer, seconds[k], seconds["bf16"], t) for k, t in targets_of.items()]


def rows(min_time: float) -> list[dict[str, object]]:
    """All networks at every batch size."""
    found = []
    for name, size in CPU_NETWORKS.items():
        pair = networks(name, size)
        for batch in BATCHES:
            found += rows_of(name, size, batch, *pair, min_time)
    return found


# ---- on a GPU ----


def compiled_row(
    case: str, pair: Pair, x: Tensor, target: float | None, min_time: float
) -> dict[str, object]:
    """Both compiled, with graphs of calls in a row; the packed network is checked once more, against its peer."""
    torch.compiler.reset()
    on_device = [m.to(device=DEVICE, dtype=torch.bfloat16) for m in pair]
    x = x.to(DEVICE, torch.bfloat16)
    ours, half = (torch.compile(m, fullgraph=True, dynamic=False) for m in on_device)
    check(case, ours(x).float(), half(x).float(), 0.3)
    contenders: dict[str, tuple[int, Callable[[int], Tensor]]] = {
        "ours": (1, lambda _: ours(x)),
        "bf16": (1, lambda _: half(x)),
    }
    seconds = gemm_cuda.compare(contenders, min_time)
    return common.row(case, "torch.compile bf16", seconds["ours"], seconds["bf16"], target)


def image_rows(name: str, size: int, min_time: float) -> Iterator[dict[str, object]]:
    pair = networks(name, size)
    for batch, target in CUDA_TARGETS.items():
        case = f"{name} {size}x{size}, batch {batch}, packed int8"
        yield compiled_row(case, pair, images(batch, size), target, min_time)


def llama_rows(sizes: llama.Sizes, min_time: float) -> Iterator[dict[str, object]]:
    pair = decoder_block(sizes, max(tokens for _, tokens in LLAMA_INPUTS))
    for batch, tokens in LLAMA_INPUTS:
        case = f"Llama block {sizes.width}/{sizes.hidden}, batch {batch}, {tokens} tokens, packed int8"
        yield compiled_row(case, pair, torch.randn(batch, tokens, sizes.width), None, min_time)


def cuda_parts() -> dict[str, Callable[[float], Iterator[dict[str, object]]]]:
    """By the names that --only takes."""
    parts: dict[str, Callable[[float], Iterator[dict[str, object]]]] = {
        f"{name}-{size}": lambda t, name=name, size=size: image_rows(name, size, t)  # type: ignore[misc]
        for size in IMAGE_SIZES
        for name in NETWORKS
    }
    return {**parts, "llama": lambda t: llama_rows(llama.LLAMA_3_8B, t)}


def cuda_rows(min_time: float, only: str | None, write: Callable[[list[dict[str, object]]], object]) -> int:
    """Calls ``write`` with all rows so far after each; returns how many parts did not run to their end."""
    done: list[dict[str, object]] = []
    failed = 0
    for name, part in cuda_parts().items():
        if only not in (None, name):
            continue
        try:
            with torch.no_grad():
                for each in part(min_time):
                    done.append(each)
                    write(done)
        except (Exception, SystemExit):
            traceback.print_exc()
            failed += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def cuda_main(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device")
    torch.backends.cudnn.benchmark = True
    path = arguments.json or common.results_path("models")

    def write(done: list[dict[str, object]]) -> None:
        common.write_json(done, path, arguments.threads, device=DEVICE)
        print(common.table(done[-1:]).splitlines()[-1], flush=True)

    if cuda_rows(arguments.min_time, arguments.only, write):
        raise SystemExit(1)


def profile() -> None:
    """Where the time of the packed networks goes, for each batch."""
    for name, size in CPU_NETWORKS.items():
        ours, _ = networks(name, size)
        for batch in BATCHES:
            x = images(batch, size)
            with torch.inference_mode():
                ours(x)
                with torch.profiler.profile() as record:
                    ours(x)
            print(f"{name}, batch {batch}")
            table = record.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40
            )
            print("\n".join(line[:110] for line in table.splitlines()))


def main() -> None:
    parser = common.parser("Whole packed networks against torch's bf16.")
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--only", choices=list(cuda_parts()), help="one part, with --device cuda")
    arguments = parser.parse_args()
    if arguments.only and arguments.device == "cpu":
        parser.error("--only: with --device cuda")
    if arguments.device == "cuda":
        cuda_main(arguments)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        profile()
    else:
        common.report(rows(arguments.min_time), arguments.json, arguments.threads)


if __name__ == "__main__":
    main()
