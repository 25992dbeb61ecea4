"""Which layers of a model are quantised: the linear and convolution layers that are not skipped."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def select_weights(model: nn.Module, skip: Iterable[str] = ("first", "last")) -> dict[int, Tensor]:
    """id -> weight of the layers of ``model`` that are to be quantised, in the order the model defines them.

    ``skip``: "first", "last", or patterns of parameter names; () for none. Raises ValueError for a pattern that
    matches nothing.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    names = {id(p): name for name, p in model.named_parameters()}
    weights = [m.weight for m in model.modules() if isinstance(m, LAYERS)]
    chosen = {id(w): w for w in weights if id(w) in names}
    for pattern in skip if chosen else ():
        if pattern in ("first", "last"):
            chosen.pop(id(weights[0 if pattern == "first" else -1]), None)
            continue
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            raise ValueError(f"skip={pattern!r} matches no parameter of the model")
        chosen = {key: w for key, w in chosen.items() if not fnmatchcase(names[key], pattern)}
    return chosen
