"""What `quantopt env` says in one screen: what is fast here, correct and not fast, or not here; why, and what to do."""

import importlib.metadata
import re
import textwrap
from typing import Any, NamedTuple

from quantopt.extras import DISTRIBUTION

_COLUMNS = 100
_WHAT = {
    "fused_step": "optimizer steps",
    "binary_linear": "packed linear layers",
    "binary_conv2d": "packed convolutions",
}


class Speed(NamedTuple):
    """A judgement: "fast", "not timed", "correct, not fast" or "not here", what runs it, the reason and the remedy."""

    word: str
    runs: str
    why: str


def speed(row: dict[str, Any], facts: dict[str, Any]) -> Speed:
    """Of an operation on a device, a row of `facts["backends"]`."""
    isa = facts["isa"].get("active")
    if row["backend"] == "reference":
        return Speed("correct, not fast", "reference in PyTorch", row["why"])
    if row["device"] == "cuda":
        return Speed("not timed", f"{row['backend']} kernels", "no figure of this package is from a GPU yet")
    if isa is None:
        return Speed("not here", "cpu kernels", f"{facts['isa'].get('error')}: unset QUANTOPT_CPU_ISA")
    if isa != "portable":
        return Speed("fast", f"cpu kernels, {isa}", "")
    if facts["extension"]["isas"] == ["portable"]:
        why = "built without AVX2: rebuild on x86-64 with a compiler that knows -march=x86-64-v3"
    elif facts["isa"]["forced"]:
        why = "QUANTOPT_CPU_ISA asks for it: unset it"
    else:
        why = "the fast ones need a processor with AVX2"
    return Speed("correct, not fast", "cpu kernels, portable", why)


def extras() -> dict[str, dict[str, list[str]]]:
    """The extras that the installed package names, with those of their packages that are "installed" and "missing", of
    another version than the extra asks for with both versions; {} where the package runs from a source tree that is
    not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed: dict[str, list[str]] = {}
    for line in lines:
        if extra := re.search(r"extra == ['\"]([\w.-]+)", line):
            needed.setdefault(extra[1], []).append(line.partition(";")[0].strip())
    return {extra: _found(_resolved(extra, needed)) for extra in sorted(needed)}


def _resolved(extra: str, needed: dict[str, list[str]]) -> list[str]:
    """The requirements of an extra, with those of the extras that it names."""
    packages = []
    for package in needed.get(extra, []):
        other = package.removeprefix(f"{DISTRIBUTION}[").removesuffix("]")
        packages += [package] if other == package else _resolved(other, needed)
    return packages


def _found(requirements: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"installed": [], "missing": []}
    for requirement in requirements:
        package = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["missing"].append(package)
            continue
        if _allows(requirement, version):
            found["installed"].append(package)
        else:
            found["missing"].append(f"{requirement}, not {version}")
    return found


def _allows(requirement: str, version: str) -> bool:
    """Whether a requirement takes a version; without the packaging library it takes all."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def text(facts: dict[str, Any]) -> str:
    """The screen: at most 100 columns."""
    build, isa, cuda, found = facts["extension"], facts["isa"], facts["cuda"], facts["versions"]
    lines = [
        f"quantopt {found['quantopt']}, torch {found['torch']}, python {found['python']}, numpy {found['numpy']}",
        "",
    ]
    _add(lines, "machine", f"{facts['platform']}, threads: {facts['threads']}")
    if build["loaded"]:
        archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"])
        _add(lines, "extension", f"loaded; {build['compiler']}, torch {build['torch']}")
        active = f"{isa['active'] or isa['error']}{' (forced)' if isa['forced'] else ''}"
        _add(lines, "instructions", f"{active}; built for {', '.join(build['isas'])}")
        why = "install the CUDA toolkit and rebuild with QUANTOPT_CUDA=1"
        if cuda["torch_build"] is None:
            why = "this torch could not call them"
        _add(lines, "CUDA kernels", f"{archs} by nvcc {build['nvcc']}" if archs else f"not built: {why}")
    else:
        _add(lines, "extension", f"not loaded: {build['why']}")
    names = [f"{device['name']}, capability {device['capability']}" for device in cuda["devices"]]
    torch_build = (
        "torch is built without CUDA: install a torch with it"
        if cuda["torch_build"] is None
        else "no usable NVIDIA GPU"
    )
    _add(lines, "GPU", "; ".join(names) or f"none that torch can use ({torch_build})")
    lines.append("")
    for row in facts["backends"]:
        judged = speed(row, facts)
        where = f"on {'GPU' if row['device'] == 'cuda' else 'CPU'}, {judged.runs}"
        said = f"{judged.word}: {where}" + (f"; {judged.why}" if judged.why else "")
        _add(lines, f"{_WHAT[row['operation']]} ({row['operation']})", said, 37)
    if not cuda["devices"]:
        _add(lines, "all of them on a GPU", "not here: there is no GPU that torch can use", 37)
    lines.append("")
    _add_extras(lines, facts["extras"])
    return "\n".join([*lines, "", "more: quantopt env --all, quantopt env --json"])


def _add(lines: list[str], name: str, words: str, width: int = 14) -> None:
    lines += textwrap.wrap(
        f"{name:<{width}}{words}", _COLUMNS, subsequent_indent=" " * width, break_on_hyphens=False
    )


def _add_extras(lines: list[str], found: dict[str, dict[str, list[str]]]) -> None:
    if not found:
        _add(lines, "extras", "unknown: the package is not installed, it runs from its source tree")
        return
    there = [extra for extra, packages in found.items() if not packages["missing"]]
    absent = [
        f"{extra} ({', '.join(packages['missing'])})"
        for extra, packages in found.items()
        if packages["missing"]
    ]
    _add(lines, "extras", ", ".join(there) or "none")
    if absent:
        _add(lines, "not installed", f"{', '.join(absent)}: pip install '{DISTRIBUTION}[NAME]'")
