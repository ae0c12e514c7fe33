"""`SRPOTrainer`: prompts, rewards and the routes of rollouts: donors, thresholds, what is left out."""

import math

import pytest
import torch
from srpo_trainers import always, mixed_reward, rows, step
from trl import GRPOTrainer

from srpo import objective
from srpo.reprompt import teacher_prompt_ids
from srpo.train import rollout_records


def test_prompts_keep_their_order_where_they_are_not_shuffled(make):
    trainer = make(data=rows(6), shuffle_dataset=False)
    assert list(trainer._get_train_sampler()) == [i for i in range(6) for _ in range(4)]
    assert list(make(data=rows(6))._get_train_sampler()) != list(trainer._get_train_sampler())


def test_the_order_of_prompts_is_trls_and_another_in_the_next_epoch(make):
    trainer = make(data=rows(12), routing="grpo", num_iterations=2, seed=5)
    first = list(trainer._get_train_sampler())
    assert first == list(GRPOTrainer._get_train_sampler(trainer))
    assert len(list(trainer._get_train_sampler(range(4)))) == len(first) // 3  # another data set than the trainer's
    trainer.state.epoch = 1.0
    second = list(trainer._get_train_sampler())
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("size", [8, 2])  # of a micro-batch: in some of two rows no token counts
def test_masked_truncated_rollouts_are_neither_scored_nor_trained(make, fixed, monkeypatch, size):
    """Every other rollout has no end of sequence; with `mask_truncated_completions` nothing of it counts."""
    whole = GRPOTrainer._generate_single_turn

    def cut(self, *args, **kwargs):
        rollouts, logps = whole(self, *args, **kwargs)
        return [[*ids[:-1], 20] if i % 2 else ids for i, ids in enumerate(rollouts)], logps

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", cut)
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    settings["reward"] = lambda completions, **columns: [1.0, 0.0, 0.0, 0.0] * 2
    trainer = make(mask_truncated_completions=True, **settings)
    loss, gradients = step(trainer)
    assert math.isfinite(loss)
    assert any(g.any() for g in gradients.values())
    assert trainer.last_rollouts["distill"].tolist() == [False, False, True, False] * 2
    assert trainer.last_rollouts["grpo"].tolist() == [True, False, False, False] * 2
    assert trainer._metrics["train"]["teacher/scored_over_needed"] == [1.0]
    lengths = [len(ids) for ids in trainer._rollouts["completion_ids"]]  # they have a length all the same
    assert trainer._metrics["train"]["length/wrong"] == [
        pytest.approx(sum(n for i, n in enumerate(lengths) if i % 4) / 6)
    ]


def test_a_lone_success_has_no_donor_and_is_trained_by_grpo(make, fixed):
    def lone(completions, **columns):
        return [float(i % 4 == 2) for i in range(len(completions))]

    trainer = make(reward=lone)
    step(trainer)
    assert trainer.last_rollouts["donor"].tolist() == [2, 2, -1, 2, 6, 6, -1, 6]
    assert trainer.last_rollouts["distill"].tolist() == [True, True, False, True] * 2
    assert trainer._metrics["train"]["route/lone_success"] == [0.25]


def test_random_demonstrations_are_correct_siblings_and_depend_on_the_seed(make, fixed):
    def three(completions, **columns):
        return [float(i % 4 != 0) for i in range(len(completions))]

    seen = set()
    for seed in range(8):
        trainer = make(reward=three, demonstration="random", seed=seed, shuffle_dataset=False)
        routing = objective.route(torch.tensor(three([None] * 8)), 4)
        donors = trainer._donors(routing).tolist()
        assert donors == trainer._donors(routing).tolist()
        assert donors[0] in (1, 2, 3)
        assert donors[4] in (5, 6, 7)
        seen.add(donors[0])
    assert seen == {1, 2, 3}
    seen = set()
    for trainer.state.global_step in range(20):  # and on the step
        seen.add(trainer._donors(routing)[0].item())
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("demonstration", ["first", "random"])
def test_the_donor_that_is_recorded_is_the_one_that_was_shown(make, fixed, monkeypatch, demonstration):
    shown = []

    def record(prompts, demonstrations, *args):
        shown.extend(demonstrations)
        return teacher_prompt_ids(prompts, demonstrations, *args)

    monkeypatch.setattr("srpo.trainer.teacher_prompt_ids", record)
    reward = [0.0, 1.0, 1.0, 1.0] * 2
    first = 0
    for seed in range(4):
        shown.clear()
        trainer = make(reward=lambda completions, **columns: reward, demonstration=demonstration, seed=seed)
        step(trainer)
        donors, texts = trainer.last_rollouts["donor"].tolist(), trainer.last_rollouts["texts"]
        assert [texts[donors[0]], texts[donors[4]]] == shown
        assert donors[1:4] == donors[5:] == [-1] * 3  # nothing was shown for them
        first += donors[0] == 1
    assert (first == 4) == (demonstration == "first")


