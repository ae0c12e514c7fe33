"""One update in bf16 under ZeRO-2 and ZeRO-3, as the presets train. This file is also the program of each process."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import srpo_trainers as srpo_tests  # noqa: E402
import va_opd_trainers as va_opd_tests  # noqa: E402
from processes import PROCESSES, ZERO, run, two_processes  # noqa: E402

from common import models  # noqa: E402
from common.tiny import tiny_qwen3, tiny_qwen3_vl  # noqa: E402

BATCH = 8 // PROCESSES
SETTINGS = {"max_steps": 1, "bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": BATCH}


def frequencies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}


def va_opd_models(folder: Path) -> list[nn.Module]:
    parts = [models.load_model(str(folder / name)) for name in ("student", "teacher")]
    processor = models.load_processor(str(folder / "student"))
    trainer = va_opd_tests.build(folder / "va_opd", parts=(*parts, processor), **SETTINGS)
    trainer.train()
    return [trainer.model, trainer.teacher_model]


def srpo_models(folder: Path) -> list[nn.Module]:
    parts = models.load_model(str(folder / "policy")), models.load_processor(str(folder / "policy"))
    rows, reward = srpo_tests.rows(2), srpo_tests.mixed_reward
    trainer = srpo_tests.build(folder / "srpo", rows, reward, parts, **SETTINGS)
    trainer.train()
    return [trainer.model, trainer.teacher.model]


def r_diverse_models(folder: Path) -> list[nn.Module]:
    from datasets import Dataset

    from r_diverse import ChallengerConfig, PhaseTrainer

    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "max_completion_length": 6}
    trainer = PhaseTrainer(
        models.load_model(str(folder / "policy")),
        lambda completions, **columns: [float(i % 2) for i in range(len(completions))],
        ChallengerConfig(str(folder / "r_diverse"), steps_per_generation=1, **quiet, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"Q{i}"}]} for i in range(2)]),
        processing_class=models.load_processor(str(folder / "policy")),
    )
    trainer.train()
    return [trainer.model, trainer.ref_model]


def program(folder: Path) -> dict[str, Any]:
    from srpo import SRPOConfig

    # As in the entry points, a config is there before a model is loaded: from here on they are loaded in shards
    keep = SRPOConfig(str(folder), use_cpu=True, bf16=True)
    srpo_tests.fixed_rollouts(pytest.MonkeyPatch())
    va_opd_tests.fixed_rollouts(pytest.MonkeyPatch())
    made = {method.__name__: method(folder) for method in (va_opd_models, srpo_models, r_diverse_models)}
    del keep
    return {name: [frequencies(model) for model in of_method] for name, of_method in made.items()}


def save_models(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The models from which the processes start; their frequencies."""
    made = {"student": tiny_qwen3_vl(hidden=32), "teacher": tiny_qwen3_vl(hidden=64), "policy": tiny_qwen3(hidden=32)}
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(folder / name)
    return {name: frequencies(model) for name, (model, _) in made.items()}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", ZERO)
def test_an_update_in_bf16_leaves_the_models_functions_as_they_are(sharding, tmp_path):
    exact = save_models(tmp_path)
    expected = {
        "va_opd_models": [exact["student"], exact["teacher"]],
        "srpo_models": [exact["policy"]] * 2,
        "r_diverse_models": [exact["policy"]] * 2,
    }
    for rank in two_processes(__file__, tmp_path, sharding, mixed_precision="bf16"):
        assert rank.keys() == expected.keys()
        for method, of_models in rank.items():
            for got, wanted in zip(of_models, expected[method], strict=True):
                assert len(got) == len(wanted) > 0
                torch.testing.assert_close(list(got.values()), list(wanted.values()), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_vl])
@pytest.mark.parametrize("method", ["va_opd", "srpo", "r_diverse"])
def test_rounded_frequencies_are_made_anew_under_zero3_only(make, method, monkeypatch):
    module = importlib.import_module(f"{method}.rope")
    model, _ = make(hidden=32)
    exact = copy.deepcopy(frequencies(model))
    for path, buffer in frequencies(model).items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, buffer.bfloat16())
    module.exact_frequencies(model, None)
    assert {buffer.dtype for buffer in frequencies(model).values()} == {torch.bfloat16}
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    module.exact_frequencies(model, None)
    torch.testing.assert_close(frequencies(model), exact, rtol=0, atol=0)


if __name__ == "__main__":
    run(program)
