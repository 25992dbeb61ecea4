"""Every kind of fused step once, on small tensors on the GPU, for compute-sanitizer; with --profile the main kernels on
large ones, for ncu.

    compute-sanitizer --tool memcheck python bench/small_steps.py
    ncu --clock-control none -k regex:_kernel python bench/small_steps.py --profile
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import step_cases

SHAPES = ((5, 13, 3), (129,), (0, 4), (8, 16), (7, 1031), (2, 5000))
PROFILED = (
    step_cases.Case("askew", 2, "sgd", "tensor"),
    step_cases.Case("askew", 2, "sgd", "tensor", step_cases.BF16, step_cases.BF16, seed=1),
    step_cases.Case("splitting", 2, "sgd", "tensor"),
    step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--brief", action="store_true", help="every eighth kind")
    arguments = parser.parse_args()
    profile = arguments.profile
    cases = PROFILED if profile else list(step_cases.all_cases())[:: 8 if arguments.brief else 1]
    for case in cases:
        for offset in (0,) if profile else (0, 1):
            inputs = step_cases.make(case, [(16384, 4096)] if profile else SHAPES, "cuda", offset)
            step_cases.op(inputs)
    torch.cuda.synchronize()
    print(f"{len(cases)} cases ran")


if __name__ == "__main__":
    main()
