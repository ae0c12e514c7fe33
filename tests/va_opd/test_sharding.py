"""Two processes under ZeRO-2, ZeRO-3 and FSDP2 train as one does. This file is also the program of each."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import va_opd_trainers as tests  # noqa: E402
from processes import PROCESSES, ZERO, assert_same_run, run, two_processes  # noqa: E402

from common import models  # noqa: E402
from common.lora import lora_config  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# `batch` is the batch of both ranks together
CASES: dict[str, dict[str, Any]] = {
    "two prompts": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    "one prompt on both ranks": {"batch": 4, "gradient_accumulation_steps": 2},
    "heads that are not tied": {"parts": "untied"},
    "rows that pad the vocabulary": {"parts": "padded"},
    "text only": {"rows": "text", "weighting": "none"},
    "LoRA": {"lora": True},
    "greedy rollouts of its own": {"top_k": 1},
}
MIXED = {"rows": "mixed", "num_generations": 2, "batch": 4}
COMPARED = ("loss", "grad_norm", "va/mean", "va/weight_max", "va/top10_mass", "completions/mean_length")


def rows(kind: str) -> list[dict[str, Any]]:
    if kind == "text":
        return [{"prompt": tests.prompt(i)} for i in range(4)]
    return tests.mixed_rows(2) if kind == "mixed" else tests.image_rows(4)


def save_models(folder: Path) -> None:
    """Student and teacher, tied as built, with a head of their own, and with rows that no token uses."""
    for kind in ("tied", "untied", "padded"):
        student, teacher, processor = tests.models()
        for name, model in (("student", student), ("teacher", teacher)):
            if kind == "untied":
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
                model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
            if kind == "padded":
                model.resize_token_embeddings(len(processor.tokenizer) + 9, mean_resizing=False)
            model.save_pretrained(folder / kind / name)
            processor.save_pretrained(folder / kind / name)


def train(folder: Path, settings: dict[str, Any], out: str, resume: bool = False) -> dict[str, Any]:
    """What each step logs, from the checkpoint of step two on with `resume`, and where the model is."""
    from va_opd import VAOPDConfig

    keep = VAOPDConfig(out, use_cpu=True, bf16=False)
    PartialState()
    settings = dict(settings)
    # As in va_opd.train, config and process group are there: while they are, models are loaded in shards
    parts, data = folder / settings.pop("parts", "tied"), rows(settings.pop("rows", "images"))
    loaded = [models.load_model(str(parts / name)) for name in ("student", "teacher")]
    adapter = lora_config(4) if settings.pop("lora", False) else None
    trainer = tests.build(
        folder / out,
        data,
        parts=(*loaded, models.load_processor(str(parts / "student"))),
        shuffle_dataset=False,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=settings.pop("batch", 8) // PROCESSES,
        peft_config=adapter,
        **settings,
    )
    del keep
    trainer.train(resume_from_checkpoint=str(folder / out / "checkpoint-2") if resume else None)
    trainer.save_model(str(folder / out / "model"))
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    logs = [{n: line[n] for n in COMPARED if n in line} for line in lines]
    return {"logs": logs, "model": str(folder / out / "model")}


def all_cases(folder: Path) -> dict[str, Any]:
    """Also the program of a process."""
    results = {}
    for case, settings in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            if case != "greedy rollouts of its own":
                tests.fixed_rollouts(patch)
            results[case] = train(folder, settings, case)
            if not results.get("resumed"):
                results["straight"] = results[case]
                results["resumed"] = train(folder, settings, case, resume=True)
    return results


def program(folder: Path) -> dict[str, Any]:
    results = all_cases(folder)
    with pytest.raises(
        ValueError, match=r"2 of the 4 rollouts of a step have images: rows with and without"
    ) as caught:
        train(folder, MIXED, "mixed")
    return results | {"mixed": str(caught.value)}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    save_models(folder)
    return all_cases(folder)


@pytest.mark.parametrize("sharding", [*ZERO, "fsdp2"])
def test_two_processes_train_as_one(sharding, single, tmp_path):
    save_models(tmp_path)
    for rank in two_processes(__file__, tmp_path, sharding):
        for case, expected in single.items():
            assert_same_run(rank[case], expected, case)
        assert rank["resumed"]["logs"] == rank["straight"]["logs"]


if __name__ == "__main__":
    run(program)
