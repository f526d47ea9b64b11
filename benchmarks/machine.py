"""The machine that a benchmark's figures are of, in a line.

Every script of this folder prints it; `python benchmarks/machine.py` prints it alone.
"""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path


def describe_machine(*libraries: str) -> str:
    """Name processor, cores, memory, GPU where torch is at work, and the versions of these libraries."""
    facts = [_processor(), f"{os.cpu_count()} cores", f"{_memory_gib():.0f} GiB"]
    if torch := sys.modules.get("torch"):
        facts.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    return f"machine: {', '.join([*facts, f'Python {platform.python_version()}', *versions])}"


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_gib() -> float:
    """Of the machine, or of the container where that has less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, int(text) if text.isdigit() else whole) / 2**30


if __name__ == "__main__":
    print(describe_machine())
