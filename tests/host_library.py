"""Shared libraries of the tests, compiled once for all workers and for later runs."""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def shared_library(
    name: str, sources: Mapping[Path, Sequence[str]], flags: Sequence[str] = (), link: Sequence[str] = ()
) -> Path:
    """Compiles each source with ``flags`` and its own flags, and links the objects with ``link``.

    The library stands in build/tests under a digest of all that it depends on. The first process that needs it
    compiles, on all processors; others wait at the lock.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, "-std=c++20", "-fPIC", "-ffp-contract=off", *flags, f"-I{ROOT / 'csrc'}"]
    folder = ROOT / "build/tests"
    library = folder / f"{name}-{_digest(command, sources, link)}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / f"{name}.lock", "w") as lock,
        tempfile.TemporaryDirectory(dir=folder) as objects,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library

        def compile_one(source: Path) -> str:
            target = f"{objects}/{source.stem}.o"
            subprocess.run([*command, *sources[source], "-c", str(source), "-o", target], check=True)
            return target

        linked = f"{objects}/{name}.so"
        made = list(pool.map(compile_one, sources))
        subprocess.run([compiler, "-shared", *made, *link, "-o", linked], check=True)
        for outdated in folder.glob(f"{name}-*.so"):
            outdated.unlink()
        os.replace(linked, library)
    return library


def _digest(command: Sequence[str], sources: Mapping[Path, Sequence[str]], link: Sequence[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version}{torch.__version__}{shlex.join([*command, *link])}".encode())
    for source, flags in sources.items():
        digest.update(f"{source}{shlex.join(flags)}".encode())
    folders = {ROOT / "csrc", *(source.parent for source in sources)}
    for path in sorted({path for folder in folders for path in folder.rglob("*") if path.is_file()}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
