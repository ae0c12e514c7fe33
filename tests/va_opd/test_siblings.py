"""Work in proportion to what is new: scoring from a cache of the prompt equals full passes, trimmed micro-batches
equal padded ones, and counts of passes and tokens that a later change must not raise unseen.
"""

import itertools
import math
from typing import Any

import peft
import pytest
import torch
import va_opd_trainers as tests
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DistillationTrainer

from benchmarks.va_opd_scoring import padded_inputs, trl_micro_batches
from va_opd import siblings

SHARED = ("qwen3_vl", "qwen2_5_vl", "llava")


# --- one prompt ----------------------------------------------------------------


def group(processor, images: list, lengths: list[int], width: int | None = None) -> dict[str, Any]:
    """A batch of siblings as TRL builds it: one prompt with `images`, padded on the left, rollouts of `lengths`."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    k = len(lengths)
    inputs = dict(processor(text=[text] * k, images=[images] * k if images else None, return_tensors="pt"))
    pad, width = 3, width or max(lengths) + 2

    def padded(value):
        return torch.cat([value.new_zeros(k, pad), value], 1)

    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.randint(10, 100, (k, width), generator=torch.Generator().manual_seed(0)) * mask
    batch = {
        "prompt_ids": padded(inputs.pop("input_ids")),
        "prompt_mask": padded(inputs.pop("attention_mask")),
        "completion_ids": ids,
        "completion_mask": mask,
        "num_images": [len(images)] * k,
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            value = torch.as_tensor(inputs.pop(name))
            inputs[name] = torch.cat([padded(value), value.new_zeros(k, width)], 1)
    return batch | inputs


@torch.no_grad()
def full_states(model, batch: dict[str, Any]) -> torch.Tensor:
    """(N, H): the same from one forward over whole padded rows, as TRL makes it."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keys = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "token_type_ids")
    fields = {key: batch[key] for key in keys if key in batch}
    hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False, **fields).last_hidden_state
    length = batch["completion_ids"].size(1)
    return hidden[:, -length - 1 : -1][batch["completion_mask"].bool()]


CASES = {
    "alike": (1, [5, 5, 5, 5]),
    "uneven": (1, [9, 1, 4, 8]),
    "one token each": (1, [1, 1]),
    "one sibling": (1, [6]),
    "three images": (3, [7, 3, 7]),
    "no image": (0, [2, 7, 5, 6]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", SHARED)
def test_states_from_a_cached_prompt_are_those_of_full_forwards(family, case):
    """In float64, so that only a wrong position, mask or row could differ by more than M-RoPE's float32."""
    _, teacher, processor = tests.models(family)
    teacher = teacher.double().eval()
    count, lengths = CASES[case]
    pictures = [tests.image(i, (40 + 8 * i, 40)) for i in range(count)]
    full_states(teacher, group(processor, [tests.image(9, (64, 32))], [3, 3]))  # leaves its own M-RoPE offset behind
    batch = group(processor, pictures, lengths)
    for pass_tokens in (math.inf, 1, 0):
        with torch.no_grad():
            got = siblings.sibling_hidden_states(teacher, [batch], pass_tokens)[0]
        torch.testing.assert_close(got, full_states(teacher, batch), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("family", SHARED)
def test_rounding_of_a_cached_prompt_is_that_of_full_forwards(family, dtype, bound):
    """Both are compared with float64: the cache may not be less exact than TRL's own forward, up to 1.5 times."""
    _, teacher, processor = tests.models(family)
    batch = group(processor, [tests.image(0)], [30, 12, 25, 29])
    truth = full_states(teacher.double(), batch)
    teacher = teacher.to(dtype)
    full = (full_states(teacher, batch).double() - truth).abs()
    with torch.no_grad():
        shared = (siblings.sibling_hidden_states(teacher, [batch])[0].double() - truth).abs()
    assert shared.mean() <= 1.5 * full.mean()
    assert shared.max() <= bound


# --- which models ----------------------------------------------------------------


def text_config(kind, **extra):
    return kind(vocab_size=32, hidden_size=32, num_hidden_layers=2, **extra)


def with_rope(kind: str):
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64} if kind == "longrope" else {"factor": 4.0}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    return Qwen3ForCausalLM(text_config(Qwen3Config, rope_parameters=parameters, max_position_embeddings=64))


def with_rope_of_a_kind_of_layer(kind: str):
    model = tests.models("gemma3")[1]
    model.config.text_config.rope_parameters["full_attention"]["rope_type"] = kind
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Qwen3ForCausalLM(text_config(Qwen3Config)), None),
        (lambda: MambaForCausalLM(text_config(MambaConfig)), "its forward takes no past_key_values"),
        (lambda: MistralForCausalLM(text_config(MistralConfig, sliding_window=8)), "DynamicSlidingWindowLayer"),
        (lambda: with_rope("dynamic"), "its rope_type is dynamic, which depends on the length"),
        (lambda: with_rope("longrope"), "its rope_type is longrope"),
        (lambda: with_rope("yarn"), None),
        (lambda: tests.models("gemma3")[1], "DynamicSlidingWindowLayer"),
        (lambda: with_rope_of_a_kind_of_layer("dynamic"), "its rope_type is dynamic"),
        *[(lambda family=family: tests.models(family)[1], None) for family in SHARED],
        (lambda: peft.get_peft_model(tests.models()[1], peft.LoraConfig(target_modules=["q_proj"])), None),
    ],
)
def test_refusal(model, reason):
    got = siblings.refusal(model())
    assert got is None if reason is None else reason in got


