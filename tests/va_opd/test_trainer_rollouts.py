"""`VAOPDTrainer`: prompts and rollouts: order, tokens that are never sampled, limits, the rollout engine."""

import copy
from types import SimpleNamespace

import pytest
import torch
from trl import DistillationTrainer
from va_opd_trainers import FAMILIES, fixed_rollouts, image_rows, models, prompt, response_logits, step

from common.evaluation.engines import never_sampled
from va_opd import _trl, checks
from va_opd.checks import sibling_fingerprints
from va_opd.engine import VLLMRollouts

# --- order of the prompts ----------------------------------------------------------------


def sampler(n: int, k: int = 3, prompts: int = 2, seed: int = 5, epoch: int = 0) -> _trl.EpochSampler:
    options = {"batch_size": prompts, "repeat_count": 2, "seed": seed}
    return _trl.EpochSampler(range(n), mini_repeat_count=k, epoch=lambda: epoch, **options)


def test_sampler_keeps_siblings_together_and_covers_each_epoch():
    order = list(sampler(8))
    assert len(order) == len(sampler(8)) == 8 * 3 * 2
    for start in range(0, len(order), 3):
        assert len(set(order[start : start + 3])) == 1
    for start in range(0, len(order), 12):  # each generation batch twice, for two accumulation steps
        assert order[start : start + 6] == order[start + 6 : start + 12]
    assert sorted(order) == sorted(list(range(8)) * 6)


def test_sampler_order_depends_on_seed_and_epoch_only():
    straight, epoch = sampler(8), iter(range(3))
    straight.epoch = lambda: next(epoch)
    epochs = [list(straight) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sampler(8, epoch=2)) == epochs[2]
    assert list(sampler(8, seed=6, epoch=2)) != epochs[2]


def test_the_trainers_sampler_is_of_its_settings(make):
    trainer = make(rows=image_rows(8), seed=3)
    drawn = list(trainer._get_train_sampler())
    assert drawn == list(trainer._get_train_sampler())
    trainer.state.epoch = 1.5
    assert drawn != list(trainer._get_train_sampler())
    trainer.state.epoch, trainer.args.seed = 0.5, 4
    assert drawn != list(trainer._get_train_sampler())
    trainer.shuffle_dataset = False
    assert list(trainer._get_train_sampler()) == [
        row for start in (0, 2, 4, 6) for row in [start] * 4 + [start + 1] * 4
    ]
    assert len(list(trainer._get_train_sampler(range(4)))) == len(drawn) // 2  # another data set than the trainer's


