"""Generation with packed models of transformers on a CPU: what costs time around the packed layers."""

from typing import Any

import torch
from torch import Tensor, nn

from quantopt import extras
from quantopt.packing import describe, join_layers
from quantopt.wrappers import unwrapped_model

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
except ImportError as error:
    raise ImportError(
        f"quantopt.integrations.generation {extras.missing('transformers', why=error)}"
    ) from None

__all__ = ["ATTENTION", "faster", "grouped_attention"]

_CHANGE = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
ATTENTION = "quantopt_grouped"
"""The name of :func:`grouped_attention` among transformers' attn_implementation, as this module is imported."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, in which heads that share keys and values are rows of one product.

    query [batch, heads, tokens, size], key [batch, shared, positions, size], value [batch, shared, positions, size_v],
    attention_mask: added, or bool (True takes part); returns [batch, tokens, heads, size_v] and no weights. Shared keys
    and values are not copied. torch's fused attention of a CPU (2.13) takes longer where there is one token
    and a mask. Raises ValueError for what changes the result and is not here (softcap, attention sinks, a bias of
    positions).
    """
    if unknown := [name for name in _CHANGE if others.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(unknown)}, which {ATTENTION} does not compute: "
            'packed.set_attn_implementation("eager") does'
        )
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    rows = query.reshape(batch, shared, heads // shared * tokens, size) * scaling
    scores = torch.matmul(rows, key.transpose(-1, -2)).view(batch, heads, tokens, -1)
    if attention_mask is not None:
        mask = attention_mask[..., : scores.shape[-1]]
        if mask.dtype == torch.bool:  # of a caller: True takes part
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:  # in fp32, as the least number of fp16 overflows with what is added
            scores = scores.float() + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if dropout:
        shares = nn.functional.dropout(shares, dropout, module.training)
    result = torch.matmul(shares.view(batch, shared, heads // shared * tokens, -1), value)
    return result.view(batch, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def faster(packed: nn.Module) -> Any:
    """Prepares a packed model of transformers for generation on a CPU, in place, and returns it without wrappers.

    The attention becomes :func:`grouped_attention`, and packed layers of one input are joined where they have the names
    of :func:`quantopt.packing.join_layers`. Outputs change by the rounding of the attention; a model whose attention
    has more than that raises when it is called. A model is saved before that.

    For one graph per token use a static cache: ``packed.forward = torch.compile(packed.forward, fullgraph=True)``, then
    ``packed.generate(..., cache_implementation="static")``.

    Raises TypeError for what is no PreTrainedModel, ValueError if nothing in it is packed, or layers are joined.
    """
    packed = unwrapped_model(packed)
    if not isinstance(packed, PreTrainedModel):
        raise TypeError(f"packed must be a PreTrainedModel of transformers, not {type(packed).__name__}")
    describe(packed)  # raises if nothing is packed, or if layers are joined already
    packed.set_attn_implementation(ATTENTION)
    join_layers(packed)
    return packed
