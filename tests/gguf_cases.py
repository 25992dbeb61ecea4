"""Random packed layers and models for the tests of GGUF."""

import random

import torch
import transformers
from torch import nn

import quantopt
from quantopt.nn import BinaryLinear

KINDS = {"Q1_0": (2, 128, 18), "TQ1_0": (3, 256, 54), "TQ2_0": (3, 256, 66)}


def random_layer(inputs, outputs, kind="Q1_0", bias=False, seed=0, **options) -> BinaryLinear:
    """A layer whose outer levels are random numbers of fp16, one for each block unless options say another."""
    generator = torch.Generator().manual_seed(seed)
    levels, block, _ = KINDS[kind]
    options = options or {"scale": "group", "group_size": block}
    layer = BinaryLinear(inputs, outputs, bias, levels=levels, **options)
    codes = torch.randint(levels, (outputs, inputs), generator=generator)
    if levels == 2:
        bits = quantopt.pack_signs(codes - 0.5)
    else:
        bits = quantopt.pack_signs(torch.stack([codes > 0, codes > 1]).float() - 0.5)
    outer = (torch.rand(layer.scale.shape, generator=generator) / inputs**0.5 + 1e-3).half().float()
    shift = torch.randn(outputs, generator=generator) if bias else None
    return layer.set_weights(bits, outer / (levels - 1), shift)


def model_of(seed: int, **changes) -> nn.Module:
    """A random Llama or Qwen3 with packed layers; the seed decides its shape and its kinds."""
    choose = random.Random(seed)
    arch = choose.choice(["llama", "qwen3"])
    kind = choose.choice(["Q1_0", "Q1_0", "TQ2_0"])
    width = 256 if kind == "TQ2_0" else choose.choice([128, 256])
    heads = choose.choice([2, 4])
    settings = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 256,
        "num_hidden_layers": choose.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": choose.choice([1, 2]),
        "head_dim": width // heads if arch == "llama" or kind == "TQ2_0" else 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": choose.random() < 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": choose.choice([1e4, 5e5])},
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if arch == "llama" and choose.random() < 0.5:
        settings |= {"attention_bias": True, "mlp_bias": choose.random() < 0.5}
    settings |= changes.pop("settings", {})
    arch, kind = changes.pop("arch", arch), changes.pop("kind", kind)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(arch, **settings))
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    for i, (name, layer) in enumerate(list(model.named_modules())):
        if isinstance(layer, nn.Linear) and (
            name != "lm_head" or (not model.config.tie_word_embeddings and seed % 2)
        ):
            model.set_submodule(
                name,
                random_layer(layer.in_features, layer.out_features, kind, layer.bias is not None, seed + i),
            )
    return model.eval()


TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits
