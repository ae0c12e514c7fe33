"""The packages that decide results: their versions, said and recorded when long work starts, and the tested ranges."""

import platform
import sys
from importlib import metadata

from packaging.specifiers import SpecifierSet

# What the locked versions of requirements-cpu.lock and environment.yml stand for; `make test` ran with these
TESTED = {
    "torch": "==2.13.*",
    "transformers": "==5.17.*",
    "trl": "==1.16.*",
    "accelerate": "==1.15.*",
    "datasets": "==5.2.*",
    "peft": "==0.21.*",
    "numpy": ">=2.3,<2.5",
    "scikit-learn": "==1.9.*",
    "vllm": "==0.31.*",
    "deepspeed": "==0.19.*",
    "bitsandbytes": "==0.50.*",
}


def installed() -> dict[str, str]:
    """Version of each package of `TESTED` that is there."""
    found = {}
    for name in TESTED:
        for distribution in (name, f"{name}-cpu"):  # vLLM's build for CPUs has a name of its own
            try:
                found.setdefault(name, metadata.version(distribution))
            except metadata.PackageNotFoundError:
                continue
    return found


def untested(versions: dict[str, str]) -> list[str]:
    """One sentence for each version outside its tested range."""
    return [
        f"{name} {version} was not tested, {TESTED[name]} was: results may differ, or a private method that the "
        f"trainers override may have changed; pip install '{name}{TESTED[name]}'"
        for name, version in versions.items()
        if not SpecifierSet(TESTED[name]).contains(version, prereleases=True)
    ]


def announce(name: str) -> None:
    """Prints the versions in one line, and warnings on stderr. For the main process at the start of its work."""
    versions = installed()
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    print(f"{name}: Python {platform.python_version()}, {listed}", flush=True)
    for sentence in untested(versions):
        print(f"{name}: warning: {sentence}", file=sys.stderr, flush=True)
