"""The network, of the transformers library: random weights, a token for each byte; its loss, and what it writes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantopt.train.errors import InputError, require
from quantopt.train.lm.config import Config
from quantopt.train.lm.text import VOCABULARY, Text, batches
from quantopt.train.measure import images_per_second, spread

_VALIDATION_WINDOWS = 32  # at a time
_TIMED_WINDOWS = 4


def build(config: Config) -> Any:
    """The causal language model of `config`, on its device: a LlamaForCausalLM (RMS norms, gated feed-forward, no
    biases) or a GPTNeoXForCausalLM (layer norms, GELU, biases). Rotary positions, input and output embeddings that are
    not tied, no dropout. Random weights of torch's generator.

    Raises InputError without transformers, or for a width that the heads do not divide into even parts."""
    require("lm", "transformers")
    import transformers

    width, heads = config.width, config.heads
    turned = 2 if config.architecture == "llama" else 8  # GPT-NeoX turns pairs of a quarter of a head
    if width % (turned * heads):
        raise InputError("--width", f"{width} is not a multiple of {turned} x --heads {heads}")
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": config.feed_forward or feed_forward_width(config.architecture, width),
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        # In bfloat16, fused attention takes longer on a CPU than the operations one by one (torch 2.13).
        "attn_implementation": "eager" if torch.device(config.device).type == "cpu" else "sdpa",
    }
    library: Any = transformers
    if config.architecture == "llama":
        network = library.LlamaForCausalLM(library.LlamaConfig(num_key_value_heads=heads, **shape))
    else:
        network = library.GPTNeoXForCausalLM(
            library.GPTNeoXConfig(
                use_parallel_residual=False, attention_dropout=0.0, hidden_dropout=0.0, **shape
            )
        )
    return network.to(config.device)


def feed_forward_width(architecture: str, width: int) -> int:
    """4 x width; where it is gated 8/3, a multiple of 8 upwards: its three matrices have the parameters of the two."""
    return 4 * width if architecture == "gpt-neox" else -(-8 * width // 24) * 8


def loss(model: Any, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the byte that follows each byte, in nats."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text, length: int, windows: int | None = None) -> float:
    """Mean over the validation part of `text` (over `windows` of its windows, evenly spaced), in nats per byte, of
    `model` in evaluation mode, which it is left in."""
    model.eval()
    device = next(model.parameters()).device
    inputs, targets = text.validation_windows(length)
    if windows is not None:
        chosen = spread(len(inputs), windows)
        inputs, targets = inputs[chosen], targets[chosen]
    total = 0.0
    for some, following in batches(inputs, targets, _VALIDATION_WINDOWS):
        total += float(loss(model, some.to(device), following.to(device), "sum"))
    return total / targets.numel()


def bytes_per_second(models: Sequence[Any], text: Text, length: int) -> list[float]:
    """That each of `models`, on one device, reads of windows of the validation part; they take turns."""
    inputs = text.validation_windows(length)[0][: 10 * _TIMED_WINDOWS].long().to(models[0].device)

    def reading(model: Any) -> Callable[[Tensor], object]:
        return lambda windows: model(input_ids=windows, use_cache=False)

    rates = images_per_second([reading(model.eval()) for model in models], inputs, _TIMED_WINDOWS)
    return [length * rate for rate in rates]


def sample(model: Any, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
    """`length` bytes that `model` writes after `prompt`, which is not empty. Each is drawn from
    softmax(logits / temperature), with random numbers of `seed`; at temperature 0 the most likely one is taken.

    Keys and values are cached, so that a byte costs one pass over the layers. Where the positions of the model end, the
    last half of them is read again; of a longer prompt too."""
    context = model.config.max_position_embeddings
    text = list(prompt)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while (left := len(prompt) + length - len(text)) > 0:
            read = text if len(text) <= context else text[-max(context // 2, 1) :]
            inputs = torch.tensor([read], device=model.device)
            written = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(left, context + 1 - len(read)),
                use_cache=True,
                pad_token_id=0,
                **choice,
            )
            text += written[0, len(read) :].tolist()
    return bytes(text[len(prompt) :])
