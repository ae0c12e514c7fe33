"""The baselines CoT-SFT, KD and GRPO: the teacher's responses, the reward, what differs from VA-OPD."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import trl
from datasets import Dataset
from training_runs import Parrot, fails
from va_opd_trainers import image_rows, models, write_first_token

from common.evaluation import Completion
from common.runs import read_jsonl
from va_opd import baselines, data, evaluate, loop, train
from va_opd.checks import banned_ids
from va_opd.data import digit_rows


@pytest.mark.parametrize("method", ["sft", "kd", "grpo"])
def test_the_baselines_train_from_the_same_entry_point(config, method, tmp_path, monkeypatch):
    # Random models never answer right: let every other response count, so that sft has rows and grpo a signal
    counter = iter(range(10_000))
    monkeypatch.setattr(data, "digits_correct", lambda response, row: next(counter) % 2 == 0)
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot(model))
    assert train.main(["--config", str(config), "--method", method, "--max_steps", "2"]) == 0
    run = tmp_path / f"runs/va_opd/small/{method}-seed0"
    assert (run / "model" / "model.safetensors").exists()
    assert any("loss" in line for line in read_jsonl(run / "metrics.jsonl"))
    if method == "sft":
        sampled = read_jsonl(tmp_path / "runs/va_opd/small/teacher-seed0/responses.jsonl")
        assert len({record["id"] for record in sampled}) == 64


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_options_of_the_chat_template_are_refused_where_trl_drops_them(config, capsys, method):
    said = fails(train, capsys, config, "--method", method, "--chat_template_kwargs", '{"enable_thinking": false}')
    assert f"method {method} cannot have chat_template_kwargs={{'enable_thinking': False}}" in said


# --- the teacher's responses ---


@pytest.mark.parametrize(("method", "complete"), [("sft", 64), ("kd", 0)])
def test_a_teacher_without_a_usable_response_is_said(config, capsys, monkeypatch, method, complete):
    monkeypatch.setattr(Parrot, "finish_reason", "stop" if complete else "length")
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot("wrong"))
    said = fails(train, capsys, config, "--method", method)
    assert f"method {method} has nothing to train on: of the teacher's 64 responses {complete} are complete" in said


def test_truncated_responses_of_the_teacher_teach_nothing(config, monkeypatch):
    class Cut(Parrot):
        def generate(self, prompts, decoding, seeds):
            return [Completion(f"{seed}", 1, "length" if seed % 4 == 0 else "stop") for seed in seeds]

    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Cut("teacher"))
    args, settings = train.parse(["--config", str(config), "--method", "kd"])
    rows = data.teacher_rows(args, settings, train.load_splits_of(args)["train"])
    assert [row[0]["content"] for row in rows["completion"]] == [str(i) for i in range(64) if i % 4]


def test_rows_with_the_same_id_have_no_responses_of_their_own(config):
    args, settings = train.parse(["--config", str(config), "--method", "kd"])
    rows = train.load_splits_of(args)["train"].select([0, 1, 2, 1])
    with pytest.raises(ValueError, match="has 2 rows with the id 'train-1': give each its own"):
        data.teacher_rows(args, settings, rows)


def test_responses_are_sampled_by_a_process_of_its_own(config, capsys, monkeypatch):
    """Among the processes of a launcher an engine would join their process group, and end it."""
    made, several = [], {"main_process_first": nullcontext, "is_main_process": True}
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: made.append(Parrot(model)) or made[-1])
    with monkeypatch.context() as patch:
        patch.setattr(train, "PartialState", lambda: SimpleNamespace(**several))
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=2, **several))
        patch.setattr(train, "train", lambda args, config: data.teacher_rows(args, config, rows))
        rows = train.load_splits_of(train.parse(["--config", str(config)])[0])["train"]
        said = fails(train, capsys, config, "--method", "kd")
        assert "lacks 64 of 64 responses" in said and "--sample_only true" in said and not made
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=1, **several))
        assert train.main(["--config", str(config), "--sample_only", "true"]) == 0
        assert len(made) == 1 and made[0].closed
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=2, **several))
        assert train.main(["--config", str(config), "--method", "kd"]) == 0
    assert len(made) == 1
    args, _ = train.parse(["--config", str(config)])
    stages = loop.plan(["--config", str(config)], args, ["opd", "kd", "sft"], ["0", "1"], ["launch"])
    sampled = [command for name, command in stages[0] if name.startswith("teacher-seed")]
    assert [command[command.index("--seed") + 1] for command in sampled] == ["0", "1"]
    assert all("launch" not in command and "--sample_only" in command for command in sampled)
    for variant, samples in (("opd", False), ("sft", True), ("kd", True)):
        commands = [command for stage in loop.plan([], args, [variant], ["0"], []) for _, command in stage]
        assert any("--sample_only" in command for command in commands) is samples


def test_the_teachers_responses_are_not_reused_for_other_settings(config, tmp_path, tiny_models, monkeypatch):
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot(model))
    cache = tmp_path / "runs/va_opd/small/teacher-seed0/responses.jsonl"

    def sample(*fields: str) -> list:
        args, settings = train.parse(["--config", str(config), "--method", "kd", *fields])
        return read_jsonl(data.sample_teacher(args, settings, train.load_splits_of(args)["train"]))

    sampled = sample()
    cache.write_text("".join(json.dumps(record) + "\n" for record in sampled[:40]))  # interrupted
    assert sample() == sampled and sample("--method", "sft") == sampled and len(sampled) == 64
    for name, other in {
        "teacher": tiny_models["student"],
        "temperature": "0.9",
        "top_p": "0.5",
        "max_completion_length": "5",
        "template": "Please: {problem}",
        "max_pixels": "1000",
        "limit": "32",
    }.items():
        with pytest.raises(ValueError, match=f"teacher-seed0 holds results of {name}=.*move the folder away"):
            sample(f"--{name}", other)
    with monkeypatch.context() as patch:
        patch.setattr(data, "weights_of", lambda **models: dict.fromkeys(models, "other"))
        with pytest.raises(ValueError, match="teacher-seed0 holds results of weights of teacher=.*move the folder"):
            sample()
        patch.undo()
        patch.setattr(data, "folders_of", lambda **models: dict.fromkeys(models, "other"))
        with pytest.raises(ValueError, match="holds results of config and tokenizer of teacher=.*move the folder"):
            sample()
    monkeypatch.setattr(train, "load_splits_of", lambda args: {"train": digit_rows("test", 64, seed=0)})
    with pytest.raises(ValueError, match="teacher-seed0 holds results of data="):
        sample()
    cache.with_name("settings.json").unlink()
    with pytest.raises(ValueError, match="no readable settings.json"):
        sample()


# --- the GRPO baseline ---


def grpo_trainer(config: Path, *fields: str):
    args, settings = train.parse(["--config", str(config), "--method", "grpo", *fields])
    return train.build_trainer(args, settings, train.load_splits_of(args))


def test_grpo_samples_no_image_token_and_loads_the_student_once(config, monkeypatch):
    loaded, load = [], train.models.load_model
    monkeypatch.setattr(train.models, "load_model", lambda name, **given: loaded.append(name) or load(name, **given))
    trainer = grpo_trainer(config, "--attn_implementation", "eager")
    banned = banned_ids(trainer.processing_class, trainer.model.config)
    assert set(trainer.generation_config.suppress_tokens) == banned and trainer.model.config.image_token_id in banned
    assert len(loaded) == 1
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "eager" and model.dtype == torch.float32


def test_the_grpo_baseline_differs_in_loss_and_reward_only(config):
    """EasyR1's loss and KL weight; optimizer, batch, sampling and seed are those of VA-OPD."""
    fields = ["--temperature", "0.6", "--top_p", "0.9", "--seed", "3", "--grpo_beta", "0.02"]
    own, (_, settings) = grpo_trainer(config, *fields).args, train.parse(["--config", str(config), *fields])
    assert (own.beta, own.epsilon, own.loss_type) == (0.02, 0.2, "grpo")
    for name in ("temperature", "top_p", "seed", "learning_rate", "num_generations", "max_completion_length"):
        assert getattr(own, name) == getattr(settings, name), name


