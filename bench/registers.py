"""Registers and spills of the CUDA kernels, as ptxas reported them when they were last built in this tree.

python bench/registers.py [PREFIX ...]     # of the names of the files in csrc/cuda, e.g. step
"""

import re
import subprocess
import sys
from pathlib import Path

from quantopt.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
STORAGE = ("float32", "bfloat16", "bfloat16, fp32 momentum", "any")
PATTERN = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def rule_name(match: re.Match[str]) -> str:
    """The name of RowOf<(Rule)1, true>."""
    rule = list(RULES.values())[int(match[1])]
    return rule.name + (" binary" if rule.quantised and match[2] == "true" else "")


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and the types of the arguments."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = []
    for name in text.splitlines():
        name = re.sub(r"quantopt::|\(anonymous namespace\)::|^void ", "", name)
        name = re.sub(r"\((quantopt::)?Storage\)(\d)", lambda match: STORAGE[int(match[2])], name)
        name = re.sub(r"RowOf<\(Rule\)(\d+), (true|false)>", rule_name, name)
        short.append(re.split(r">\(|\((?=LongTable|Counters)", name)[0])
    closed = [name + ">" if name.count("<") > name.count(">") else name for name in short]
    return [name.replace(" >", ">") for name in closed]


def main() -> None:
    prefixes = tuple(sys.argv[1:]) or ("",)
    logs = [log for log in ROOT.glob("build/*/cuda/*.log") if log.name.startswith(prefixes)]
    logs = [log for log in logs if (ROOT / f"csrc/cuda/{log.name.split('.')[0]}.cu").exists()]
    if not logs:
        sys.exit("registers.py: no compiler logs under build/; run make env with nvcc at hand")
    found: dict[str, dict[str, int]] = {}
    spilled = 0
    for log in sorted(logs):
        for name, arch, stored, loaded, registers in PATTERN.findall(log.read_text()):
            found.setdefault(name, {})[arch] = int(registers)
            spilled += int(stored) + int(loaded)
    archs = sorted({arch for per_arch in found.values() for arch in per_arch}, key=int)
    table: dict[str, dict[str, str]] = {}
    for name, per_arch in zip(readable(list(found)), found.values(), strict=True):
        storage = next((s for s in STORAGE if name.endswith(f", {s}>")), "")
        kernel = name.removesuffix(f", {storage}>") + ">" if storage else name
        table.setdefault(kernel, {})[storage] = " / ".join(str(per_arch.get(arch, "")) for arch in archs)
    columns = [s for s in (*STORAGE, "") if any(s in row for row in table.values())]
    print(f"Registers, sm_{' / sm_'.join(archs)}; {spilled} bytes spilled.\n")
    print("| kernel | " + " | ".join(s or "no storage" for s in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for kernel, row in sorted(table.items()):
        print(f"| `{kernel}` | " + " | ".join(row.get(s, "") for s in columns) + " |")


if __name__ == "__main__":
    main()
