"""A phase on two processes under ZeRO-2, ZeRO-3 and FSDP2 trains as on one. This file is also the program of each."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

from processes import PROCESSES, ZERO, assert_same_run, run, two_processes  # noqa: E402

from common import models  # noqa: E402
from common.lora import lora_config  # noqa: E402
from common.tiny import tiny_qwen3  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# `batch` is the batch of both ranks together. One update a generation batch, because TRL draws the rows of several on
# each rank; the paper's four are in the run that resumes
ONE_UPDATE = {"steps_per_generation": 1}
CASES: dict[str, dict[str, Any]] = {
    "challenger": {},
    "one prompt on both ranks": {"batch": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2},
    "heads that are not tied": {"policy": "untied"},
    "no reward on one rank": {"first_only": True},
    "no KL reference": {"beta": 0.0},
    "LoRA": {"lora": True},
    "greedy rollouts of its own": {"temperature": 1e-3},
}
COMPARED = ("loss", "grad_norm", "reward", "completions/mean_length")  # the loss holds the KL term


def reward(completions, row, **columns) -> list[float | None]:
    """Of the first letter; None, no gradient, for rows that are so marked."""
    return [None if mark is None else ord(c[0]["content"][0]) % 3.0 for c, mark in zip(completions, row, strict=True)]


def fixed_rollouts(monkeypatch) -> None:
    """Completions that depend on the prompt and the sibling's number only: 1 to 6 letters and an end of sequence."""
    from trl import GRPOTrainer

    def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        start, rollouts = len(prompt_ids) * self.accelerator.process_index, []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([sum(ids), (start + row) % num_generations])
            rollouts.append([*rng.integers(10, 100, rng.integers(1, 7)).tolist(), self._tokenizer.eos_token_id])
        return rollouts, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)


def save_policies(folder: Path) -> None:
    for kind in ("tied", "untied"):
        model, tokenizer = tiny_qwen3(hidden=32)
        if kind == "untied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
            model.config.tie_word_embeddings = False
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)


def train(folder: Path, settings: dict[str, Any], out: str, resume: bool = False) -> dict[str, Any]:
    """What each step logs, from the checkpoint of step four on with `resume`, and where the model is."""
    from r_diverse import ChallengerConfig, PhaseTrainer

    settings, quiet = dict(settings), {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    policy, batch = folder / settings.pop("policy", "tied"), settings.pop("batch", 8)
    adapter = lora_config(4) if settings.pop("lora", False) else None
    marks = [0, None if settings.pop("first_only", False) else 1] * settings.pop("pairs", 1)
    defaults = {
        "beta": 0.5,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "max_completion_length": 6,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "per_device_train_batch_size": batch // PROCESSES,
    }
    config = ChallengerConfig(str(folder / out), **{**defaults, **quiet, **settings})
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}" + "?" * i}], "row": mark} for i, mark in enumerate(marks)]
    # As in r_diverse.train, config and process group are there: from here on models are loaded in shards
    trainer = PhaseTrainer(
        models.load_model(str(policy)),
        reward,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=models.load_processor(str(policy)),
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=str(folder / out / "checkpoint-4") if resume else None)
    trainer.save_model(str(folder / out / "model"))
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "logs": [{n: line[n] for n in COMPARED if n in line} for line in lines],
        "model": str(folder / out / "model"),
    }


def all_cases(folder: Path) -> dict[str, Any]:
    """Also the program of a process."""
    results = {}
    for case, settings in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            if case != "greedy rollouts of its own":
                fixed_rollouts(patch)
            results[case] = train(folder, {**ONE_UPDATE, **settings}, case)
    return results


def program(folder: Path) -> dict[str, Any]:
    results = all_cases(folder)
    fixed_rollouts(pytest.MonkeyPatch())
    # Eight prompts for four updates of a generation batch
    four = {"pairs": 4, "max_steps": 8, "save_strategy": "steps", "save_total_limit": 2}
    runs = {"straight": train(folder, four, "four"), "resumed": train(folder, four, "four", resume=True)}
    return {**results, **runs}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    save_policies(folder)
    return all_cases(folder)


@pytest.mark.parametrize("sharding", [*ZERO, "fsdp2"])
def test_two_processes_train_as_one(sharding, single, tmp_path):
    save_policies(tmp_path)
    for rank in two_processes(__file__, tmp_path, sharding):
        for case, expected in single.items():
            assert_same_run(rank[case], expected, case)
        assert rank["resumed"]["logs"] == rank["straight"]["logs"]


if __name__ == "__main__":
    run(program)