def test_grpo_samples_no_image_token_under_vllm(config, monkeypatch):
    class Fake:
        def __init__(self, model, args, **given):
            self.model, self.args = model, args
            hooks = {"generate": None, "sync_weights": None, "_fix_param_name_to_vllm": None}
            self.use_vllm, self.vllm_generation = True, SimpleNamespace(**hooks, mode="colocate")

    monkeypatch.setattr(baselines, "ResumableGRPOTrainer", Fake)
    trainer = grpo_trainer(config, "--use_vllm", "true")
    options = trainer.args.generation_kwargs
    assert trainer.args.use_vllm and options["logit_bias"][trainer.model.config.image_token_id] == -100.0
    assert not options.keys() & {"allowed_token_ids", "suppress_tokens"}
    assert not trainer.args.vllm_importance_sampling_correction  # at top-p 0.95 it would punish length


def test_a_resumed_grpo_sees_the_prompts_of_the_uninterrupted_one(config):
    def order(epoch: float | None) -> list[int]:
        trainer = grpo_trainer(config)
        sampler = trainer._get_train_sampler()
        trainer.state.epoch = epoch
        return list(sampler)

    assert order(None) == order(0.5) != order(1.0) == order(1.75)
    own = {name for name, value in vars(baselines.ResumableGRPOTrainer).items() if callable(value)}
    assert own == {"__init__", "_get_train_sampler", "_get_per_token_logps_and_entropies"}
    assert all(hasattr(trl.GRPOTrainer, name) for name in own)


