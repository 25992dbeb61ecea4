"""The CUDA part of the built extension: its links, registers and machine code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from machine_code import ARCHS, extension_file, kernels_of, needs_cuda_build
from product_cases import SHAPES, WGMMA_TOKENS
from quantopt import _extension
from quantopt.rules import RULES

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
def test_links_no_cuda_runtime_and_no_second_openmp() -> None:
    """The CUDA runtime is linked statically and hidden: torch's own is not disturbed, its version free."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(
        [readelf, "-d", extension_file()], capture_output=True, text=True, check=True
    ).stdout
    for word in ("cudart", "gomp", "RPATH", "RUNPATH"):
        assert word not in dynamic
    symbols = subprocess.run(
        [readelf, "-W", "--dyn-syms", extension_file()], capture_output=True, text=True, check=True
    )
    assert not re.search(r"GLOBAL +DEFAULT +\d+ cuda", symbols.stdout)


@needs_cuda_build
def test_no_kernel_spills_a_register() -> None:
    """By the compiler's own report, kept beside the objects of a build in this tree."""
    logs = sorted(
        ROOT.glob(f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-*/cuda/step*.log")
    )
    if not logs:
        pytest.skip("the extension was not built in this tree")
    text = "".join(
        log.read_text() for log in logs if (ROOT / f"csrc/cuda/{log.name.split('.')[0]}.cu").exists()
    )
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\S+)'(.*?)Used \d+ registers", text, re.DOTALL
    )
    assert {arch for _, arch, _ in kernels} == set(ARCHS)
    for name, arch, report in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, arch)


@needs_cuda_build
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code_of_steps(arch: str) -> None:
    """Every step kernel reads and writes 16 bytes at a time and keeps nothing in local memory."""
    rules = list(RULES.values())
    found = dict.fromkeys(("step_kernel", "group_kernel", "row_kernel", "magnitude_kernel"), 0)
    for name, code in kernels_of(arch).items():
        kind = next((kind for kind in found if kind in name), None)
        if kind is None:
            continue
        found[kind] += 1
        rule = rules[int(re.search(r"RowOfILNS_4RuleE(\d+)E", name)[1])]  # type: ignore[index]
        stored = 2 + rule.latent + ("AdamBase" in name)  # the parameter, momentum and others
        assert code.count("LDG.E.128") >= stored, name
        assert code.count("STG.E.128") >= (0 if kind == "magnitude_kernel" else stored), name
        assert not re.search(r"\b(STL|LDL)\b", code), name
    # for each rule, binary or not, and SGD or Adam: 4 storages without a latent, 2 with one
    rows = [rule for rule in rules for _ in range(4 if rule.quantised else 2)]
    dynamic = sum(rule.dynamic_scale for rule in rows)
    assert found == {
        "step_kernel": sum(2 if rule.latent else 4 for rule in rows),
        "group_kernel": 2 * dynamic,
        "row_kernel": 2 * dynamic,
        "magnitude_kernel": dynamic,
    }


@needs_cuda_build
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code_of_products(arch: str) -> None:
    """Tensor cores, dp4a and 16-byte copies where they are meant to be, and no register in memory."""
    kernels = {
        name: code
        for name, code in kernels_of(arch).items()
        if re.search(r"binary_(mma|gemv|prepare|conv)_cu", name)
    }
    assert len(kernels) == 4 * len(SHAPES) + 3 + 16 + 16  # mma; gemv; what stands around them; convolutions
    for name, code in kernels.items():
        assert not re.search(r"\b(STL|LDL)\b", code), name
        if "gemv_kernel" in name:
            # two instructions per four weights: 128 of each for the 16 KiB of weights of a loop of a warp
            assert code.count("IDP.4A.U8.S8") >= 128, name
            assert len(re.findall(r"LDG\.E\.NA\S*\.128", code)) >= 8, name
        elif "mma_kernel" in name:
            tokens, _, _ = (*SHAPES, (64, 128, 256))[int(re.search(r"ELi(\d)E", name)[1])]  # type: ignore[index]
            multiply = "IMMA.16832.S8.S8" if "Bytes" in name else "HMMA.16816.F32"
            per_column_tile = 8 if "Bytes" in name else 16
            assert code.count(multiply) >= per_column_tile * tokens // 8, name
            assert len(re.findall(r"LDGSTS\S*\.128", code)) >= 4, name
            if "Floats" in name:  # (a & b) | c, for every pair of weights
                assert len(re.findall(r"LOP3\.LUT.*, 0xea,", code)) + len(re.findall(r"0xf8", code)) >= 64, (
                    name
                )


@needs_cuda_build
@pytest.mark.skipif("90" not in ARCHS, reason="not built for sm_90")
def test_wgmma_machine_code() -> None:
    """Hopper's products with W from registers, boxes copied by the copy engine, and no register in memory. setup.py
    stops where the compiler had to serialise the products or could not move registers between warpgroups."""
    kernels = [(name, code) for name, code in kernels_of("90a").items() if "wgmma_kernel" in name]
    assert len(kernels) == 3 * len(WGMMA_TOKENS)
    for name, code in kernels:
        assert not re.search(r"\b(STL|LDL)\b", code), name
        tokens = int(re.search(r"ELi(\d+)E", name)[1])  # type: ignore[index]
        bytes_ = "Bytes" in name
        multiply = (
            rf"{'IGMMA' if bytes_ else 'HGMMA'}\.64x{tokens}x{32 if bytes_ else 16}\S* R\d+, R\d+, gdesc"
        )
        assert len(re.findall(multiply, code)) == (8 if bytes_ else 16), (
            name
        )  # those of a block of K, once each
        # after two of each row half the oldest are waited for; all of them once, after the last
        waits = [int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code)]
        assert sorted(waits) == [0, *[1] * (2 if bytes_ else 4)], name
        assert code.count("UTMALDG.2D") >= 1 and code.count("USETMAXREG") == 2, name
        assert "LDG.E.128" in code, name


@needs_cuda_build
def test_build_stops_at_slow_code() -> None:
    """By what ptxas says; whole words of it, as it reports them."""
    text = (ROOT / "setup.py").read_text()
    pattern = re.compile(re.search(r'SLOW_CODE = re.compile\(r"(.*)", re.MULTILINE\)', text)[1], re.MULTILINE)  # type: ignore[index]
    for slow in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirements.",
    ):
        assert pattern.search(f"ptxas info    : 0 bytes gmem\n{slow}\n")[0] == slow  # type: ignore[index]
    assert not pattern.search("ptxas info    : Used 168 registers, used 16 barriers\nCompile time = 75.10 ms")
