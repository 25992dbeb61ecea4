"""Whole language models of Llama's shape, packed, against torch's bf16 and llama.cpp: decoding and prompts.

    python bench/llm.py [--model 125m|1.7b] [--layers N] [--threads N] [--batch N] [--context N]
                        [--head packed|bf16] [--only NAME ...] [--min-time SECONDS] [--json FILE]
    python bench/llm.py --memory NAME ...      memory of a process that has nothing but the one

Random weights at one bit, with a scale per channel or per group of 128, int8 activations or exact, run by the
transformers library with a static cache, compiled by torch.compile as one graph, layers of one input joined. The peers
are the same network with the same levels in bf16, run in the same way, and the same tensors in a GGUF file (Q1_0) run
by llama.cpp (at batch 1), where llama-cpp-python is installed. The logits of each are checked before it is timed.
Contenders take turns, a token or a prompt each; medians, and the times of the peers by theirs. Memory of torch is in
huge pages (THP_MEM_ALLOC_ENABLE=1, before torch is imported): of 1.7 billion weights a token touches every page.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # of torch: weights in huge pages, for all that torch runs

import argparse
import importlib.util
import inspect
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantopt.nn import BinaryLinear
from quantopt.packing import join_layers
from quantopt.train.environment import header

SHAPES: dict[str, dict[str, int]] = {
    "125m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
VOCABULARY = 32_000
PROMPT = 512  # tokens of the prompt that is timed
GROUP = 128

# name: (compute, scale). The first is the one that ratios are of.
OURS = {
    "int8": ("int8", "channel"),
    "exact": ("exact", "channel"),
    "int8 groups": ("int8", "group"),
    "exact groups": ("exact", "group"),
}
TORCH, LLAMA = "torch bf16", "llama.cpp Q1_0"


def configuration(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    from quantopt.integrations.generation import ATTENTION

    return LlamaConfig(
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        attn_implementation=ATTENTION,
        **shape,
    )


def bits_of(name: str, rows: int, columns: int) -> Tensor:
    """The signs of a layer, the same for every contender."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8, generator=generator)


def packed_layer(name: str, layer: nn.Linear, compute: str, scale: str) -> BinaryLinear:
    inputs, outputs = layer.in_features, layer.out_features
    size = GROUP if scale == "group" else 0
    packed = BinaryLinear(
        inputs, outputs, False, scale=scale, group_size=size, compute=compute, device="meta"
    )
    value = float(torch.tensor(inputs**-0.5).half())  # as a GGUF file has it
    scales = torch.full(packed.scale.shape, value)
    return packed.set_weights(bits_of(name, outputs, inputs), scales, None)


@torch.no_grad()
def build(shape: dict[str, int], head: str, compute: str | None, scale: str, joined: bool = True) -> Any:
    """The network: packed with `compute`, or in bf16 if that is None; everything else is bf16 in both."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = configuration(shape)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    dtype = torch.bfloat16
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        parent, _, key = name.rpartition(".")
        packed = packed_layer(name, layer, compute or "exact", scale)
        new: nn.Module = packed
        if compute is None or (head == "bf16" and key == "lm_head"):
            new = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
            new.weight = nn.Parameter(packed.weight.bfloat16(), requires_grad=False)
        setattr(model.get_submodule(parent), key, new)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, config.hidden_size, generator=generator)
    model.model.embed_tokens.weight = nn.Parameter(table.half().to(dtype), requires_grad=False)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_meta:  # of the norms
                module._parameters[key] = nn.Parameter(torch.ones(p.shape, dtype=dtype), requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    if compute is not None and joined:
        join_layers(model)
    return model.eval()


class Transformers:
    """A network of the transformers library with a static cache, compiled."""

    def __init__(self, model: Any, context: int) -> None:
        from transformers import StaticCache

        self.model = model
        names = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        settings: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, self._name: self.cache}

        def run(tokens: Tensor) -> Tensor:
            return model(input_ids=tokens, **settings).logits[:, -1].float()  # type: ignore[no-any-return]

        # torch.compile finds graphs by the code of a function, and looks through those of all networks that share it.
        code = run.__code__.replace(co_name=f"run_{id(self)}")
        self._run = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
        self._compiled = torch.compile(self._run, fullgraph=True, dynamic=False)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [batch, vocabulary] after tokens [batch, n], appended to what the cache has. One token and a prompt of
        PROMPT are compiled."""
        run = (
            self._compiled
            if self.cache.layers[0].is_initialized and tokens.shape[1] in (1, PROMPT)
            else self._run
        )
        return run(tokens)

    def clear(self) -> None:
        self.cache.reset()


class LlamaCpp:
    """A GGUF file of the same tensors, run by llama.cpp."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_batch=PROMPT,
            n_ubatch=PROMPT,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.library: Any = llama_cpp

    def read(self, tokens: Tensor) -> Tensor:
        self.model.eval(tokens[0].tolist())
        logits = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return torch.tensor(logits[:VOCABULARY])[None]

    def clear(self) -> None:
        self.model.reset()
        self.library.llama_memory_clear(self.library.llama_get_memory(self.model.ctx), True)


Contender = Transformers | LlamaCpp


def write_gguf(shape: dict[str, int], head: str, path: Path) -> None:
    from quantopt import gguf

    gguf.save(build(shape, head, "exact", "channel", joined=False), path)


def contender(name: str, arguments: argparse.Namespace) -> Contender:
    shape = SHAPES[arguments.model] | (
        {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    )
    if name == LLAMA:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            # In a process of its own, whose memory is not counted.
            process = multiprocessing.get_context("spawn").Process(
                target=write_gguf, args=(shape, arguments.head, path)
            )
            process.start()
            process.join()
            return LlamaCpp(path, arguments.context, arguments.threads)
    compute, scale = OURS.get(name, (None, "channel"))
    return Transformers(build(shape, arguments.head, compute, scale), arguments.context)


def missing(name: str, arguments: argparse.Namespace) -> str:
    """Why a contender does not run, "" if it does."""
    if name != LLAMA:
        return ""
    if arguments.batch > 1:
        return "this file runs it at batch 1"
    for library in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    return ""


def tokens_of(batch: int, count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def check(logits: dict[str, Tensor]) -> dict[str, float]:
    """The relative distance of each contender's logits to those of `reference`. SystemExit where one is wrong."""
    exact = logits[reference(logits)]
    distances = {}
    for name, values in logits.items():
        distances[name] = float((values - exact).norm() / exact.norm())
        if not distances[name] < 0.25:  # 8 bits of 28 layers of random weights
            raise SystemExit(f"{name}: its logits differ from the exact ones by {distances[name]:.2f}")
    return distances