def test_a_token_in_front_of_the_templates_own_moves_no_image_in_grpo(tmp_path):
    """Of the loss and of the KL reference."""
    student, _, processor = models("gemma3")
    write_first_token(processor)
    seen = []

    def look(module, arguments, given):
        if given["input_ids"].size(1) > 1 and given.get("past_key_values") is None:  # none of generation's own passes
            seen.append((given["token_type_ids"], given["input_ids"] == student.config.image_token_id))

    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    trainer = baselines.ResumableGRPOTrainer(
        student,
        lambda completions, **columns: [float(i) for i in range(len(completions))],
        args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", **settings),
        train_dataset=Dataset.from_list(image_rows(1)),
        processing_class=processor,
    )
    trainer.generation_config.suppress_tokens = sorted(banned_ids(processor, student.config))
    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    assert seen and all(torch.equal(types == 1, images) for types, images in seen)


def test_grpo_refuses_a_reference_that_would_lack_the_students_adapter(config, tmp_path, tiny_models):
    base = train.models.load_model(tiny_models["student"])
    adapter = tmp_path / "adapter"
    peft.get_peft_model(base, train.lora_config(2)).save_pretrained(adapter)
    train.models.load_processor(tiny_models["student"]).save_pretrained(adapter)
    with pytest.raises(ValueError, match="holds a LoRA adapter, but TRL would load the KL reference"):
        grpo_trainer(config, "--model", str(adapter))


def test_the_reward_is_of_the_answer_that_evaluation_scores():
    args = train.ScriptArguments(model="s", teacher="t", dataset="geo3k")
    rows = [{"id": "0", "prompt": [], "images": [], "answer": "3"}]
    score, reward = evaluate.benchmark_of(args, rows).score, data.reward_of(args)
    boxed = ((r"\boxed{3}. No, \boxed{4}", 1.0), (r"\boxed{4}. No, \boxed{3}", 0.0))
    for text, right in (*boxed, ("none", 0.0), ("x = 3", 1.0), ("4", 0.0), ("3. Answer: 4", 0.0)):
        message = [{"role": "assistant", "content": text}]
        assert reward([text], answer=["3"]) == reward([message], answer=["3"]) == [score(text, rows[0])] == [right]


def test_another_answer_than_a_gold_that_cannot_be_read_is_wrong_as_in_evaluation():
    """And not left out of its group, which would have one reward, 1, and no gradient."""
    args = train.ScriptArguments(model="s", teacher="t", dataset="geo3k")
    row = {"id": "0", "prompt": [], "images": [], "answer": "Na^+"}
    score, responses = evaluate.benchmark_of(args, [row]).score, [r"\boxed{Na^+}", r"\boxed{7}", "Na^+", "none"]
    rewards = data.reward_of(args)(responses, answer=[row["answer"]] * 4)
    assert rewards == [score(response, row) for response in responses] == [1.0, 0.0, 1.0, 0.0]