def forced(trainer, shared: bool):
    """A trainer that skips the check at its first batch."""
    trainer.teacher.shares = {True: shared, False: shared}
    return trainer


def records(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "va_opd.teacher"]


@pytest.mark.parametrize(("family", "shared"), [*((f, 1.0) for f in SHARED), ("gemma3", 0.0)])
def test_decision_is_made_once_and_logged(make, monkeypatch, caplog, family, shared):
    tests.fixed_rollouts(monkeypatch)
    trainer = make(family=family, max_steps=2)
    checked, refusal = [], siblings.refusal
    monkeypatch.setattr(siblings, "refusal", lambda model: checked.append(model) or refusal(model))
    trainer.train()
    assert len(checked) == 1
    assert [log["teacher/shared_prompts"] for log in trainer.state.log_history if "loss" in log] == [shared] * 2
    assert len(records(caplog)) == (0 if shared else 1)
    assert shared or "each rollout passes the teacher with its whole prompt: its cache has" in records(caplog)[0]


@pytest.mark.parametrize("wrong", ["position", "row"])
def test_a_model_that_reads_its_cache_wrongly_is_noticed(make, monkeypatch, caplog, wrong):
    """A shift of all positions by the image's M-RoPE offset, or siblings that read another cache: full passes then."""
    tests.fixed_rollouts(monkeypatch)
    expected = tests.step(forced(make(), False))
    trainer = make()
    forward = trainer.teacher_model.model.forward

    def broken(*args, **given):
        if given.get("past_key_values") is not None and wrong == "position":
            given["position_ids"] = given["position_ids"] + 7
        elif given.get("past_key_values") is not None:
            for layer in given["past_key_values"].layers:
                layer.values = layer.values.flip(-2)
        return forward(*args, **given)

    monkeypatch.setattr(siblings, "refusal", lambda model: None)  # it looks at the signature
    trainer.teacher_model.model.forward = broken
    got = tests.step(trainer)
    assert trainer.teacher.shares == {True: False}
    (message,) = records(caplog)
    assert "log-probabilities from a cache of the prompt differ by" in message
    tests.assert_same_step(got, expected)