def reference(names: Iterable[str]) -> str:
    """The contender whose logits the others are compared with."""
    return "exact" if "exact" in names else next(iter(names))


@torch.inference_mode()
def measure(
    contenders: dict[str, Contender], batch: int, context: int, min_time: float
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """({"decode": {name: seconds of a token}, "prompt": {name: seconds}}, distances of the logits)."""
    prompt, short = tokens_of(batch, PROMPT), tokens_of(batch, context // 2)
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in contenders} for kind in ("prompt", "decode")
    }
    logits = {}

    def timed(kind: str, name: str, tokens: Tensor) -> Tensor:
        start = time.perf_counter()
        y = contenders[name].read(tokens)
        times[kind][name].append(time.perf_counter() - start)
        return y

    for each in contenders.values():
        each.read(short[:, :2])
        for tokens in (prompt, short[:, :1]) if batch == 1 else (short[:, :1],):  # compiles
            each.clear()
            each.read(tokens)
    print("timed from here", file=sys.stderr, flush=True)
    if batch == 1:
        begin = time.perf_counter()
        while len(times["prompt"][next(iter(contenders))]) < 4 or time.perf_counter() - begin < min_time:
            for name, each in contenders.items():
                each.clear()
                timed("prompt", name, prompt)
    for name, each in contenders.items():
        each.clear()
        each.read(short)
        logits[name] = each.read(short[:, :1])
    distances = check(logits)
    for _ in range(context // 2 - 2):
        for name in contenders:
            timed("decode", name, short[:, :1])
    # The first ones compile, or warm caches.
    medians = {
        kind: {name: statistics.median(values[2:]) for name, values in of.items() if len(values) > 2}
        for kind, of in times.items()
    }
    return {kind: of for kind, of in medians.items() if of}, distances


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    names = arguments.only or [*OURS, TORCH, LLAMA]
    left_out = {name: why for name in names if (why := missing(name, arguments))}
    contenders = {name: contender(name, arguments) for name in names if name not in left_out}
    medians, distances = measure(contenders, arguments.batch, arguments.context, arguments.min_time)
    rows = []
    for kind, of in medians.items():
        for name, seconds in of.items():
            count = arguments.batch if kind == "decode" else arguments.batch * PROMPT
            rows.append(
                {"kind": kind, "name": name, "ms": seconds * 1e3, "tokens_per_second": count / seconds}
                | {"distance": distances[name]}
                | {f"less than {peer}": of[peer] / seconds for peer in (TORCH, LLAMA) if peer in of}
            )
    rows += [{"kind": "left out", "name": name, "why": why} for name, why in left_out.items()]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    other = reference([row["name"] for row in rows])
    lines = [
        f"{'':8}{'':16}{'ms':>10}{'tokens/s':>10}{'x torch':>9}{'x llama':>9}  distance of the logits to {other}'s"
    ]
    for row in rows:
        if row["kind"] == "left out":
            lines.append(f"{row['name']}: left out, {row['why']}")
            continue
        against = [
            f"{row[key]:9.2f}" if (key := f"less than {peer}") in row else f"{'-':>9}"
            for peer in (TORCH, LLAMA)
        ]
        figures = f"{row['ms']:10.2f}{row['tokens_per_second']:10.1f}"
        lines.append(f"{row['kind']:8}{row['name']:16}{figures}{''.join(against)}  {row['distance']:.1e}")
    return "\n".join(lines)


def memory(name: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(MB that stay, at the peak) of a process that builds one contender and reads 8 tokens, less what it had before.
    The peak is of random weights that are made and converted, not of a file that is loaded."""
    before = resident()
    each = contender(name, arguments)
    with torch.inference_mode():
        each.read(tokens_of(arguments.batch, 8))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return resident() - before, highest - before


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="125m")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded together")
    parser.add_argument(
        "--context",
        type=int,
        default=PROMPT,
        help="positions of the cache; decoded is behind half of them (%(default)s)",
    )
    parser.add_argument("--head", choices=("packed", "bf16"), default="packed")
    parser.add_argument("--only", nargs="+", choices=(*OURS, TORCH, LLAMA), metavar="NAME")
    parser.add_argument("--memory", choices=(*OURS, TORCH, LLAMA), metavar="NAME")
    parser.add_argument("--min-time", type=float, default=5.0, help="seconds of prompts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.context < PROMPT:
        parser.error(f"--context: at least {PROMPT}")
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        stays, highest = memory(arguments.memory, arguments)
        print(f"{arguments.memory}: {stays:.0f} MB, {highest:.0f} MB at the peak")
        return
    rows = rows_of(arguments)
    print(table(rows))
    if arguments.json:
        settings = {
            key: value for key, value in vars(arguments).items() if key not in ("json", "only", "memory")
        }
        contents = {**header("cpu", arguments.threads), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
