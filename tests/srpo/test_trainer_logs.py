"""`SRPOTrainer`: the figures that it logs against their definitions, evaluation, and the doctor's words."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from srpo_trainers import ROUTED, always, policy, response_logits, rows
from trl import GRPOTrainer

from srpo import doctor, objective


@pytest.mark.parametrize("routing", ROUTED)
def test_the_policys_entropy_on_the_tokens_that_the_loss_sees(make, fixed, routing):
    """At the rollouts' temperature, each token once, whatever the micro-batches."""
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make(routing=routing, temperature=0.6, max_steps=1, learning_rate=0.0, **batch)
    trainer.train()
    kept, values = trainer._rollouts, []
    advantages = objective.group_advantages(kept["rewards"], 4)
    for i, response in enumerate(kept["completion_ids"]):
        if trainer.last_rollouts["distill"][i] or (trainer.last_rollouts["grpo"][i] and advantages[i]):
            prompt = trainer._tokenizer.apply_chat_template(kept["prompts"][i], add_generation_prompt=True)
            with torch.no_grad():
                logits = response_logits(trainer.model, prompt["input_ids"], response, 0.6)
            values.append(torch.special.entr(logits.softmax(-1)).sum(-1))
    logged = [log["entropy"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [pytest.approx(torch.cat(values).mean().item(), rel=1e-4)]


@pytest.mark.parametrize("routing", ROUTED)
def test_a_figure_that_does_not_exist_is_left_out(make, fixed, routing):
    trainer = make(routing=routing, max_steps=1)
    trainer.train()
    (line,) = [log for log in trainer.state.log_history if "loss" in log]
    assert ("loss/grpo" in line) == (routing in ("srpo", "mix"))
    assert "loss/sdpo" in line and "entropy" in line
    trainer = make(routing=routing, max_steps=1, reward=always(0.0))  # no token has a loss
    trainer.train()
    (line,) = [log for log in trainer.state.log_history if "loss" in log]
    assert not {"loss/grpo", "loss/sdpo", "entropy"} & line.keys()
    assert all(value is not None for value in line.values())
    assert line["teacher/scored_over_needed"] == 1.0


def test_the_figures_of_a_step_are_of_its_own_tokens(make, fixed):
    """Also with steps before it: nothing of theirs is in a later mean."""

    def logged(data: list[dict[str, Any]], steps: int) -> list[list[float]]:
        trainer = make(data=data, max_steps=steps, learning_rate=0.0, shuffle_dataset=False)
        trainer.train()
        lines = [log for log in trainer.state.log_history if "loss" in log]
        return [[line[name] for name in ("entropy", "loss/grpo", "loss/sdpo")] for line in lines]

    both, (first,), (second,) = logged(rows(4), 2), logged(rows(4)[:2], 1), logged(rows(4)[2:], 1)
    assert both == [pytest.approx(first, rel=1e-4), pytest.approx(second, rel=1e-4)]
    assert second != pytest.approx(first, rel=0.01)


@pytest.mark.parametrize("routing", ["srpo", "mix"])
def test_an_evaluation_has_trls_loss_and_figures_of_its_own(make, fixed, routing):
    """`eval_loss` is TRL's whatever the routing, and nothing that training logs or shows is changed."""
    losses, batch = [], {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for name in ("grpo", routing):
        trainer = make(routing=name, max_steps=1, learning_rate=0.0, **batch)
        trainer.train()
        shown, before = trainer.last_rollouts, copy.deepcopy(dict(trainer._metrics["train"]))
        losses.append(trainer.evaluate(Dataset.from_list(rows(2)))["eval_loss"])
        assert trainer.last_rollouts is shown
        assert dict(trainer._metrics["train"]) == before
        assert {"eval_time/generation", "eval_time/reward"} <= trainer.state.log_history[-1].keys()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-7)


def test_figures_by_hand():
    routing = objective.route(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0]), 4)
    lengths = torch.arange(16)
    policy_rows = objective.grpo_rows(routing.distill)
    assert doctor.routing_figures(routing, routing.distill, policy_rows, lengths, 4) == {
        "route/correct": 7 / 16,
        "route/sdpo": 5 / 16,
        "route/grpo": 11 / 16,
        "route/teacher_available": 11 / 16,
        "route/lone_success": 1 / 16,
        "route/all_wrong_groups": 1 / 4,
        "route/all_correct_groups": 1 / 4,
        "length/correct": pytest.approx((0 + 3 + 8 + 9 + 10 + 11 + 14) / 7),
        "length/wrong": pytest.approx((1 + 2 + 4 + 5 + 6 + 7 + 12 + 13 + 15) / 9),
    }
    entropy, mask = torch.arange(12.0)[None], torch.arange(12)[None] < 11
    figures = doctor.weight_figures(entropy, 20 - 2 * entropy, mask)
    assert figures.pop("teacher/entropy") == 5
    assert figures == pytest.approx(
        {f"teacher/entropy_p{q}": q / 10 for q in (10, 50, 90)} | {f"weight_p{q}": q / 5 for q in (10, 50, 90)}
    )


def test_the_logged_distance_is_that_before_the_average_moves(make, fixed):
    trainer = make(max_steps=1)
    start = copy.deepcopy(dict(trainer.model.named_parameters()))
    trainer.train()
    gaps, sizes = zip(*((start[name] - p, p) for name, p in trainer.model.named_parameters()), strict=True)
    gap, size = (torch.cat([x.flatten() for x in parts]).norm().item() for parts in (gaps, sizes))
    (logged,) = [log["teacher/distance"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(gap / size, rel=1e-4)


def test_the_seconds_of_generation_are_those_of_all_turns(make, monkeypatch):
    """With tools TRL generates once a turn, and averages what is logged."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, *arguments: ([], None))
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0, 30.0, 38.0])
    trainer = make()
    # The name in the trainer's module and not the function in `time`, which other threads call too
    monkeypatch.setattr("srpo.trainer.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer.model.train()
    for turns in (3, 1):  # generation batches
        trainer._new_prompts = ["Q"]
        for _ in range(turns):
            trainer._generate_single_turn([[11]], None, {}, 4)
    assert trainer._metrics["train"]["time/generation"] == [1.0 + 2.0 + 4.0, 8.0]


def test_the_doctor_compares_lengths_with_those_of_the_first_log(capsys):
    state = SimpleNamespace(is_world_process_zero=True, global_step=50, log_history=[{doctor.LENGTH: 100.0}])
    for length in (30.0, 10.0):
        doctor.DoctorCallback(50).on_log(None, state, None, logs={"route/sdpo": 0.5, doctor.LENGTH: length})
        assert ("five times shorter" in capsys.readouterr().out) == (length == 10.0)


@pytest.mark.parametrize("every", [0, 1])
def test_the_doctor_can_be_turned_off(make, fixed, capsys, every):
    make(max_steps=1, doctor_steps=every).train()
    assert ("[doctor]" in capsys.readouterr().out) == bool(every)


def test_the_doctor_sees_the_collapse_of_sdpo(make, fixed, capsys):
    make(routing="sdpo", max_steps=1, doctor_steps=1, model=policy(sharp=1e4)).train()
    assert "entropy has collapsed" in capsys.readouterr().out
