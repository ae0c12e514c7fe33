"""What a measurement ran on, written into every results file."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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
