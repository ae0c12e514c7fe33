"""What a measurement ran on (it is in every results file), its seconds and memory, and how they are summed up."""

import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
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
    """Cores and name of the processor, such as "2 cores of AMD EPYC"."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{os.cpu_count()} cores of {name}"


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result) of `work`. With a GPU these are wall seconds until all its work is done; else the processor's,
    of all threads together, to which other work on the machine does not add."""
    gpu = torch.cuda.is_available()
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if gpu else (time.process_time, lambda: None)
    wait()
    started = clock()
    result = work()
    wait()
    return clock() - started, result


def memory(field: str) -> int:
    """Bytes of this process under Linux: VmRSS is what is resident, VmHWM its high-water mark."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def in_own_process(work: Callable[..., T], *given: Any) -> T:
    """What `work(*given)` returns in a new process, whose memory is that of this work alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *given).result()


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What `work` returns; None if the GPU's memory was too small, so that what comes next is still measured."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of memory: {error}", flush=True)
    gc.collect()  # what the work held, now that its frames are gone
    torch.cuda.empty_cache()
    return None
