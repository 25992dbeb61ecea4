"""Extension of griffe, for the API pages: the roles of Sphinx that docstrings have, :func:`name`, become links."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
# Where names are looked up that neither their module nor their own words have.
MODULES = ("quantopt", "quantopt.packing", "quantopt.gguf", "quantopt.nn")


class Roles(griffe.Extension):
    """Links are optional: a name without an entry of its own is code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        objects = list(_objects(pkg))
        # quantopt.optim hands its classes on by star imports, which are not followed yet.
        optim = {
            obj.name: obj.path for obj in objects if obj.path.startswith("quantopt.optim.") and obj.is_class
        }
        optim |= {"param_groups": "quantopt.optim.groups.param_groups"}
        for obj in objects:
            if obj.docstring is not None:
                obj.docstring.value = ROLE.sub(
                    lambda role, obj=obj: _link(pkg, obj, role[1], optim), obj.docstring.value
                )


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(pkg: griffe.Module, obj: griffe.Object, name: str, optim: dict[str, str]) -> str:
    plain = name.removeprefix("quantopt.")
    first, dot, rest = plain.partition(".")
    owner = obj.parent.path if isinstance(obj.parent, griffe.Class) else obj.path  # of a method
    near = [] if plain != name else [f"{owner}.{name}", f"{obj.module.path}.{name}"]
    targets = [*near, *(f"{module}.{plain}" for module in MODULES)]
    targets += [optim[first] + dot + rest] if first in optim else []
    target = next((path for path in targets if _has(pkg, path)), name)
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'


def _has(pkg: griffe.Module, path: str) -> bool:
    try:
        return pkg[path.removeprefix("quantopt.")] is not None
    except (KeyError, griffe.AliasResolutionError):
        return False
