"""Small random models of the transformers library, whose importer has made sure that it is there."""

from typing import Any

import torch
import transformers
from torch import Tensor

TOKENS = torch.arange(24).view(2, 12)
SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHead": dict(n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None),
    "LlamaForCausalLM": dict(num_key_value_heads=1, tie_word_embeddings=False),
    "Qwen3ForCausalLM": dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    "BertForMaskedLM": dict(),
}


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model with two layers of width 32."""
    usual = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=None
    )
    sizes = SIZES[kind] | changes
    family = kind.removesuffix("LMHead").split("For")[0]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=48, **(sizes if "n_embd" in sizes else usual | sizes)
    )
    cls = getattr(transformers, f"{kind}Model" if kind.endswith("Head") else kind)
    return cls._from_config(config, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits
