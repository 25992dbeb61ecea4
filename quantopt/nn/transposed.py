"""Linear layers in place of those of the transformers library that keep their weight transposed."""

from torch import nn

from quantopt.selection import is_transposed


def conv1d_to_linear(model: nn.Module) -> nn.Module:
    """Replaces each Conv1D of the transformers library in ``model`` by an nn.Linear, in place; returns ``model``.

    A Conv1D computes x W + b with W [in, out]; the Linear has W^T [out, in], so that a row, and with it a scale per
    channel or group, belongs to an output. Names stay, and outputs are the same up to rounding; a state_dict of the
    model as it was no longer fits. Call it before the optimizer is made. Shared layers stay shared, and so do shared
    weights. Raises ValueError if ``model`` is itself a Conv1D.
    """
    if is_transposed(model):
        raise ValueError("model is a Conv1D itself, and cannot be replaced in place; wrap it in a module")
    layers: dict[nn.Module, nn.Linear] = {}
    weights: dict[nn.Parameter, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if layer is None or not is_transposed(layer):
                continue
            if layer not in layers:
                weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
                assert weight is not None
                if weight not in weights:
                    turned = weight.detach().t().contiguous()
                    weights[weight] = nn.Parameter(turned, requires_grad=weight.requires_grad)
                inputs, outputs = weight.shape
                linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
                linear.weight = weights[weight]
                if bias is not None:
                    linear.bias = bias
                layers[layer] = linear.train(layer.training)
            setattr(parent, name, layers[layer])
    return model
