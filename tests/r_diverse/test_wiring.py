"""Who is asked what in a run of two iterations: engines and rollouts are stubs that write down what they are given."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from common import models
from common.evaluation import Completion, Decoding, Prompt
from common.runs import read_jsonl
from common.tiny import tiny_qwen3
from r_diverse import MemoryBank, SkillEncoder, data, loop, reward, self_consistency, train, trainer
from r_diverse.config import PhaseConfig
from r_diverse.questions import PLAIN_TEMPLATE
from r_diverse.skills import Program
from r_diverse.train import EngineSolver, parse

M = 4  # answers a question
QUESTIONS = ("1+2", "3+4", "5*6", "7-8")  # of the rollouts, the same in every generation batch
FIELDS = {
    "experiment": "wiring", "iterations": 2, "m_reward": M, "m_label": M, "candidates": 16, "min_questions": 4,
    "low": 0, "high": 1, "question_temperature": 0.7, "question_top_p": 0.6, "question_tokens": 33,
    "answer_temperature": 0.9, "answer_top_p": 0.8, "answer_top_k": 7, "answer_tokens": 11, "benchmarks": "arithmetic",
    "eval_samples": 1, "eval_limit": 4, "challenger_system": "", "challenger_user": "new", "solver_system": "",
    "challenger.per_device_train_batch_size": 4, "challenger.max_steps": 8, "challenger.max_completion_length": 40,
    "solver.per_device_train_batch_size": 5, "solver.max_steps": 4, "solver.max_completion_length": 11,
    "challenger.logging_steps": 1, "solver.logging_steps": 1, "coder": "rules", "encoder": "minilm",
}  # fmt: skip
QUIET = {"learning_rate": 0.01, "disable_tqdm": True, "report_to": "none", "bf16": False}


class Table:
    """Coder and encoder: a question is its own program, its vector that of its sign."""

    name, dim = "table", 3

    def write(self, questions):
        return [Program(question) for question in questions]

    def encode(self, texts):
        return np.stack([np.eye(3)[next(("+*-".index(c) for c in text if c in "+*-"), 0)] for text in texts])


class Log:
    """Calls of engines as (iteration, stage, model, decoding, prompts, seeds), and the weights of each phase."""

    def __init__(self):
        self.calls, self.phases, self.stage = [], [], None

    def engine(self, model: str, run):
        def generate(prompts, decoding, seeds):
            texts = [prompt.messages[-1]["content"] for prompt in prompts]
            self.calls.append(
                SimpleNamespace(stage=self.stage, model=model, decoding=decoding, texts=texts, seeds=seeds)
            )
            return [Completion(_reply(text, seed), 5, "stop") for text, seed in zip(texts, seeds, strict=True)]

        return SimpleNamespace(name=model, generate=generate, template_options=run.chat_template_kwargs)

    def of(self, iteration: int, stage: str) -> list[SimpleNamespace]:
        found = [call for call in self.calls if call.stage == (iteration, stage)]
        assert found
        return found


def _reply(text: str, seed: int) -> str:
    if text == "new":
        return f"<question>{seed % 10}{'+*-'[seed % 3]}{seed % 7}</question>\\boxed{{1}}"
    return f"\\boxed{{{seed % 3}}}"


def weights(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def saved(path) -> str:
    return weights(models.load_model(str(path)))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Log, base and folder of a run; the real stages and trainers, with stubs where something is generated."""
    folder, log = tmp_path_factory.mktemp("wiring"), Log()
    base, out = folder / "base", folder / "out"
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    def rollouts(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        texts = [f"<question>{QUESTIONS[i % 4]}</question>\\boxed{{{i % 3}}}" for i in range(len(prompt_ids))]
        return [[*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id] for text in texts], None

    class Watched(trainer.PhaseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            path = Path(self.args.output_dir)
            start, reference = weights(self.model), weights(self.ref_model)
            log.phases.append(SimpleNamespace(folder=path, start=start, reference=reference, args=self.args))

    stage = loop.SelfPlay._stage

    def noted(self, t, name, inputs, work):
        log.stage = (t, name)
        return stage(self, t, name, inputs, work)

    def skills(run, cache, coder_url=None):
        return SkillEncoder(Table(), Table())

    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, train):
            patch.setattr(module, "local_engine", log.engine)
            patch.setattr(module, "skill_encoder", skills)
        patch.setattr(loop.SelfPlay, "_stage", noted)
        patch.setattr(trainer, "PhaseTrainer", Watched)
        patch.setattr(GRPOTrainer, "_generate_single_turn", rollouts)
        fields = {"model": base, "out": out, **FIELDS}
        fields |= {f"{phase}.{name}": value for phase in ("challenger", "solver") for name, value in QUIET.items()}
        config = folder / "empty.yaml"
        config.write_text("chat_template_kwargs: {enable_thinking: false}\n")
        assert loop.main(["--config", str(config), *(f"--{name}={value}" for name, value in fields.items())]) == 0
    return log, base, out / "r_diverse/wiring/r_diverse-seed0"


# --- models ---


def test_the_rewards_solver_is_the_one_of_the_iteration_before(played):
    log, base, root = played
    assert {call.model for call in log.of(1, "challenger")} == {str(base)}
    assert {call.model for call in log.of(2, "challenger")} == {str(root / "iteration_1/solver/model")}


def test_candidates_come_from_the_challenger_that_was_just_trained(played):
    log, base, root = played
    for t in (1, 2):
        assert {call.model for call in log.of(t, "generate_1")} == {str(root / f"iteration_{t}/challenger/model")}
    assert saved(root / "iteration_1/challenger/model") != saved(base)


def test_labels_come_from_the_solver_of_the_iteration_before(played):
    log, base, root = played
    assert {call.model for call in log.of(1, "label_1")} == {str(base)}
    assert {call.model for call in log.of(2, "label_1")} == {str(root / "iteration_1/solver/model")}


def test_what_is_evaluated(played):
    log, base, root = played
    expected = [str(base), *(str(root / f"iteration_{t}/solver/model") for t in (1, 2))]
    assert [log.of(t, "evaluate")[0].model for t in (0, 1, 2)] == expected


def test_each_phase_starts_from_its_own_last_weights_and_is_held_to_them(played):
    log, base, root = played
    assert [(phase.folder.parent.name, phase.folder.name) for phase in log.phases] == [
        (f"iteration_{t}", name) for t in (1, 2) for name in ("challenger", "solver")
    ]
    starts = [saved(base), saved(base), *(saved(root / f"iteration_1/{n}/model") for n in ("challenger", "solver"))]
    assert [phase.start for phase in log.phases] == starts
    assert [phase.reference for phase in log.phases] == starts  # KL to the model at the phase's start, not to the base
    assert len(set(starts)) == 3


# --- memory ---


def test_the_bank_of_a_challenger_holds_the_iterations_before(played):
    _log, _base, root = played
    bank = MemoryBank(root / "bank")
    first, second = (
        [line for line in read_jsonl(root / f"iteration_{t}/challenger/metrics.jsonl") if "challenger/bank" in line]
        for t in (1, 2)
    )
    assert {line["challenger/bank"] for line in first} == {0}
    assert {line["challenger/memory"] for line in first} == {0}
    assert {line["challenger/bank"] for line in second} == {bank.iterations[1]}
    assert all(line["challenger/memory"] > 0 for line in second)
    assert all(line["challenger/p_max"] > 0.5 for line in second)


# --- sampling ---


def test_the_answers_of_a_question_have_seeds_of_their_own_at_each_step(played):
    log, _base, _root = played
    seen: dict[str, list[set[int]]] = {}
    for t in (1, 2):
        calls = log.of(t, "challenger")
        assert len(calls) == 2  # generation batches
        for call in calls:
            asked = {
                text: {s for x, s in zip(call.texts, call.seeds, strict=True) if x == text} for text in call.texts
            }
            assert set(asked) == set(QUESTIONS)
            assert {len(seeds) for seeds in asked.values()} == {M}
            for text, seeds in asked.items():
                seen.setdefault(text, []).append(seeds)
    for batches in seen.values():  # two steps of two iterations
        assert len(set.union(*batches)) == 4 * M


def test_phases_and_rewards_have_seeds_of_their_own_in_every_run(tmp_path, monkeypatch):
    salts, seeds = [], []

    def stop(run, solver, *_):
        salts.append(solver.salt)
        raise InterruptedError

    for name in ("local_engine", "skill_encoder", "ready_to_compare"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(reward, "ChallengerReward", stop)
    for settings in (parse(["--model=m", f"--out={tmp_path}", f"--seed={seed}"]) for seed in (0, 1)):
        for t in (1, 2):
            with pytest.raises(InterruptedError):
                train.train_challenger(settings, t)
            seeds += [train.phase_config(settings, name, t).seed for name in train.PHASES]
    assert (len(set(salts)), len(set(seeds))) == (4, 8)


def test_a_question_with_a_lost_or_a_refused_answer_is_not_measured(monkeypatch):
    """A share of fewer answers, or of an empty one, would be another reward."""
    monkeypatch.setattr(train, "ready_to_compare", lambda: None)
    answer = Completion("\\boxed{1}", 1, "stop")
    replies = [answer, None, answer, Completion("", 0, "refused"), answer, answer]
    engine = SimpleNamespace(generate=lambda prompts, decoding, seeds: replies)
    solver = EngineSolver(engine, parse(["--model=m", "--m_reward=2"]).run, salt=0)
    assert solver(["lost", "refused", "fine"], seed=0) == [None, None, ["1", "1"]]


def test_candidates_of_two_iterations_have_other_seeds(played):
    log, _base, _root = played
    first, second = ({seed for call in log.of(t, "generate_1") for seed in call.seeds} for t in (1, 2))
    assert len(first) == len(second) == 16
    assert not first & second


def test_decoding_is_the_configs(played):
    log, _base, _root = played
    for t in (1, 2):
        for stage in ("challenger", "label_1"):
            assert {call.decoding for call in log.of(t, stage)} == {Decoding(0.9, 0.8, 11, 7)}
        assert {call.decoding for call in log.of(t, "generate_1")} == {Decoding(0.7, 0.6, 33, 0)}


def test_the_template_options_reach_phases_engines_and_records(played):
    log, base, root = played
    options = {"enable_thinking": False}
    assert [phase.args.chat_template_kwargs for phase in log.phases] == [options] * 4
    assert json.loads((root / "manifest.json").read_text())["config"]["chat_template_kwargs"] == options
    identity = json.loads((root / "iteration_2/evaluate/arithmetic/identity.json").read_text())
    assert identity["chat_template_kwargs"] == options
    run = parse([f"--model={base}", '--chat_template_kwargs={"enable_thinking": false}']).run
    assert train.local_engine(str(base), run).template_options == options


@pytest.mark.parametrize(("phase", "seconds"), [("challenger", 111), ("solver", 222)])
def test_processes_wait_as_long_as_the_phase_that_they_train_says(monkeypatch, phase, seconds):
    """torch.distributed is set up by the first of the two configurations that is made."""
    made, original = [], PhaseConfig._setup_devices.func

    def recorded(self):
        made.append(self.ddp_timeout)
        return original(self)

    monkeypatch.setattr(PhaseConfig, "_setup_devices", property(recorded))
    trained = lambda settings, *_: made.append(getattr(settings, phase).ddp_timeout)  # noqa: E731
    monkeypatch.setattr(train, f"train_{phase}", trained)
    timeouts = ["--challenger.ddp_timeout", "111", "--solver.ddp_timeout", "222"]
    assert train.main([phase, "--iteration", "1", "--config", "r_diverse/configs/tiny.yaml", *timeouts]) == 0
    assert made[0] == made[-1] == seconds


def test_the_template_options_of_the_run_are_those_of_its_phases():
    with pytest.raises(ValueError, match=r"solver.chat_template_kwargs cannot be set: set it of the run"):
        parse(["--model=m", '--solver.chat_template_kwargs={"a": 1}'])
    settings = parse(["--model=m", '--chat_template_kwargs={"a": 1}'])
    assert settings.challenger.chat_template_kwargs == settings.solver.chat_template_kwargs == {"a": 1}
    assert "chat_template_kwargs" not in settings.plain()["solver"]


def test_a_model_without_a_template_gets_r_zeros_form(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = train.load_tokenizer(str(tmp_path))
    assert loaded.chat_template == PLAIN_TEMPLATE
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    expected = f"{loaded.bos_token or ''}system: Think.\nuser: 1+1?"
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    (answer,) = train.local_engine(str(tmp_path), parse(["--model=m"]).run).generate(
        [Prompt(messages)], Decoding(max_new_tokens=2), [0]
    )
    assert isinstance(answer.text, str)


# --- answers in boxes ---


@pytest.mark.parametrize(
    ("response", "boxed", "free"),
    [
        ("The answer is 5.", None, "5"),
        ("#### 5", None, "5"),
        ("so \\boxed{5}", "5", "5"),
        ("\\boxed{}", None, None),
        ("\\boxed{5", None, None),
        ("\\boxed{4} </think> The answer is 5.", None, "5"),
        ("\\boxed{4}, no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
    ],
)
def test_an_answer_is_what_stands_in_a_box(response, boxed, free):
    for flag, expected in (("true", boxed), ("false", free)):
        run = parse(["--model=m", f"--boxed_only={flag}", "--m_reward=2"]).run
        assert train.answer_of(response, run) == expected
        engine = SimpleNamespace(generate=lambda p, d, seeds: [Completion(response, 3, "stop") for _ in p])
        assert EngineSolver(engine, run, 0)(["q"], 0) == [[expected] * 2]


def test_the_solvers_reward_needs_a_box():
    completions = ["The answer is 5.", "\\boxed{5}", [{"role": "assistant", "content": "\\boxed{5}"}], "\\boxed{6}"]
    figures = {}
    assert train.boxed_reward(completions, answer=["5"] * 4, log_metric=figures.__setitem__) == [0.0, 1.0, 1.0, 0.0]
    assert train.label_reward(completions, answer=["5"] * 4) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("reward", [train.boxed_reward, train.label_reward])
@pytest.mark.parametrize(
    ("answers", "majority"),
    [
        (["a+b=42", "42", "42", "42", "40"], 4),
        (["42", "a+b=42", "42", "42", "40"], 4),
        (["\\pi r^2", "\\pi r^2", "\\pi r^2 m/s", "\\pi r", "2\\pi r"], 3),
        (["Option B", "B", "B", "C", "A"], 3),
        (["5", "5 or 7", "7", "6", None], 1),
    ],
)
def test_the_solver_is_rewarded_for_each_answer_that_counts_as_the_label(reward, answers, majority):
    label, share = self_consistency(answers, data.same)
    assert share == majority / 5 and label == answers[0]
    completions = ["" if answer is None else f"\\boxed{{{answer}}}" for answer in answers]
    assert reward(completions, answer=[label] * 5) == [1.0] * majority + [0.0] * (5 - majority)


@pytest.mark.parametrize("reward", [train.boxed_reward, train.label_reward])
def test_another_answer_than_a_label_that_cannot_be_read_is_wrong(reward):
    """And not left out: the group would have one reward, 1, and no gradient."""
    completions = ["\\boxed{Na^+}", "\\boxed{7}", "\\boxed{Na^+}", "no answer"]
    assert reward(completions, answer=["Na^+"] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_the_solver_is_trained_with_the_reward_of_the_config(tmp_path, monkeypatch):
    rewards, fields = [], ["--model=m", f"--out={tmp_path}"]
    questions = train.sources_of(parse(fields).run, 1).questions
    questions.parent.mkdir(parents=True)
    questions.write_text('{"question": "1+1", "answer": "2"}\n')
    monkeypatch.setattr(train, "train_phase", lambda config, model, reward, *_: rewards.append(reward))
    for boxed_only in ("true", "false"):
        train.train_solver(parse([*fields, f"--boxed_only={boxed_only}"]), 1)
    assert [given(["The answer is 2."], answer=["2"]) for given in rewards] == [[0.0], [1.0]]


def test_a_served_base_model_stops_at_the_end_of_a_turn(tmp_path):
    pytest.importorskip("openai")
    model, tokenizer = tiny_qwen3(hidden=32)
    end, tokenizer.eos_token = tokenizer.eos_token_id, "<|endoftext|>"  # all that Qwen3-4B-Base declares
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fields = ["--model=m", "--engine=vllm", '--chat_template_kwargs={"enable_thinking": false}']
    runs = [parse([*fields, f"--gpus={gpus}"]).run for gpus in (0, 1, 2, 8)]
    served = [train.server_engine("http://127.0.0.1:9/v1", str(tmp_path), run) for run in runs]
    assert [engine.stops for engine in served] == [[end]] * 4
    assert [engine.template_options for engine in served] == [{"enable_thinking": False}] * 4
    assert [engine.workers for engine in served] == [
        128,
        128,
        256,
        512,
    ]  # requests at once: 128 a replica, at most 512


def test_the_iteration_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(train.__file__).parent / "README.md").read_text()
    code = readme.split("## On your own engines")[1].split("```python\n")[1].split("```")[0]
    quiet = {**QUIET, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no"}
    asked, starts, seeds = [], [], []

    def ask_solver(questions, seed):
        asked.append(seed)
        return [["1"] * 5 + [None, "2", "3", "4", "5"] for _ in questions]

    outputs = [*QUESTIONS, QUESTIONS[0]]  # an equal question counts again

    given = {
        "coder": Table(),
        "encoder": Table(),
        "options": {**quiet, "max_steps": 1, "steps_per_generation": 1, "max_completion_length": 4},
        "ask_solver": ask_solver,
        "same_answer": lambda a, b: a == b,
        "sample": lambda model: [f"<question>{q}</question>\\boxed{{1}}" for q in outputs] + ["no form"],
        "solver_reward": lambda answer, **columns: [float(i % 2 and label == "1") for i, label in enumerate(answer)],
    }
    exec(code, given)
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")

    def phase(*args, **kwargs):
        made = trainer.PhaseTrainer(*args, **kwargs)
        starts.append([[p.detach().clone() for p in m.parameters()] for m in (made.model, made.ref_model)])
        seeds.append(made.args.seed)
        return made

    given["PhaseTrainer"] = phase
    phases = ("base", "base")
    for t in (1, 2):
        phases = given["iteration"](t, *phases)
    assert phases == ("challenger-2", "solver-2")
    for policy, reference in starts:  # a phase is held to the model that it begins with
        assert all(map(torch.equal, policy, reference))
    assert not any(map(torch.equal, starts[1][0], starts[3][0]))  # the Solver's, which has been trained
    assert given["bank"].iterations == {1: 5, 2: 5}
    assert {row["answer"] for row in given["bank"].sample(10, seed=0)} == {"1"}
    assert asked[-1] == 2
    assert seeds == [1, 1, 2, 2]  # with one seed, models that hardly differ would draw the same rollouts again