def test_an_epoch_leaves_out_the_prompts_that_fill_no_step(make):
    """As the paper's 655 updates do: 5 epochs of 2,101 prompts, 16 in each."""
    trainer = make(rows=image_rows(5), max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * 2  # of two prompts


def test_fingerprints_are_of_the_order_of_tokens_and_not_of_the_padding():
    def fingerprint(ids, width):
        pad = width - len(ids)
        batch = {"prompt_ids": [[99] * pad + ids], "prompt_mask": [[0] * pad + [1] * len(ids)]}
        return sibling_fingerprints({k: torch.tensor(v) for k, v in batch.items()})

    assert torch.equal(fingerprint([1, 2, 3], 3), fingerprint([1, 2, 3], 5))  # as on two ranks
    assert not torch.equal(fingerprint([1, 2, 3], 3), fingerprint([2, 1, 3], 3))


def test_siblings_that_were_reordered_are_noticed(make):
    trainer = make()
    inputs = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(RuntimeError, match="have different prompts or images"):
        step(trainer, inputs[::2] + inputs[1::2])
    size = inputs[0]["image"].size  # as many tokens: only the images tell the prompts apart
    same_question = [{**row, "prompt": prompt(0), "image": row["image"].resize(size)} for row in inputs]
    step(trainer, same_question)
    trainer._step = 0
    with pytest.raises(RuntimeError, match="have different prompts or images"):
        step(trainer, same_question[::2] + same_question[1::2])


def test_rollouts_of_a_base_model_end_with_their_turn(make):
    """`<|endoftext|>` is the only end that model and tokenizer declare, as in those that no chat was trained into."""
    student, teacher, processor = models()
    tokenizer = processor.tokenizer
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = make(parts=(student, teacher, processor), max_completion_length=64, temperature=1.0, top_p=1.0)
    _, _, (batch,) = step(trainer)
    rollouts = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert any(ids[-1] == turn_end for ids in rollouts)
    assert not any(turn_end in ids[:-1] for ids in rollouts)


# --- sampling ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_and_padded_rows_are_never_sampled(make, family):
    student, teacher, processor = models(family)
    tokens = len(processor.tokenizer)
    for model in (student, teacher):
        model.resize_token_embeddings(tokens + 9, mean_resizing=False)
    trainer = make(parts=(student, teacher, processor), family=family, temperature=1.0, top_p=1.0)
    placeholders = {trainer.model.config.image_token_id}
    placeholders |= {i for i in [getattr(trainer.model.config, "video_token_id", None)] if i is not None}
    banned = placeholders | set(range(tokens, tokens + 9))
    assert banned <= trainer.banned_ids
    assert trainer.banned_ids == set(never_sampled(processor, trainer.model.config))  # nor in evaluation
    assert processor.tokenizer.eos_token_id not in trainer.banned_ids

    boost = torch.zeros(tokens + 9)
    boost[sorted(banned)] = 30.0
    hook = trainer.model.get_output_embeddings().register_forward_hook(lambda m, a, out: out + boost)
    step(trainer)
    hook.remove()
    assert not banned & set(trainer.last_rollouts["completion_ids"][trainer.last_rollouts["mask"].bool()].tolist())


def test_what_opens_an_image_is_never_sampled_either():
    """Gemma 3n and later have tokens of their own for it and for the features of an image."""
    student, _, processor = models()
    tokens = {"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>"}
    other, ids = SimpleNamespace(tokenizer=processor.tokenizer, **tokens), processor.tokenizer.get_vocab()
    banned = checks.banned_ids(other, student.config)
    assert banned == checks.banned_ids(processor, student.config) | {ids["<|vision_start|>"]}
    assert banned == set(never_sampled(other, student.config))


def test_bans_add_to_the_callers_generation_settings(make):
    trainer = make(generation_kwargs={"no_repeat_ngram_size": 3})
    assert trainer.generation_config.no_repeat_ngram_size == 3
    assert set(trainer.generation_config.suppress_tokens) == trainer.banned_ids


def test_the_callers_own_bans_stay(make):
    free = min(set(range(20)) - make().banned_ids)
    trainer = make(generation_kwargs={"suppress_tokens": [free]})
    assert set(trainer.generation_config.suppress_tokens) == trainer.banned_ids | {free}


@pytest.mark.parametrize("use_vllm", [True, False])
def test_the_callers_options_lift_no_ban(use_vllm):
    student, _, processor = models()
    student.config.video_token_id = 30  # which this processor does not name
    kept = {"logit_bias": {30: 5.0, 40: 1.0}, "allowed_token_ids": [30, 40]} if use_vllm else {"suppress_tokens": [50]}
    args = SimpleNamespace(use_vllm=use_vllm, generation_kwargs=copy.deepcopy(kept))
    got, banned = checks.ban_tokens(args, processor, student), checks.banned_ids(processor, student.config)
    assert args.generation_kwargs == kept  # the caller's own
    assert {30, student.config.image_token_id} <= banned
    expected = {"suppress_tokens": sorted({50, *banned})}
    if use_vllm:
        expected = {"logit_bias": {40: 1.0, **dict.fromkeys(banned, -100.0)}, "allowed_token_ids": [40]}
    assert got.generation_kwargs == expected


def test_more_bans_than_vllm_takes_are_one_clear_sentence(monkeypatch):
    student, _, processor = models()
    args = SimpleNamespace(use_vllm=True, generation_kwargs=None)
    count = len(checks.banned_ids(processor, student.config))
    monkeypatch.setattr(checks, "MOST_BIASES", count)
    assert len(checks.ban_tokens(args, processor, student).generation_kwargs["logit_bias"]) == count
    monkeypatch.setattr(checks, "MOST_BIASES", count - 1)
    with pytest.raises(ValueError, match=f"{count} ids must not be sampled, .* at most {count - 1}: call resize"):
        checks.ban_tokens(args, processor, student)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (lambda t: [11, t.model.config.image_token_id, 12], "which stand for images or padding"),
        (lambda t: [11, t.model.config.video_token_id], "which stand for images or padding"),
        (lambda t: [], "rollout 3 is empty"),
    ],
)
def test_a_bad_rollout_of_the_engine_is_one_clear_sentence(make, monkeypatch, rollout, message):
    trainer = make()

    def generate(self, prompt_ids, *args, **kwargs):
        return [[11, 12] if row != 3 else rollout(trainer) for row in range(len(prompt_ids))]

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", generate)
    with pytest.raises(ValueError, match=message) as error:
        step(trainer)
    assert "rollout 3" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_over_the_limit_is_one_clear_sentence(make):
    with pytest.raises(ValueError, match=r"row 0 of train_dataset has \d+ tokens, above max_prompt_length=12"):
        step(make(max_prompt_length=12))


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_gap_to_the_engine_divides_soft_capped_logits_by_the_temperature(make, monkeypatch, softcap):
    """The engine has sampled by these very probabilities: the gap is 0."""
    fixed_rollouts(monkeypatch)
    trainer = make(temperature=0.7)
    trainer.model.config.get_text_config().final_logit_softcapping = softcap
    _, _, (batch,) = step(trainer)
    with torch.no_grad():
        logits = response_logits(trainer.model, batch)[..., : trainer.vocab_size]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logps = (logits / 0.7).log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    generation = SimpleNamespace(mode="server", generate=None, sync_weights=None)
    trainer.engine, trainer.top_p = VLLMRollouts(generation), 1.0
    trainer.engine.logps = [row[m.bool()].tolist() for row, m in zip(logps, batch["completion_mask"], strict=True)]
    assert trainer._engine_gap(batch) < 1e-5


