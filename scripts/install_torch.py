"""Installs the torch of requirements-cpu.lock into this Python's environment, a CPU build where no GPU could use more.

A Linux machine without NVIDIA GPU would get several GB of CUDA packages from a plain install. So there, in turn: what
pip's own settings offer as CPU build, the CPU build that uv knows to find, and only then the plain install.
"""

import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements-cpu.lock"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PINNED = ["-c", str(LOCK)]  # what torch brings along comes at the locked versions at once
UV = "uv==0.13.9"


def main() -> int:
    version = re.search(r"^torch==([\w.]+)", LOCK.read_text(), re.M).group(1)
    if installed() == version:
        return 0
    if platform.system() != "Linux" or has_nvidia_gpu():
        print(f"torch: {version}, the build for this machine", flush=True)
        return install_plain(version)
    print(f"torch: {version}, CPU build", flush=True)
    if quietly([*PIP, "install", "--quiet", *PINNED, f"torch=={version}+cpu"]) or install_with_uv(version):
        return 0
    print("torch: no CPU build to be had here; the CUDA build is coming instead, several GB", flush=True)
    return install_plain(version)


def installed() -> str | None:
    """Version of torch in this environment, without the part that names the build."""
    try:
        return metadata.version("torch").split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return False
    answer = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True)
    return answer.returncode == 0 and "GPU" in answer.stdout


def install_with_uv(version: str) -> bool:
    """With uv in the environment for this step only."""
    if not quietly([*PIP, "install", "--quiet", UV]):
        return False
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    done = quietly([*uv, "--torch-backend", "cpu", *PINNED, f"torch=={version}"])
    quietly([*PIP, "uninstall", "--quiet", "--yes", "uv"])
    return done


def install_plain(version: str) -> int:
    return subprocess.run([*PIP, "install", *PINNED, f"torch=={version}"]).returncode


def quietly(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
