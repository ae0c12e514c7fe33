"""DeepSpeed ZeRO-3 with two processes gives the run of one process. Also the program that each process runs.

Skipped without the `deepspeed` extra; on a CPU DeepSpeed compiles a part of itself on the first run (g++ and ninja).
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [folder for folder in (str(HERE), str(ROOT)) if folder not in sys.path]

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra"),
]

# Of two prompts only the first has routed rows, so that one rank has none; `step_batch` is the batch of both ranks
CASES = {
    "srpo": {},
    "micro-batches": {"step_batch": 4, "gradient_accumulation_steps": 2},
    "mix": {"routing": "mix"},
    "the policy as its own teacher": {"teacher": "current"},
    "frozen": {"teacher": "frozen", "routing": "sdpo"},
}
ZERO3 = """
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, zero3_init_flag: true, gradient_accumulation_steps: auto, gradient_clipping: 1.0}
mixed_precision: "no"
num_machines: 1
num_processes: 2
use_cpu: true
"""
COMPARED = (
    "loss",
    "grad_norm",
    "loss/grpo",
    "loss/sdpo",
    "entropy",
    "teacher/entropy",
    "teacher/distance",
    "teacher/scored_over_needed",
    "weight_p90",
    "route/sdpo",
)


def _trainer_tests():
    """The neighbouring file by its path: another folder has a file of the same name."""
    spec = importlib.util.spec_from_file_location("srpo_test_trainer", HERE / "test_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_prompt_only(completions, answer, **columns) -> list[float]:
    """1 and 0 in turn for the first prompt, zeros for the other."""
    return [float(i % 2 == 0 and a == 0) for i, a in enumerate(answer)]


def train(folder: Path, case: str, processes: int, resume: bool = False) -> list[dict[str, float]]:
    """What four steps log; from the checkpoint of step two on with `resume`."""
    from srpo import SRPOConfig, SRPOTrainer

    settings = dict(CASES[case])
    args = SRPOConfig(
        str(folder / f"{case}-{processes}"),
        per_device_train_batch_size=settings.pop("step_batch", 8) // processes,
        num_generations=4,
        max_steps=4,
        max_completion_length=6,
        learning_rate=1e-3,
        warmup_steps=0,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        shuffle_dataset=False,
        doctor_steps=0,
        **settings,
    )
    PartialState()  # as in srpo.train: before the model is loaded in shards
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    data = Dataset.from_list(_trainer_tests().rows(2))
    trainer = SRPOTrainer(model, first_prompt_only, args, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2" if resume else None)
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: line[name] for name in COMPARED if line.get(name) is not None} for line in lines]


def main(folder: Path) -> None:
    _trainer_tests().fixed_rollouts(pytest.MonkeyPatch())
    results = {case: train(folder, case, processes=2) for case in CASES}
    results["resumed"] = train(folder, "srpo", processes=2, resume=True)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero3")
    for part in _trainer_tests().policy():
        part.save_pretrained(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def sharded(folder) -> list[dict]:
    """Logs of both ranks for all cases, run once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings, log = folder / "zero3.yaml", folder / "log.txt"
    settings.write_text(ZERO3)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    words = [*launch, "--main_process_port", str(port), __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=280)
    assert done.returncode == 0, log.read_text()[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_under_zero3_equal_one(sharded, folder, monkeypatch, case):
    _trainer_tests().fixed_rollouts(monkeypatch)
    expected = train(folder, case, processes=1)
    assert len(expected) == 4
    assert any(entry["route/sdpo"] for entry in expected)
    for rank in sharded:
        for got, entry in zip(rank[case], expected, strict=True):
            assert got == pytest.approx(entry, rel=2e-4, abs=1e-6, nan_ok=True)


def test_a_sharded_run_resumes_with_its_teacher(sharded):
    for rank in sharded:
        assert [rank["resumed"][step] for step in (2, 3)] == rank["srpo"][2:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
