"""What `quantopt env` prints: versions, the processor, the GPU, and what would run each operation and why."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

import quantopt
from quantopt import _extension, backends

_PACKAGES = ("numpy", "safetensors", "triton", "scikit-learn", "matplotlib", "pillow", "tqdm")


def describe() -> dict[str, Any]:
    """Plain data, as printed by `quantopt env --json`."""
    build = _extension.build_info()
    return {
        "versions": {
            "quantopt": quantopt.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "extension": {"loaded": _extension.error is None, "why": _extension.error, **build},
        "isa": _isa(),
        "cuda": _cuda(),
        "backends": [
            {"operation": operation, "device": device, "backend": choice.name, "why": choice.why}
            for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
            for operation, choice in _choices(device)
        ],
    }


def _version(package: str) -> str | None:
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
    """The facts for people."""
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
