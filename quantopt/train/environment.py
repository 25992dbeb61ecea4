"""The origin of a result (versions, processor, GPU, commit), and what `quantopt env` prints: the same, and the backend
of each operation with the reason."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantopt
from quantopt import _extension, backends
from quantopt.train import screen

_PACKAGES = ("numpy", "safetensors", "triton", "scikit-learn", "matplotlib", "pillow", "tqdm")


def header(device: str, threads: int) -> dict[str, Any]:
    """The head of a file of results. device: "cpu", "cuda" or "cuda:N"."""
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "threads": threads,
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {
        "quantopt": quantopt.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: str = "cpu") -> str:
    """The processor's name, or the GPU's."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    isa = "" if _extension.error is not None else f", {torch.ops.quantopt.cpu_isa()}"
    return f"{name}{model}{isa}"


def commit() -> str:
    """The commit of the source tree, followed by + if the tree differs from it; "unknown" for an installed package."""
    root = Path(quantopt.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def describe() -> dict[str, Any]:
    """Plain data, as printed by `quantopt env --json`."""
    build = _extension.build_info()
    return {
        "versions": {
            "quantopt": quantopt.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "extension": {"loaded": _extension.error is None, "why": _extension.error, **build},
        "isa": _isa(),
        "extras": screen.extras(),
        "cuda": _cuda(),
        "backends": [
            {"operation": operation, "device": device, "backend": choice.name, "why": choice.why}
            for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
            for operation, choice in _choices(device)
        ],
    }


def version(package: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa() -> dict[str, Any]:
    forced = os.environ.get("QUANTOPT_CPU_ISA")
    facts: dict[str, Any] = {"torch": torch.backends.cpu.get_cpu_capability(), "forced": forced}
    if _extension.error is None:
        try:
            facts["active"] = torch.ops.quantopt.cpu_isa()
        except RuntimeError as error:  # QUANTOPT_CPU_ISA names one that cannot run
            facts["active"], facts["error"] = None, str(error).splitlines()[0]
    return facts


def _cuda() -> dict[str, Any]:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return {"torch_build": torch.version.cuda, "available": bool(devices), "devices": devices}


def _choices(device: str) -> list[tuple[str, backends.Choice]]:
    return [
        (operation, backends.choose(operation, torch.device(device), torch.float32))
        for operation in backends.OPERATIONS
    ]


def text(facts: dict[str, Any]) -> str:
    """All of them as text for people; `screen.text` is what they need most."""
    build, isa, cuda = facts["extension"], facts["isa"], facts["cuda"]
    lines = [
        "versions",
        *(f"  {name:<13} {version or 'not installed'}" for name, version in facts["versions"].items()),
    ]
    lines += ["machine", f"  {'platform':<13} {facts['platform']}", f"  {'threads':<13} {facts['threads']}"]
    if build["loaded"]:
        lines.append(
            f"  {'instructions':<13} {isa['active'] or isa['error']}" + (" (forced)" if isa["forced"] else "")
        )
        lines.append(f"  {'':<13} built for {', '.join(build['isas'])}")
    for device in cuda["devices"] or [None]:
        shown = (
            "none that torch can use"
            if device is None
            else f"{device['name']}, capability {device['capability']}"
        )
        lines.append(f"  {'GPU':<13} {shown}")
    lines.append("build")
    if build["loaded"]:
        lines.append(f"  {'extension':<13} loaded; {build['compiler']}, torch {build['torch']}")
        archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"])
        lines.append(
            f"  {'CUDA kernels':<13} {f'{archs} by nvcc ' + str(build['nvcc']) if archs else 'not built'}"
        )
    else:
        lines.append(f"  {'extension':<13} not loaded: {build['why']}")
    lines.append(
        f"  {'torch':<13} {'CUDA ' + cuda['torch_build'] if cuda['torch_build'] else 'without CUDA'}"
    )
    width = max(len(row["operation"]) for row in facts["backends"])
    lines.append("backends")
    for row in facts["backends"]:
        lines.append(f"  {row['device']:<5} {row['operation']:<{width}} {row['backend']:<9} {row['why']}")
    return "\n".join(lines)
