"""Whole packed networks against the same networks in torch's bf16.

    python bench/packed_models.py [--json FILE] [--threads N] [--min-time SECONDS] [--profile]

VGG-16 and ResNet-18 of the command line on images of 32x32, random weights, all layers but the first and the last at
one bit, packed with int8 activations and batch norms folded. The peer is the network with the same levels in bfloat16,
channels last. Both are checked against fp32, the packed network in exact mode too, before they are timed.
"""

import copy

import common
import torch
from torch import Tensor, nn

import quantopt
from quantopt.train import models

NETWORKS = ("vgg16", "resnet18")
BATCHES = (1, 64)
TARGET = 2.0


def images(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32)).float().to(memory_format=torch.channels_last)


@torch.inference_mode(False)
@torch.no_grad()
def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """(packed, its peer), both checked against the projected network."""
    torch.manual_seed(0)
    model = models.build(name, (3, 32, 32), 10, [120.0] * 3, [60.0] * 3)
    opt = quantopt.BinaryConnect(quantopt.param_groups(model, bits=1), lr=0.1)
    x = images(4)
    with opt.quantized():
        torch.optim.swa_utils.update_bn([images(64)], model)  # as after training
        expected = model.eval()(x)
        half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact, ours = (quantopt.pack(model, opt, compute=c, fold_batchnorm=True) for c in ("exact", "int8"))
    for what, y, tolerance in (
        ("exact", exact(x), 1e-4),
        ("int8", ours(x), 0.2),
        ("bf16", half(x.bfloat16()), 0.2),
    ):
        error = float((y - expected).norm() / expected.norm())
        if error > tolerance:
            raise SystemExit(f"{name}, {what}: relative error {error}")
    return ours.to(memory_format=torch.channels_last), half


@torch.inference_mode()
def row(name: str, batch: int, ours: nn.Module, half: nn.Module, min_time: float) -> dict[str, object]:
    x = images(batch)
    short = x.bfloat16()
    seconds = common.compare({"ours": lambda: ours(x), "bf16": lambda: half(short)}, min_time=min_time)
    case = f"{name} 32x32, batch {batch}, packed int8"
    return common.row(case, "torch bf16 channels_last", seconds["ours"], seconds["bf16"], TARGET)


def rows(min_time: float) -> list[dict[str, object]]:
    """Both networks at every batch size."""
    built = {name: networks(name) for name in NETWORKS}
    return [row(name, batch, *pair, min_time) for name, pair in built.items() for batch in BATCHES]


def profile() -> None:
    """Where the time of the packed networks goes, for each batch."""
    for name in NETWORKS:
        ours, _ = networks(name)
        for batch in BATCHES:
            x = images(batch)
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        profile()
    else:
        common.report(rows(arguments.min_time), arguments.json, arguments.threads)


if __name__ == "__main__":
    main()