def test_the_gap_to_the_engine_is_of_a_micro_batch_and_within_the_nucleus(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer, given, seen = make(bf16=True), [], set()
    _, _, (batch,) = step(trainer)
    layer = trainer.model.model.language_model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: seen.add((out.dtype, out.requires_grad)))
    trainer.args.per_device_train_batch_size, trainer.top_p = 3, 0.9

    def gap(logps, *options):
        given.append((len(logps), *options))
        return torch.tensor([0.25])

    trainer.engine = SimpleNamespace(gap=gap)
    assert trainer._engine_gap(batch) == 0.25
    assert given == [(int(batch["completion_mask"][:3].sum()), 3, 0.9)]
    assert seen == {(torch.bfloat16, False)}


@pytest.mark.parametrize(("training", "logged"), [(True, [0.5]), (False, [])])
def test_the_gap_to_the_engine_is_logged_in_training(make, monkeypatch, training, logged):
    """An evaluation has batches of another size."""
    trainer = make()
    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", lambda self, inputs: {})
    monkeypatch.setattr(trainer, "_score", lambda batch: {})
    monkeypatch.setattr(trainer, "_engine_gap", lambda batch: 0.5)
    trainer.engine = object()
    trainer.model.train(training)
    trainer._generate_and_score_completions([])
    assert [x for mode in ("train", "eval") for x in trainer._metrics[mode]["sampling/logps_gap"]] == logged


def test_the_batch_of_a_step_is_gone_when_the_next_rollouts_are_sampled(make, monkeypatch):
    """Beside the engine and the new batch its images and teacher states would take their room again."""
    fixed_rollouts(monkeypatch)
    held, generate = [], DistillationTrainer._generate_and_score_completions

    def record(self, inputs):
        held.append(self._buffered_inputs)
        return generate(self, inputs)

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", record)
    trainer = make(max_steps=2)
    trainer.train()
    assert held == [None, None]
    assert trainer._buffered_inputs
