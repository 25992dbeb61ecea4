"""The network: a Llama of the transformers library, random weights, a token for each byte."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantopt.train.errors import InputError
from quantopt.train.lm.text import VOCABULARY, Text, batches

_VALIDATION_WINDOWS = 32  # at a time


def build(layers: int, width: int, heads: int, context: int, device: str | torch.device = "cpu") -> nn.Module:
    """A LlamaForCausalLM (RMS norms, rotary positions, gated feed-forward of 8/3 width, no biases; input and output
    embeddings are not tied) on `device`. Random weights of torch's generator.

    Raises InputError without transformers, or for a width that the heads do not divide into even parts."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise InputError(
            "lm", f"needs the transformers library: pip install 'quantopt[lm]' ({error})"
        ) from None
    if width % (2 * heads):
        raise InputError("--width", f"{width} is not a multiple of 2 x --heads {heads}")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=feed_forward_width(width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        # In bfloat16, fused attention is half as fast on a CPU as the operations one by one (torch 2.13).
        attn_implementation="eager" if torch.device(device).type == "cpu" else "sdpa",
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(device)


def feed_forward_width(width: int) -> int:
    """8/3 of the width, a multiple of 8 upwards: three matrices then have the parameters of two of 4 x width."""
    return -(-8 * width // 24) * 8


def loss(model: Any, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the byte that follows each byte, in nats."""
    logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text, length: int) -> float:
    """Mean over the validation part of `text`, in nats per byte, of `model` in evaluation mode, which it is left in."""
    model.eval()
    device = next(model.parameters()).device
    inputs, targets = text.validation_windows(length)
    total = 0.0
    for some, following in batches(inputs, targets, _VALIDATION_WINDOWS):
        total += float(loss(model, some.to(device), following.to(device), "sum"))
    return total / targets.numel()
