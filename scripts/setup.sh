#!/bin/sh
# Makes .venv: torch first (scripts/install_torch.py), then requirements-cpu.lock, then the project itself.
# `make` calls it when .venv is missing, unfinished or older than the lock. PYTHON=python3.12 names the Python to use.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*"; }
fail() { say "setup: $*" >&2; exit 1; }

usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

pick_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        usable "$candidate" && say "$candidate" && return
    done
    fail "needs Python 3.11 to 3.14 with venv, and found none as ${PYTHON:-python3 or python3.NN};" \
        "name one: make setup PYTHON=/path/to/python (Debian and Ubuntu: the package python3-venv too)"
}

# .made-by-make marks a folder that may be replaced; .complete, written last, one that is ready.
[ ! -e .venv ] || [ -e .venv/.made-by-make ] ||
    fail ".venv was not made by make; move it away, or use it as it is: make test PY=.venv/bin/python"
if [ ! -e .venv/.complete ]; then
    python=$(pick_python)
    say "setup: .venv with $("$python" --version) ($python)"
    rm -rf .venv
    mkdir .venv && touch .venv/.made-by-make
    "$python" -m venv .venv
fi
rm -f .venv/.complete
pip=".venv/bin/python -m pip --disable-pip-version-check"
.venv/bin/python scripts/install_torch.py
say "setup: the packages of requirements-cpu.lock"
$pip install --quiet -r requirements-cpu.lock
$pip install --quiet --no-deps --no-build-isolation -e .
touch .venv/.complete
say "setup: done"
