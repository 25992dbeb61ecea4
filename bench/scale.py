"""What a training step of 7B and 70B parameters moves on 8 to 1,024 GPUs: the tables of docs/scale.md.

    python bench/scale.py [--tokens N]

Arithmetic over the shapes of Llama 2, FSDP2 with bfloat16 parameters and gradients, and figures that were measured:
bytes of the optimizers (bench/results/memory.json), time of the step of a CPU core (bench/results/step-cpu.json).
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
RANKS = (8, 64, 256, 1024)
TOKENS = 8192  # of a step on each GPU


class Model(NamedTuple):
    """Sizes of a Llama; heads of keys and values have `width` / `heads` features each."""

    layers: int
    width: int
    hidden: int
    heads: int
    shared_heads: int
    vocabulary: int = 32_000

    def quantised(self) -> int:
        """Weights of the linear layers of all blocks."""
        attention = 2 * self.width**2 + 2 * self.width**2 * self.shared_heads // self.heads
        return self.layers * (attention + 3 * self.width * self.hidden)

    def others(self) -> int:
        """Embedding, head and norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width


MODELS = {"7B": Model(32, 4096, 11008, 32, 32), "70B": Model(80, 8192, 28672, 64, 8)}

# Optimizers: the row of memory.json, and the bytes that a step reads and writes for each parameter of bfloat16 beside
# its state, which it reads and writes: the gradient is read, the weight written, and read where it is the state.
OPTIMIZERS = {
    "AskewAdam, latent": ("AskewAdam(memory=True)", 4),
    "the same, bfloat16 moments": ("AskewAdam(memory=True), bfloat16 moments", 4),
    "STAM": ('STAM(form="alternating")', 4),
    "torch AdamW in bfloat16": ("torch AdamW", 6),
}
FLOPS_PER_BYTE = (
    300  # of dense bfloat16 for a byte of memory, by the data sheets of accelerators of 2022 to 2025
)


def state_bytes(optimizer: str) -> float:
    """Bytes of state per parameter, measured."""
    name, _ = OPTIMIZERS[optimizer]
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"]
    return float(next(r["state"] for r in rows if r["optimizer"] == name and r["dtype"] == "bfloat16"))


def moved_bytes(optimizer: str) -> float:
    """Bytes that a step reads and writes per parameter."""
    return OPTIMIZERS[optimizer][1] + 2 * state_bytes(optimizer)


def parameters_per_second() -> float:
    """Of the step of AskewAdam with a latent on one CPU core, measured."""
    rows = json.loads((RESULTS / "step-cpu.json").read_text())["rows"]
    row = next(r for r in rows if r["case"] == "AskewAdam, latent, fp32 16M" and r.get("ours_ms"))
    return float(2**24 / (row["ours_ms"] / 1e3))


def memory_table() -> str:
    """GiB of parameters, gradients and state on each GPU."""
    lines = ["| GPUs | " + " | ".join(f"{m}, {o}" for m in MODELS for o in OPTIMIZERS) + " |"]
    lines.append("|---" * (1 + len(MODELS) * len(OPTIMIZERS)) + "|")
    for ranks in RANKS:
        cells = [
            f"{(model.quantised() + model.others()) * (4 + state_bytes(optimizer)) / ranks / 2**30:,.1f}"
            for model in MODELS.values()
            for optimizer in OPTIMIZERS
        ]
        lines.append(f"| {ranks:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table(tokens: int) -> str:
    """What a GPU computes, receives and moves in a step."""
    head = ["model", "GPUs", "PFLOP", "GiB over the network", "GiB moved by the optimizer"]
    head += [f"optimizer, % of the arithmetic at {FLOPS_PER_BYTE} FLOP/byte", "s of the step on one CPU core"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, model in MODELS.items():
        count = model.quantised() + model.others()
        for ranks in RANKS:
            flops = 6 * count * tokens
            network = 3 * 2 * count * (ranks - 1) / ranks  # gathered twice, gradients scattered once
            moved = moved_bytes("AskewAdam, latent") * count / ranks
            share = 100 * moved * FLOPS_PER_BYTE / flops
            seconds = count / ranks / parameters_per_second()
            cells = [
                name,
                f"{ranks:,}",
                f"{flops / 1e15:.2f}",
                f"{network / 2**30:,.1f}",
                f"{moved / 2**30:,.2f}",
            ]
            lines.append("| " + " | ".join([*cells, f"{share:.2f}", f"{seconds:.3f}"]) + " |")
    return "\n".join(lines)


def decode_table() -> str:
    """What is read for a token."""
    lines = [
        "| model | bfloat16, GB | 1 bit, a scale per row, GB | 1 bit, head and embedding too, GB |",
        "|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        dense, other = model.quantised(), model.vocabulary * model.width  # of the embedding one row is read
        rows = 3 * model.width + 2 * model.width * model.shared_heads // model.heads + 2 * model.hidden
        packed = dense / 8 + 4 * model.layers * rows
        head = other / 8 + 4 * model.vocabulary
        cells = (2 * (dense + other), packed + 2 * other, packed + head)
        lines.append(f"| {name} | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step on each GPU (%(default)s)")
    tokens = parser.parse_args().tokens
    for model, sizes in MODELS.items():
        print(f"{model}: {sizes.quantised():,} weights in linear layers, {sizes.others():,} other parameters")
    print(memory_table(), step_table(tokens), decode_table(), sep="\n\n")


if __name__ == "__main__":
    main()
