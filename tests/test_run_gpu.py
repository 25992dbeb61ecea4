"""The logic of bench/run_gpu.sh, with fakes in place of the GPU, its tools and Python."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "run_gpu.sh"
SANITIZED = ("memcheck", "memcheck-gemm", "racecheck", "racecheck-gemm")
PARTS = ("build", "tests-wgmma", "tests", "tests-triton", "step", *SANITIZED, "ncu", "gemm", "conv", "wgmma")
# Writes down the limit, the switch and the command, and ends as $FAKE_CODE where the command matches $FAKE_MATCH.
TIMEOUT = """#!/usr/bin/env bash
echo "$3 QUANTOPT_WGMMA=${QUANTOPT_WGMMA:-} ${*:4}" >>"$FAKE_LOG"
[[ -n ${FAKE_MATCH:-} && "${*:4}" == *$FAKE_MATCH ]] && exit "$FAKE_CODE"
exit 0
"""


def run(
    folder: Path, absent: tuple[str, ...] = (), capability: str = "90", **variables: str
) -> tuple[int, list[str], list[str]]:
    """Exit status, lines of the summary, and limits and commands of the parts."""
    tools = folder / "bin"
    tools.mkdir()
    fakes = dict.fromkeys(("nvidia-smi", "compute-sanitizer", "ncu"), "#!/bin/sh\n")
    fakes |= {"python": f"#!/bin/sh\necho {capability}\n", "timeout": TIMEOUT}
    for name, body in fakes.items():
        if name not in absent:
            (tools / name).write_text(body)
            (tools / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "QUANTOPT_WGMMA"},
        "PATH": f"{tools}:/usr/bin:/bin",
        "PYTHON": str(tools / "python"),
        "FAKE_LOG": str(folder / "calls"),
        **variables,
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "logs")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    summary, calls = folder / "logs" / "summary.txt", folder / "calls"
    return (
        done.returncode,
        summary.read_text().splitlines()[2:] if summary.exists() else [],
        calls.read_text().splitlines() if calls.exists() else [],
    )


def test_every_part_runs_and_their_limits_fit_the_deadline(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path)
    assert code == 0, summary
    assert [line.split(":")[0] for line in summary] == list(PARTS)
    assert sum(int(call.split()[0]) for call in calls) < 525


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ("step", "bench/step.py --device cuda"),
        ("racecheck", "--tool racecheck *small_steps.py --brief"),
        ("wgmma", "--only wgmma --min-time *"),
    ],
)
@pytest.mark.parametrize(("status", "word"), [("124", "STOPPED"), ("137", "STOPPED"), ("3", "FAILED (3)")])
def test_a_part_that_fails_or_is_stopped_fails_the_script(
    tmp_path: Path, part: str, match: str, status: str, word: str
) -> None:
    code, summary, _ = run(tmp_path, FAKE_MATCH=match, FAKE_CODE=status)
    assert code == 1
    assert [line.split(":")[0] for line in summary] == list(PARTS)  # the others ran
    assert [line for line in summary if word in line] == [s for s in summary if s.startswith(f"{part}:")]


def test_an_absent_tool_fails_the_script(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, ("ncu",))
    if "ncu: ok" in "".join(summary):
        pytest.skip("ncu is installed here")
    assert code == 1 and "ncu: LEFT OUT, ncu is absent" in summary
    assert any("bench/gemm.py" in call for call in calls)


def test_no_gpu_fails_the_script(tmp_path: Path) -> None:
    code, _, calls = run(tmp_path, ("nvidia-smi",))
    assert code == 1 and not calls


def test_nothing_runs_without_a_build(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, FAKE_MATCH="build_ext *", FAKE_CODE="1")
    assert code == 1 and len(calls) == len(summary) == 1


def test_wgmma_that_fails_is_turned_off_for_the_rest(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, FAKE_MATCH="-k wgmma", FAKE_CODE="124")
    assert code == 1
    assert [line.split(":")[0] for line in summary] == list(PARTS)
    assert "tests-wgmma: STOPPED" in summary[1] and "wgmma: left out" in summary[-1]
    assert ["QUANTOPT_WGMMA=0 " in call for call in calls] == [False, False] + [True] * (len(PARTS) - 3)


def test_other_gpus_have_no_table_of_wgmma(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, capability="80")
    assert code == 0 and "wgmma: left out" in summary[-1]
    assert len(calls) == len(PARTS) - 1
