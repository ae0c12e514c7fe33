"""Two processes under ZeRO-2, ZeRO-3 and FSDP2 train as one does. This file is also the program of each."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import srpo_trainers as tests  # noqa: E402
from processes import PROCESSES, ZERO, assert_same_run, run, two_processes  # noqa: E402

from common import models  # noqa: E402
from common.lora import lora_config, sync_merged_weights  # noqa: E402
from srpo._trl import reshard_before_syncs  # noqa: E402
from srpo.checks import check_fsdp  # noqa: E402

pytestmark = pytest.mark.timeout(600)


def first_prompt_only(completions, answer, **columns) -> list[float]:
    """1 and 0 in turn for the first of two prompts, zeros for the other: one rank has no routed row."""
    return [float(i % 2 == 0 and a == 0) for i, a in enumerate(answer)]


# `batch` is the batch of both ranks together
CASES: dict[str, dict[str, Any]] = {
    "no routed row on one rank": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    "one prompt on both ranks": {"batch": 4, "gradient_accumulation_steps": 2},
    "no routed row at all": {"reward": tests.always(1.0)},
    "heads that are not tied": {"policy": "untied"},
    "mix": {"routing": "mix"},
    "the policy as its own teacher": {"teacher": "current"},
    "frozen": {"teacher": "frozen", "routing": "sdpo"},
    "LoRA": {"lora": True, "teacher": "frozen"},
    "LoRA and its average": {"lora": True},
    "greedy rollouts of its own": {"temperature": 1e-3},
}
COMPARED = (
    "loss",
    "grad_norm",
    "loss/grpo",
    "loss/sdpo",
    "entropy",
    "teacher/entropy",
    "teacher/distance",
    "route/sdpo",
)


def save_policies(folder: Path) -> None:
    for kind in ("tied", "untied"):
        model, tokenizer = tests.policy()
        if kind == "untied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
            model.config.tie_word_embeddings = False
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)


def train(folder: Path, settings: dict[str, Any], out: str, resume: bool = False) -> dict[str, Any]:
    """What each step logs, from the checkpoint of step two on with `resume`, and where the model is."""
    from srpo import SRPOConfig

    keep = SRPOConfig(out, use_cpu=True, bf16=False)
    PartialState()
    settings = dict(settings)
    # As in srpo.train, config and process group are there: while they are, models are loaded in shards
    policy = folder / settings.pop("policy", "tied")
    model = AutoModelForCausalLM.from_pretrained(policy)
    if settings.pop("changed", False):
        next(model.parameters()).ds_tensor.add_(1.0)
    lora = lora_config(4) if settings.pop("lora", False) else None
    trainer = tests.build(
        folder / out,
        tests.rows(2),
        settings.pop("reward", first_prompt_only),
        (model, AutoTokenizer.from_pretrained(policy)),
        learning_rate=1e-3,
        peft_config=lora,
        shuffle_dataset=False,
        per_device_train_batch_size=settings.pop("batch", 8) // PROCESSES,
        **settings,
    )
    del keep
    trainer.train(resume_from_checkpoint=str(folder / out / "checkpoint-2") if resume else None)
    trainer.save_model(str(folder / out / "model"))
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    logs = [{name: line[name] for name in COMPARED if line.get(name) is not None} for line in lines]
    average = sum(tensor.numel() for tensor in trainer.teacher.average.values())
    result = {"logs": logs, "model": str(folder / out / "model"), "averaged_here": average}
    if lora:
        result["sent"] = str(folder / out / f"sent-{trainer.accelerator.process_index}.pt")
        torch.save(sent_to_an_engine(trainer), result["sent"])
    return result


def sent_to_an_engine(trainer) -> dict[str, torch.Tensor]:
    """What a weight sync to vLLM sends from this process after an evaluation, which leaves weights whole under FSDP2;
    twice, since it must leave the weights as they are."""
    trainer.evaluate(trainer.train_dataset)
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.accelerator = trainer.model, trainer.accelerator
    generation._dist = DistributedBackend(trainer.accelerator)
    sync_merged_weights(generation)
    sent = []
    generation.sync_weights = lambda: sent.append({n: w.detach().clone() for n, w in generation._iter_named_params()})
    reshard_before_syncs(SimpleNamespace(use_vllm=True, vllm_generation=generation))
    for _ in range(2):
        generation.sync_weights()
    first, second = sent
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    return first


def sharded_teacher() -> str:
    """What cuts the teacher into shards in this process."""
    fsdp, zero3 = os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return "FSDP" if fsdp else "ZeRO-3" * zero3


def all_cases(folder: Path) -> dict[str, Any]:
    """Also the program of a process."""
    results = {}
    for case, settings in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            if case != "greedy rollouts of its own":
                tests.fixed_rollouts(patch)
            if case == "LoRA and its average" and (where := sharded_teacher()):
                with pytest.raises(ValueError, match=f"^teacher='ema' with LoRA does not run under {where}: use ZeRO"):
                    train(folder, settings, case)
                continue
            results[case] = train(folder, settings, case)
            if "resumed" not in results:
                results["straight"] = results[case]
                results["resumed"] = train(folder, settings, case, resume=True)
    if sharded_teacher() == "ZeRO-3":
        with pytest.raises(
            ValueError, match="^under ZeRO-3 the self-teacher is loaded .* weights are not the policy's"
        ):
            train(folder, {"changed": True}, "changed")
    return results


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    save_policies(folder)
    return all_cases(folder)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("sharding", [*ZERO, "fsdp2"])
def test_two_processes_train_as_one(sharding, single, tmp_path):
    save_policies(tmp_path)
    for rank in two_processes(__file__, tmp_path, sharding):
        assert len(single) - len(rank) == (sharding != "zero2")  # the case that is refused there
        for case, expected in ((case, single[case]) for case in single if case in rank):
            assert_same_run(rank[case], expected, case)
            if "sent" in expected:
                merged = dict(models.load_model(rank[case]["model"]).named_parameters())
                torch.testing.assert_close(torch.load(rank[case]["sent"]), {n: w.data for n, w in merged.items()})
        assert rank["resumed"]["logs"] == rank["straight"]["logs"]
        share = rank["straight"]["averaged_here"] / single["straight"]["averaged_here"]
        assert share == pytest.approx(1.0 if sharding == "zero2" else 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "^the self-teacher is sharded by FSDP 2 only: set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "^under FSDP every rank must load the policy, which the self-teacher"),
    ],
)
def test_what_fsdp_cannot_do_is_one_sentence(settings, message):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **settings})
    with pytest.raises(ValueError, match=message):
        check_fsdp(plugin)


if __name__ == "__main__":
    run(all_cases)
