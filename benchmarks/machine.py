"""What a measurement ran on, written into every results file, what did not fit there, and how it is summed up."""

import datetime
import gc
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def machine(*packages: str) -> dict[str, Any]:
    """Date, processor, threads, Python, and versions of torch and of `packages`; None for one that is absent."""
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def processor() -> str:
    """Such as "2 cores of AMD EPYC"."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{os.cpu_count()} cores of {name}"


def synchronize() -> None:
    """Waits for the GPU, where there is one, so that a clock read next has all of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What `work` returns; None where the GPU's memory does not hold it, so that what comes next is still measured."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of memory: {error}", flush=True)
    gc.collect()  # what the work held, now that its frames are gone
    torch.cuda.empty_cache()
    return None
