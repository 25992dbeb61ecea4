"""Which weights of a model are quantised, and for every other parameter why it is not."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantopt.levels import level_count
from quantopt.wrappers import plain_names

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
FilterFn = Callable[[nn.Module, str], int | str | None]

FROZEN = "frozen (requires_grad=False)"
ADAPTER = "low-rank adapter"
EMBEDDING, TIED = "embedding", "tied to an embedding"
OTHER_KIND = "not the weight of a linear or convolution layer"
FILTERED = "filter_fn"
PLAIN = "bits=0"


class Row(NamedTuple):
    """A parameter of a model, or a packed weight."""

    name: str  # a tied weight has several names, with commas between them
    layer: str  # the class of the module that it belongs to
    shape: tuple[int, ...]
    bits: int | str  # 0: not quantised
    scale: str  # "" where it is not quantised
    left_out: str  # why it is not quantised, "" where it is


class Table(tuple[Row, ...]):
    """Rows, printed as lines of columns, and a line that says which layer was taken as the first, if one was looked
    for."""

    first = ""

    def __str__(self) -> str:
        lines = [("name", "layer", "shape", "bits", "scale", "left out")]
        for row in self:
            quantised = (str(row.bits), row.scale) if row.bits != 0 else ("-", "-")
            lines.append((row.name, row.layer, "x".join(map(str, row.shape)), *quantised, row.left_out))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        printed = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*printed, f"first: {self.first}"] if self.first else printed)

    __repr__ = __str__


class Choice(NamedTuple):
    """What is done with one parameter."""

    parameter: nn.Parameter
    names: tuple[str, ...]  # several of a tied weight
    layer: nn.Module  # that it belongs to
    bits: int | str
    left_out: str  # as in Row

    def row(self, scale: str) -> Row:
        shape = () if is_lazy(self.parameter) else tuple(self.parameter.shape)
        return Row(
            ", ".join(self.names),
            type(self.layer).__name__,
            shape,
            self.bits,
            "" if self.left_out or self.bits == 0 else scale,
            self.left_out,
        )


class Choices(list[Choice]):
    """What is done with each parameter of a model."""

    first = ""  # the name of the layer that skip="first" means, or why it means none; "" where it is not asked for

    def table(self, scale: str) -> Table:
        table = Table(choice.row(scale) for choice in self)
        table.first = self.first
        return table


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is a Conv1D of the transformers library: a linear layer with a weight [in, out]."""
    weight = module._parameters.get("weight")
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        and weight is not None
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) or is_transposed(module)


def kind_fault(module: nn.Module, p: Tensor) -> str:
    """Why the parameter ``p`` of ``module`` is never quantised by default, "" if it may be."""
    if isinstance(module, EMBEDDINGS):
        return EMBEDDING
    if not is_lazy(p) and p.dim() < 2:
        return f"{p.dim()}-d"
    if is_layer(module) and p is module._parameters.get("bias"):  # of a lazy layer, which has no shape yet
        return "1-d"
    return "" if is_layer(module) and p is module._parameters.get("weight") else OTHER_KIND


