"""Generation with packed models of transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from quantopt.nn.joined import JoinedLinear

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from quantopt.integrations.generation import ATTENTION, faster, grouped_attention

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def packed_model(name: str) -> Any:
    torch.manual_seed(0)
    config, model_class = MODELS[name]
    model = model_class(config(**SHAPE)).eval()
    opt = quantopt.BinaryConnect(quantopt.param_groups(model, scale="channel"), lr=0.1)
    return quantopt.pack(model, opt)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_that_of_torch(shared: int, tokens: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, tokens, 8, dtype=torch.float64)
    key, value = (torch.randn(2, shared, 9, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.randn(2, 1, tokens, 9, dtype=torch.float64) if masked else None
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.7, enable_gqa=True
    )
    found, weights = grouped_attention(nn.Module(), query, key, value, mask, scaling=0.7)
    assert weights is None
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same_tokens_in_one_graph(name: str) -> None:
    plain = packed_model(name)
    tokens = torch.randint(50, (2, 7))
    quick = faster(copy.deepcopy(plain))
    assert quick.config._attn_implementation == ATTENTION
    assert sum(isinstance(module, JoinedLinear) for module in quick.modules()) == 2 * 5
    torch.testing.assert_close(quick(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)
    if name != "llama":  # one is compiled
        return
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(tokens, **options)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    quick.forward = torch.compile(quick.forward, fullgraph=True, backend=backend)
    assert torch.equal(quick.generate(tokens, cache_implementation="static", **options), expected)
    assert len(graphs) <= 3  # the prompt, a token, and a token without a cache that is made


def test_masks_of_callers() -> None:
    query, key, value = torch.full((1, 2, 1, 4), 8.0), torch.full((1, 1, 3, 4), -8.0), torch.randn(1, 1, 3, 6)
    key[..., 1] = 3.0
    allowed = torch.tensor([[[[True, False, True]]]])
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, enable_gqa=True
    )
    found, _ = grouped_attention(nn.Module(), query, key, value, allowed)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    halves = (query.half(), key.half(), value.half())
    nothing = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    assert bool(grouped_attention(nn.Module(), *halves, nothing)[0].isfinite().all())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="must be a PreTrainedModel of transformers, not Linear"):
        faster(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no packed layers"):
        faster(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    joined = faster(packed_model("llama"))
    with pytest.raises(ValueError, match="is joined with others"):
        faster(joined)
    x = torch.zeros(1, 1, 1, 4)
    assert grouped_attention(nn.Module(), x, x, x, None, softcap=None, sliding_window=3)[0].shape == (
        1,
        1,
        1,
        4,
    )
    with pytest.raises(ValueError, match=r"Module has softcap, .* does"):
        grouped_attention(nn.Module(), x, x, x, None, softcap=30.0)