@pytest.mark.parametrize(
    ("routing", "labels"),
    [
        ("srpo", ["grpo", "sdpo", "sdpo", "grpo"]),
        ("grpo", ["grpo"] * 4),
        ("sdpo", ["sdpo"] * 4),
        ("sdpo_incorrect", ["none", "sdpo", "sdpo", "none"]),
        ("sdpo_correct", ["sdpo", "none", "none", "sdpo"]),
        ("mix", ["grpo+sdpo"] * 4),
    ],
)
def test_routes_are_the_losses_that_a_rollout_has(make, fixed, routing, labels):
    """In the second group no rollout is correct: GRPO's, or none's."""
    trainer = make(routing=routing, reward=lambda completions, **columns: [1.0, 0.0, 0.0, 1.0, *[0.0] * 4])
    step(trainer)
    labels = [*labels, *["grpo" if routing in ("srpo", "grpo", "mix") else "none"] * 4]
    assert [record["route"] for record in rollout_records(trainer.last_rollouts, 8)] == labels
    metrics = trainer._metrics["train"]
    for name in ("grpo", "sdpo"):
        assert metrics[f"route/{name}"] == [sum(name in label for label in labels) / 8], name


def test_the_threshold_of_the_configuration_is_the_one_of_the_routes(make, fixed):
    rewards = [0.1, 0.3, 0.1, 0.6, *[0.1] * 4]
    for threshold, correct in ((0.2, [1, 3]), (0.5, [3]), (0.05, range(8)), (0.9, [])):
        trainer = make(reward=lambda completions, **columns: rewards, reward_threshold=threshold)
        step(trainer)
        distilled = [i in (0, 1, 2) and i not in correct and 3 in correct for i in range(8)]
        assert trainer.last_rollouts["distill"].tolist() == distilled, threshold
        assert trainer._metrics["train"]["route/correct"] == [len(correct) / 8]


def test_weights_of_reward_functions_count_for_the_routes(make, fixed):
    """One that does not apply to a rollout, None, adds nothing to it."""
    rewards = [lambda completions, **columns: [0.0, 0.0, 1.0, 0.0] * 2, always(1.0)]
    trainer = make(reward=[*rewards, lambda completions, **columns: [None, 0.0] * 4], reward_weights=[1, 0.2, 3])
    step(trainer)
    assert trainer.last_rollouts["rewards"].tolist() == pytest.approx([0.2, 0.2, 1.2, 0.2] * 2)
    assert trainer.last_rollouts["distill"].tolist() == [True, True, False, True] * 2


@pytest.mark.parametrize(
    ("count", "settings", "warns"),
    [
        (2, {}, True),
        (2, {"reward_weights": [1.0, 0.0]}, False),
        (2, {"reward_weights": [1.0, 0.2]}, False),
        (2, {"reward_weights": [1.0, 0.5]}, True),
        (3, {"reward_weights": [1.0, 0.3, -0.3]}, True),
        (2, {"reward_threshold": 1.5}, False),
        (2, {"routing": "grpo"}, False),
        (1, {}, False),
    ],
)
def test_rewards_that_make_a_wrong_rollout_correct_are_warned_of(make, warned, count, settings, warns):
    make(reward=[mixed_reward, always(1.0), always(1.0)][:count], **settings)
    assert warned("set it, or reward_weights, so that only correct answers do") == warns


def test_the_results_of_tools_are_no_part_of_the_prompts_limit(make, fixed):
    """TRL's loop of tool calls generates again with the whole conversation as prompt."""
    trainer = make(max_prompt_length=30)
    trainer._new_prompts = ["Q"] * 8
    trainer._generate_single_turn([[11] * 30] * 8, None, {}, 4)
    trainer._generate_single_turn([[11] * 35] * 8, None, {}, 1)
    step(trainer)  # a first turn again, which is checked
    with pytest.raises(ValueError, match="max_prompt_length=5"):
        step(make(max_prompt_length=5))