def choose(
    model: nn.Module,
    bits: int | str,
    skip: Iterable[str] = ("first", "last"),
    filter_fn: FilterFn | None = None,
) -> Choices:
    """What is done with each parameter of ``model``, in the model's order.

    Left out are frozen parameters, low-rank adapters (of peft), embeddings and weights tied to them, parameters of less
    than two dimensions, all that is not the weight of a linear or convolution layer, and what ``skip`` and
    ``filter_fn`` name; see :func:`quantopt.param_groups`. Raises ValueError for a pattern that matches no parameter,
    and for bits that are none, and TypeError for a model or skip of another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; groups of parameters by themselves are "
            "plain dicts that say their bits: {'params': [...], 'bits': 1}"
        )
    if not isinstance(skip, Iterable):
        raise TypeError(f"skip={skip!r}: must be a tuple of names and patterns, () for none")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    level_count(bits)
    names: dict[nn.Parameter, list[str]] = {}
    matched: dict[nn.Parameter, set[str]] = {}  # the names that patterns are matched with
    named = list(model.named_parameters(remove_duplicate=False))
    for (name, p), plain in zip(named, plain_names(name for name, _ in named), strict=True):
        names.setdefault(p, []).append(name)
        matched.setdefault(p, set()).update((name, plain))
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append((module_name, module))
    adapters = _adapters(model)
    choices = Choices()
    skipped, choices.first = _skipped(model, skip, adapters, matched)
    for p, own_names in names.items():
        faults = [kind_fault(module, p) for _, module in owners[p]]
        layers = [owner for owner, fault in zip(owners[p], faults, strict=True) if not fault]
        left_out = (
            (not p.requires_grad and FROZEN)
            or (p in adapters and ADAPTER)
            or (EMBEDDING in faults and (TIED if layers else EMBEDDING))
            or (not layers and faults[0])
            or skipped.get(p, "")
        )
        chosen: int | str = 0
        if not left_out:
            chosen = bits if filter_fn is None else _filtered(filter_fn, layers)
            left_out = "" if chosen != 0 else (PLAIN if filter_fn is None else FILTERED)
        layer = (layers or owners[p])[0][1]
        choices.append(Choice(p, tuple(own_names), layer, chosen, left_out))
    return choices


def nothing_left(choices: list[Choice], what: str) -> str:
    """The message where no weight is left to quantise: each reason, with the way out of it. ``what``: what else the
    caller can do."""
    faults: dict[str, list[str]] = {}
    for choice in choices:
        if is_layer(choice.layer) and choice.parameter is choice.layer._parameters.get("weight"):
            faults.setdefault(choice.left_out, []).append(choice.names[0])
    if not faults:
        return f"the model has no linear or convolution layer, so no weight to quantise; {what}"
    ways = {
        FROZEN: " (call requires_grad_(True) on those to train)",
        FILTERED: " (filter_fn returns their bits)",
        ADAPTER: " (never quantised)",
        TIED: " (never quantised)",
    }
    parts = []
    for fault, names in faults.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        by_skip = fault in ("first", "last") or fault.startswith("skip=")
        parts.append(
            f"{shown}: {fault}{' (pass skip=() to quantise it)' if by_skip else ways.get(fault, '')}"
        )
    return f"no weight is left to quantise: {'; '.join(parts)}. Or {what}"


def _filtered(filter_fn: FilterFn, layers: list[tuple[str, nn.Module]]) -> int | str:
    """The bits that ``filter_fn`` gives a weight, which is that of all ``layers``."""
    answers = {}
    for name, module in layers:
        value = filter_fn(module, name)
        try:
            level_count(0 if value is None else value)
        except ValueError as error:
            raise ValueError(f"filter_fn for {name!r}: {error}, or None (not quantised)") from None
        answers[name] = 0 if value is None else value
    if len(set(answers.values())) > 1:
        raise ValueError(f"filter_fn gives one weight, tied between layers, different bits: {answers}")
    return next(iter(answers.values()))


def _adapters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of adapters: of what peft's layers call adapter layers, of its prompt encoders, and of modules
    named lora_*, as other libraries name them."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        own = set(getattr(type(module), "adapter_layer_names", ()))
        if type(module).__module__.partition(".")[0] == "peft":
            own.add("prompt_encoder")
        for name, child in module.named_children():
            if name.startswith("lora_") or name in own:
                found.update(child.parameters())
        found.update(
            p for name, p in module._parameters.items() if p is not None and name.startswith("lora_")
        )
    return found


def _skipped(
    model: nn.Module,
    skip: tuple[str, ...],
    adapters: set[nn.Parameter],
    matched: dict[nn.Parameter, set[str]],
) -> tuple[dict[nn.Parameter, str], str]:
    """The weights that ``skip`` names, with the entry that names them, and what "first" means."""
    layers = [m for m in model.modules() if is_layer(m) and m._parameters.get("weight") not in adapters]
    skipped: dict[nn.Parameter, str] = {}
    first = ""
    for pattern in skip:
        if not isinstance(pattern, str):
            raise ValueError(f"skip={pattern!r}: must be 'first', 'last' or patterns of parameter names")
        if pattern in ("first", "last"):
            layer = (_first if pattern == "first" else _last)(model, layers) if layers else None
            if pattern == "first" and layer is not None:
                name = next((name for name, module in model.named_modules() if module is layer), "")
                kind = type(layer).__name__
                first = f"none: an embedding ({name})" if isinstance(layer, EMBEDDINGS) else name or kind
            p = None if layer is None or not is_layer(layer) else layer._parameters.get("weight")
            if p is not None:
                skipped.setdefault(p, pattern)
            continue
        found = [p for p, names in matched.items() if any(fnmatchcase(name, pattern) for name in names)]
        if not found:
            modules = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
            example = next((name for names in matched.values() for name in sorted(names)), None)
            hint = f"{pattern}.*" if modules else example
            raise ValueError(
                f"skip={pattern!r} matches no parameter of the model; patterns are of names of parameters, "
                f"such as {hint!r}"
            )
        for p in found:
            skipped.setdefault(p, f"skip={pattern!r}")
    return skipped, first


def _first(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The first layer that sees the input, or the embedding that does."""
    asked = _asked(model, "get_input_embeddings")
    if asked is not None and not isinstance(asked, EMBEDDINGS):
        inside = set(asked.modules())
        return next((layer for layer in layers if layer in inside), layers[0])
    first = layers[0]
    inputs = None  # of a convolution, which sees an image or a sound, whatever embedding is in front of it
    if isinstance(first, nn.Linear) or is_transposed(first):
        weight = first._parameters.get("weight")
        if weight is not None and not is_lazy(weight) and weight.dim() == 2:
            inputs = weight.shape[0 if is_transposed(first) else 1]
    for module in model.modules():
        if module is first:
            break
        if isinstance(module, EMBEDDINGS) and module.embedding_dim == inputs:
            return module
    return first


def _last(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The layer that makes the logits."""
    head = _asked(model, "get_output_embeddings")
    return head if head is not None and is_layer(head) else layers[-1]


def _asked(model: nn.Module, method: str) -> Any:
    """What the outermost module with ``method``, as models of the transformers library have it, answers."""
    for module in model.modules():
        if callable(getattr(type(module), method, None)):
            try:
                answer = getattr(module, method)()
            except (AttributeError, NotImplementedError):  # a model without embeddings
                continue
            if isinstance(answer, nn.Module):
                return answer
    return None