def test_images_that_come_later_are_checked_too(make, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    trainer = make(rows=tests.mixed_rows(2), shuffle_dataset=False, per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    assert trainer.teacher.shares == {False: True, True: True}


def test_both_views_are_checked_on_a_prompt_with_an_image(make, monkeypatch):
    """The first prompt has none. Of a pass over the prompt with two views, the second may be the wrong one."""
    tests.fixed_rollouts(monkeypatch)
    trainer = make(rows=tests.mixed_rows(2), shuffle_dataset=False)
    checked, score = [], trainer.teacher.score

    def wrong(views, parts, shared, *others):
        checked.extend(parts)
        hidden, logps = score(views, parts, shared, *others)
        return hidden, [logps[0], *(x + shared for x in logps[1:])]

    monkeypatch.setattr(trainer.teacher, "score", wrong)
    tests.step(trainer)
    assert all(trainer.last_rollouts["images"][row] for row in checked[0])
    assert trainer.teacher.shares == {True: False}


@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_hundredth_of_a_nat_is_rounding_of_a_bfloat16_teacher_only(make, monkeypatch, dtype, shared):
    tests.fixed_rollouts(monkeypatch)
    student, teacher, processor = tests.models()
    trainer = make(parts=(student, teacher.to(dtype), processor))
    score = trainer.teacher.score

    def rounded(views, parts, shared, *others):
        hidden, logps = score(views, parts, shared, *others)
        return hidden, [x + 0.01 * shared for x in logps]

    monkeypatch.setattr(trainer.teacher, "score", rounded)
    tests.step(trainer)
    assert trainer.teacher.shares == {True: shared}


# --- the trainer's step ----------------------------------------------------------------


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 4), (2, 4), (1, 8)])
def test_shared_prompts_do_not_change_the_step(make, monkeypatch, family, batch, accumulation):
    """Micro-batches that split groups, prompts of different lengths, every other one without an image."""
    tests.fixed_rollouts(monkeypatch)
    settings = {
        "family": family,
        "rows": tests.mixed_rows(4),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    }
    shared, whole = (tests.step(forced(make(**settings), value)) for value in (True, False))
    tests.assert_same_step(shared, whole)


