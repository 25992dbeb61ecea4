"""Extension of griffe, for the API pages: the roles of Sphinx that docstrings have, :func:`name`, become links."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
# Where names without a module are looked up if the docstring's own module does not have them.
MODULES = ("quantopt", "quantopt.packing", "quantopt.gguf", "quantopt.nn")


class Roles(griffe.Extension):
    """Links are optional: a name without an entry of its own is code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    targets = [name] if name.startswith("quantopt.") else [f"{obj.module.path}.{name}"]
    targets += [f"{module}.{name}" for module in MODULES]
    modules = obj.package.modules_collection
    target = next((path for path in targets if path in modules), name)
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