def test_sharded_teachers_see_one_pass_a_prompt_and_the_same_numbers(make, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    expected = tests.step(forced(make(), True))
    trainer = forced(make(), True)
    calls = count(trainer.teacher_model)
    monkeypatch.setattr(siblings, "MOST_TOKENS", 8)  # bounds no pass here: ranks would cut their rollouts differently
    monkeypatch.setattr("va_opd.teacher.is_deepspeed_zero3_enabled", lambda: True)
    tests.assert_same_step(tests.step(trainer), expected, 1e-5, 2e-5)
    assert calls["forwards"] == 2 * 2  # two prompts in both views: the prompt and its rollouts


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_trimmed_and_sorted_micro_batches_do_not_change_the_step(make, monkeypatch, accumulation):
    """Against TRL's shuffled micro-batches, padded to the generation batch's longest prompt and rollout."""
    tests.fixed_rollouts(monkeypatch)
    settings = {
        "rows": tests.mixed_rows(4),
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    expected = tests.step(make(**settings))
    monkeypatch.setattr(siblings, "trimmed_inputs", padded_inputs)
    monkeypatch.setattr(siblings, "length_sorted", trl_micro_batches)
    trainer = forced(make(**settings), False)
    tests.assert_same_step(tests.step(trainer), expected)


# --- counted work ----------------------------------------------------------------


def count(model) -> dict[str, int]:
    """Counts what passes a model from now on: forwards and tokens of the text tower, patches of the vision tower."""
    counts = {"forwards": 0, "tokens": 0, "patches": 0}

    def text(module, args, given):
        counts["forwards"] += 1
        counts["tokens"] += given["inputs_embeds"].shape[0] * given["inputs_embeds"].shape[1]

    def vision(module, args, given):
        counts["patches"] += len(args[0] if args else given["hidden_states"])

    model.model.language_model.register_forward_pre_hook(text, with_kwargs=True)
    model.model.visual.register_forward_pre_hook(vision, with_kwargs=True)
    return counts


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_each_image_and_prompt_passes_the_teacher_once_a_view(make, monkeypatch, accumulation):
    """Two prompts times four rollouts: a quarter of the patches of full forwards, whatever the micro-batches."""
    tests.fixed_rollouts(monkeypatch, length=6)
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = forced(make(rows=tests.image_rows(2), **settings), True)
    got = count(trainer.teacher_model)
    *_, batches = tests.step(trainer)
    prompts = sum(int(batch["prompt_mask"].sum()) for batch in batches) // 4
    patches = sum(int(batch["image_grid_thw"].prod(1).sum()) for batch in batches) // 4
    assert got == {"forwards": 2 * 2, "tokens": 2 * (prompts + 8 * 6), "patches": 2 * patches}

    whole = forced(make(rows=tests.image_rows(2), **settings), False)
    theirs = count(whole.teacher_model)
    tests.step(whole)
    assert theirs["patches"] == 4 * got["patches"]
    assert theirs["tokens"] >= 2 * (4 * prompts + 8 * 7)


def test_rows_without_an_image_pass_the_teacher_in_one_view(make, monkeypatch):
    tests.fixed_rollouts(monkeypatch, length=6)
    trainer = forced(make(rows=[{"prompt": tests.prompt(i)} for i in range(2)], weighting="none"), True)
    got = count(trainer.teacher_model)
    *_, (batch,) = tests.step(trainer)
    prompts = int(batch["prompt_mask"].sum()) // 4
    assert got == {"forwards": 2 * 2, "tokens": prompts + 8 * 6, "patches": 0}


def test_uneven_rollouts_cost_little_padding(make, monkeypatch):
    lengths = [3, 17, 60, 64, 50, 20, 5, 33]
    monkeypatch.setattr(
        DistillationTrainer, "_generate_single_turn", lambda self, *a: [[50] * (n - 1) + [2] for n in lengths]
    )
    trainer = forced(make(rows=tests.image_rows(2)), True)
    teacher, student = count(trainer.teacher_model), count(trainer.model)
    *_, batches = tests.step(trainer)
    prompts = sum(int(batch["prompt_mask"].sum()) for batch in batches)
    most = 2 * (prompts // 4 + sum(lengths) + len(lengths) * siblings.PASS_TOKENS["cpu"])
    assert teacher["tokens"] <= most < 2 * (prompts // 4 + 4 * (64 + 50))
    assert student["tokens"] == 8 * max(siblings.sequence_lengths(batches[0]))

    split = make(rows=tests.image_rows(2), per_device_train_batch_size=1, gradient_accumulation_steps=8)
    student = count(forced(split, True).model)
    tests.step(split)
    assert student["tokens"] == prompts + sum(lengths)  # no padding at all


def test_a_pass_over_rollouts_is_bounded(make, monkeypatch):
    """Four rollouts of 7 tokens have 56 in two views, but each counts with its prompt: one a pass, in both views."""
    tests.fixed_rollouts(monkeypatch, length=6)
    monkeypatch.setattr(siblings, "PASS_TOKENS", {"cpu": 1 << 20})
    monkeypatch.setattr(siblings, "MOST_TOKENS", 8 * 7)
    trainer, rows = forced(make(), True), set()
    trainer.teacher_model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: rows.add(len(given["inputs_embeds"])), with_kwargs=True
    )
    tests.step(trainer)
    assert rows == {2}


def test_bound_and_cost_of_a_pass_count_the_rollouts_of_all_views():
    _, teacher, processor = tests.models("qwen3_vl")
    batch, rows = group(processor, [tests.image(0)], [7, 7, 7, 7]), []
    teacher.model.language_model.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    with torch.no_grad():
        most = 4 * (int(batch["prompt_mask"][0].sum()) + 7)
        siblings.sibling_hidden_states(teacher.eval(), [batch, dict(batch)], 1 << 20, most)
    assert rows == [2, 4, 4]  # the prompt, then two rollouts at a time, in both views
    batch = group(processor, [tests.image(0)], [2, 10])
    siblings.sibling_hidden_states(teacher, [batch, dict(batch)], pass_tokens=12)
    assert rows[3:] == [2, 2, 2]  # 12 tokens for one more pass are less than 2 x 8 of padding


# --- parts ----------------------------------------------------------------


@pytest.mark.parametrize(("rows", "k", "ranks"), [(8, 4, 1), (8, 4, 2), (2, 4, 4), (3, 4, 4), (6, 4, 2), (1, 4, 8)])
def test_sibling_groups_cover_each_rank_and_are_equally_many(rows, k, ranks):
    groups = [siblings.sibling_groups(rows, k, rank, ranks) for rank in range(ranks)]
    assert len({len(parts) for parts in groups}) == 1
    for rank, parts in enumerate(groups):
        assert [row for part in dict.fromkeys(parts) for row in part] == list(range(rows))
        assert all(len({(rank * rows + row) // k for row in part}) == 1 for part in parts)


def test_cheapest_runs():
    assert siblings.cheapest_runs([5, 10, 9, 8, 1], 4) == [[1, 2, 3], [0, 4]]
    assert siblings.cheapest_runs([3, 3], 0) == [[0, 1]]
    assert siblings.cheapest_runs([1, 9, 5], math.inf) == [[1, 2, 0]]
    assert siblings.cheapest_runs([1, 9, 5], 0) == [[1], [2], [0]]
    assert siblings.cheapest_runs([4, 4, 9, 4], 99, most=8) == [[2], [0], [1, 3]]
    assert siblings.cheapest_runs([4, 4, 9, 4], 99, before=4, most=16) == [[2], [0], [1, 3]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 50))
def test_no_runs_are_cheaper(lengths, pass_tokens):
    def cost(runs):
        return sum(pass_tokens + len(run) * max(lengths[row] for row in run) for run in runs)

    runs = siblings.cheapest_runs(lengths, pass_tokens)
    order = [row for run in runs for row in run]
    assert sorted(order) == list(range(len(lengths)))
    assert sorted((lengths[row] for row in order), reverse=True) == [lengths[row] for row in order]
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        assert cost(runs) <= cost([order[a:b] for a, b in itertools.pairwise(edges)])


def test_micro_batches_are_of_like_length_the_longest_first():
    lengths = torch.tensor([3, 17, 60, 64, 50, 20, 5, 33])
    mask = (torch.arange(64) < lengths[:, None]).long()
    parts = siblings.length_sorted({"prompt_mask": torch.ones(8, 2).long(), "completion_mask": mask}, 4)
    assert [part["completion_mask"].sum(1).tolist() for part in parts] == [[64, 60], [50, 33], [20, 17], [5, 3]]


def test_take_rows_moves_images_with_their_rows():
    _, _, processor = tests.models()
    batch = group(processor, [tests.image(0), tests.image(1, (64, 32))], [2, 3, 4])
    batch["pixel_values"] = torch.arange(len(batch["pixel_values"]))[:, None]
    taken = siblings.take_rows(batch, [2, 0])
    patches = len(batch["pixel_values"]) // 3
    expected = [*range(2 * patches, 3 * patches), *range(patches)]
    assert taken["pixel_values"][:, 0].tolist() == expected
    assert taken["completion_mask"].sum(1).tolist() == [4, 2]
    assert len(taken["image_grid_thw"]) == 4


@pytest.mark.parametrize("multiple", [None, 16])
def test_trimmed_inputs_have_no_padding_inside(multiple):
    _, _, processor = tests.models()
    batch = group(processor, [tests.image(0)], [2, 9, 4], width=24)
    inputs, mask = siblings.trimmed_inputs(batch, multiple)
    longest = int(batch["prompt_mask"][0].sum()) + 9
    assert inputs["input_ids"].size(1) == (longest if multiple is None else -(-longest // 16) * 16)
    assert mask.sum(1).tolist() == [2, 9, 4]
    for row in range(3):
        tokens = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])
        real = torch.cat([batch["prompt_mask"][row], batch["completion_mask"][row]]).bool()
        attention = inputs["attention_mask"][row].bool()
        assert torch.equal(inputs["input_ids"][row][attention], tokens[real])
        assert torch.equal(attention, attention.sort().values)
        assert torch.equal(inputs["mm_token_type_ids"][row][attention], batch["mm_token_type_ids"][row][real])
        assert torch.equal(inputs["input_ids"][row][mask[row]], batch["completion_ids"][row][: [2, 9, 4][row]])
