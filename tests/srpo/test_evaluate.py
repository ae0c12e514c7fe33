"""Evaluation of SRPO's runs: every checkpoint, the budgets in hours, results that belong to their settings."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
from peft import get_peft_model
from training_runs import choices

from benchmarks import srpo
from common import models, stages
from common.answers import Verdict
from common.evaluation import Completion, engines
from common.lora import lora_config
from common.runs import read_jsonl
from srpo import evaluate, loop, train


def test_an_answer_that_cannot_be_read_is_told_from_a_wrong_one(config, tmp_path):
    fields = ["--dataset", "biology", "--data", str(choices(tmp_path))]
    benchmark = evaluate.benchmark_of(*train.parse(["--config", str(config), *fields]))
    row = next(row for row in benchmark.rows if row["answer"] == "A")
    said = [benchmark.score(text, row) for text in ("<answer>A</answer>", "<answer>B</answer>", "I do not know.")]
    assert said == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE]


def test_evaluation_of_every_checkpoint_and_the_budgets(config, tmp_path, easy):
    assert train.main(["--config", str(config)]) == 0
    assert evaluate.main(["run", "--config", str(config)]) == 0
    folder = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval"
    table = json.loads((folder / "curve.json").read_text())
    assert [point["step"] for point in table["curve"]] == [2, 4, 6]
    accuracy = [point["accuracy"] for point in table["curve"]]
    found = table["1h"]
    assert found.pop("hours") == table["curve"][-1]["hours"]
    assert found == {"best": max(accuracy), "mean": pytest.approx(sum(accuracy) / 3), "last": accuracy[-1]}
    records = read_jsonl(folder / "checkpoint-6/additions/samples.jsonl")
    assert len(records) == 40 * 2
    assert evaluate.main(["nothing"]) == 2


def test_all_checkpoints_are_looked_at_before_the_first_is_evaluated(config, tmp_path, easy, capsys, monkeypatch):
    assert train.main(["--config", str(config)]) == 0
    assert evaluate.main(["run", "--config", str(config)]) == 0
    folder = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval"
    shutil.rmtree(folder / "checkpoint-2")  # moved away, as the refusal of the first one says
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert evaluate.main(["run", "--config", str(config), "--eval_temperature", "0.6"]) == 2
    assert "checkpoint-4 holds results of eval_temperature=1.0, these settings have 0.6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--eval_temperature", "0.6"], "eval_temperature=1.0, these settings have 0.6"),
        (["--eval_top_p", "0.5"], "eval_top_p=0.95, these settings have 0.5"),
        (["--eval_samples", "3"], "eval_samples=2, these settings have 3"),
        (["--eval_limit", "30"], "test problems (data, eval_limit)="),
        (["--max_completion_length", "5"], "max_completion_length=4, these settings have 5"),
        (["--chat_template_kwargs", '{"enable_thinking": true}'], "chat_template_kwargs={'enable_thinking': False}"),
        (["--strict", "true"], "strict=False, these settings have True"),
        (["--model", "{other}"], "results of model="),
    ],
)
def test_a_result_of_other_settings_is_refused(evaluated, other_policy, capsys, monkeypatch, fields, message):
    """Before, `evaluate base` said the old number whatever was asked."""
    config, folder = evaluated
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert evaluate.main(["base", "--config", str(config)]) == 0  # done: nothing is loaded
    capsys.readouterr()
    fields = [field.replace("{other}", other_policy) for field in fields]
    assert evaluate.main(["base", "--config", str(config), *fields]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and f"{folder / 'eval/base'} holds results of" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_result_of_other_weights_at_the_same_path_is_refused(evaluated, capsys, monkeypatch):
    config, folder = evaluated
    assert evaluate.main(["base", "--config", str(config)]) == 0
    settings = json.loads((folder / "eval/base/settings.json").read_text())
    assert settings["weights"] == evaluate.weights_of(weights=settings["model"])["weights"]
    monkeypatch.setattr(evaluate, "weights_of", lambda **models: dict.fromkeys(models, "other"))
    assert evaluate.main(["base", "--config", str(config)]) == 2
    assert f"weights={settings['weights']!r}, these settings have 'other'" in capsys.readouterr().err


def test_a_result_of_another_template_at_the_same_path_is_refused(config, policy, tmp_path, capsys):
    model = tmp_path / "policy"
    shutil.copytree(policy, model)
    fields = ["base", "--config", str(config), "--model", str(model)]
    assert evaluate.main(fields) == evaluate.main(fields) == 0
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    capsys.readouterr()
    assert evaluate.main(fields) == 2
    assert "results of config, tokenizer and template in the model's folder=" in capsys.readouterr().err


def test_the_policy_before_training_is_evaluated_once_for_all_seeds(evaluated, monkeypatch):
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    assert evaluate.main(["base", "--config", str(evaluated[0]), "--seed", "1"]) == 0


def test_a_run_is_evaluated_with_the_seed_of_its_record(config, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **options: pytest.fail("evaluated"))
    out = tmp_path / "run/eval/checkpoint-2"
    args, settings = train.parse(["--config", str(config)])
    settings.seed = 1
    evaluate.claim(out / "settings.json", {"seed": 0}, False)
    (out / "samples.jsonl").touch()
    with pytest.raises(ValueError, match="seed=0, these settings have 1"):
        evaluate.score(args.model, evaluate.benchmark_of(args, settings), args, settings, out)


def test_an_adapters_folder_is_its_own_model(evaluated, policy, tmp_path):
    """The record once named its base, and the second call was refused."""
    config, _ = evaluated
    adapter = get_peft_model(models.load_model(policy), lora_config(2))
    adapter.save_pretrained(tmp_path / "adapter")
    models.load_processor(policy).save_pretrained(tmp_path / "adapter")
    fields = ["--config", str(config), "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "runs")]
    assert [evaluate.main(["base", *fields]) for _ in range(2)] == [0, 0]


def test_a_run_folder_that_was_moved_keeps_its_results(config, tmp_path, easy, monkeypatch):
    assert train.main(["--config", str(config)]) == evaluate.main(["run", "--config", str(config)]) == 0
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    fields = ["--config", str(config), "--out", str(tmp_path / "moved")]
    assert evaluate.main(["run", *fields]) == 0
    assert evaluate.main(["run", *fields, "--eval_samples", "3"]) == 2


def made_up_checkpoint(run: Path, step: int, seconds: float = 1.0) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "train_seconds.json").write_text(str(seconds))
    (folder / "model.safetensors").write_text(f"weights of {step}")
    return folder


def test_a_point_of_the_curve_is_of_its_checkpoint(config, tmp_path, monkeypatch):
    args, settings = train.parse(["--config", str(config)])
    for step, seconds in ((10, 9000.0), (2, 1800.0)):
        made_up_checkpoint(tmp_path, step, seconds)
    monkeypatch.setattr(evaluate, "is_done", lambda run: True)
    monkeypatch.setattr(evaluate, "score", lambda model, *others: {"model": model, "out": others[-1]})
    assert evaluate.evaluate_run(tmp_path, args, settings) == [
        {"step": step, "hours": hours, "model": str(tmp_path / name), "out": tmp_path / "eval" / name}
        for step, hours, name in ((2, 0.5, "checkpoint-2"), (10, 2.5, "checkpoint-10"))
    ]


# --- Parts ---


def test_parts_share_the_checkpoints_and_the_curve_comes_from_their_results(config, tmp_path, easy, monkeypatch):
    loaded, build_engine = [], evaluate.build_engine

    def build(args, model, settings):
        loaded.append(Path(model).name)
        return build_engine(args, model, settings)

    monkeypatch.setattr(evaluate, "build_engine", build)
    assert train.main(["--config", str(config)]) == 0
    curve = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval/curve.json"
    words = ["run", "--config", str(config)]
    assert [evaluate.main([*words, "--part", part]) for part in ("2/2", "1/2", "4/4")] == [0, 0, 0]
    assert loaded == ["checkpoint-4", "checkpoint-2", "checkpoint-6"] and not curve.exists()
    assert evaluate.main(words) == 0
    assert [point["step"] for point in json.loads(curve.read_text())["curve"]] == [2, 4, 6] and len(loaded) == 3


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_checkpoint_is_in_one_part(config, tmp_path, monkeypatch, count, parts):
    args, settings = train.parse(["--config", str(config)])
    steps = [5 * i for i in range(1, count + 1)]
    for step in steps:
        made_up_checkpoint(tmp_path, step)
    monkeypatch.setattr(evaluate, "is_done", lambda run: True)
    monkeypatch.setattr(evaluate, "score", lambda *_: {})
    curves = [evaluate.evaluate_run(tmp_path, args, settings, part, parts) for part in range(1, parts + 1)]
    assert sorted(point["step"] for curve in curves for point in curve) == steps
    assert max(map(len, curves)) - min(map(len, curves)) <= 1


@pytest.mark.parametrize("part", ["0/2", "3/2", "1/0", "2", "1/2/3", "a/2", "1.0/2", "1/-2", ""])
def test_a_malformed_part_is_one_sentence(config, capsys, part):
    assert evaluate.main(["run", "--config", str(config), f"--part={part}"]) == 2
    assert f"part must be I/N with I from 1 to N, such as 3/8, got {part!r}" in capsys.readouterr().err


def test_the_policy_before_training_has_no_parts(config, capsys):
    assert evaluate.main(["base", "--config", str(config), "--part", "1/2"]) == 2
    assert "part shares the checkpoints of a run, and base is one model: leave it out" in capsys.readouterr().err


# --- Checkpoints without weights ---


def weights_in(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*model*.safetensors"))


def test_the_curve_is_the_same_when_evaluated_checkpoints_lose_their_weights(
    config, tmp_path, easy, capsys, monkeypatch
):
    assert train.main(["--config", str(config)]) == 0
    shutil.copytree(tmp_path / "runs", tmp_path / "dropping")
    kept, run = (tmp_path / out / "srpo/small-additions/srpo-seed0" for out in ("runs", "dropping"))
    words = ["run", "--config", str(config), "--out", str(tmp_path / "dropping")]
    drop = [*words, "--drop_evaluated", "true"]
    assert evaluate.main(["run", "--config", str(config)]) == 0
    assert evaluate.main([*drop, "--part", "1/2"]) == 0
    assert weights_in(run) == [f"{name}/model.safetensors" for name in ("checkpoint-4", "checkpoint-6", "model")]
    assert evaluate.main(drop) == 0
    assert weights_in(run) == ["checkpoint-6/model.safetensors", "model/model.safetensors"]
    assert not [*run.rglob("optimizer*"), *run.rglob("self_teacher*")] and len(weights_in(kept)) == 4
    curve = (run / "eval/curve.json").read_bytes()
    assert curve == (kept / "eval/curve.json").read_bytes()

    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    monkeypatch.setattr(train, "build_trainer", lambda *arguments: pytest.fail("a training has begun"))
    for again in (drop, words):
        (run / "eval/curve.json").unlink()
        assert train.main(again[1:]) == evaluate.main(again) == 0
        assert (run / "eval/curve.json").read_bytes() == curve
    assert srpo.main(words[1:]) == 0
    capsys.readouterr()
    assert evaluate.main([*drop, "--eval_samples", "3"]) == 2
    assert "set eval_samples back, or train again under another experiment (drop" in capsys.readouterr().err
    shutil.move(run / "eval/checkpoint-4", tmp_path)
    capsys.readouterr()
    assert evaluate.main(drop) == 2
    said = capsys.readouterr().err
    assert f"{run}/checkpoint-4 has no weights (drop_evaluated deletes them after evaluation), and {run}/eval" in said
    assert not (run / "eval/checkpoint-4").exists()
    shutil.move(tmp_path / "checkpoint-4", run / "eval")
    assert evaluate.main(drop) == 0 and (run / "eval/curve.json").read_bytes() == curve


KILLED = """
import os, signal, sys
from common import checkpoints
from srpo import evaluate
delete = checkpoints._delete
def killed(paths):
    delete(paths[:{count}])
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints._delete = killed
sys.exit(evaluate.main({words!r}))
"""


@pytest.mark.parametrize("count", [0, 1])
def test_killed_between_result_and_deletion_or_within_it_evaluation_goes_on(config, tmp_path, count):
    assert train.main(["--config", str(config), "--max_steps", "4"]) == 0
    run = tmp_path / "runs/srpo/small-additions/srpo-seed0"
    models.load_model(str(run / "checkpoint-2")).save_pretrained(run / "checkpoint-2", max_shard_size="20KB")
    shards = len(list(run.glob("checkpoint-2/*.safetensors")))
    shutil.copytree(tmp_path / "runs", tmp_path / "kept")
    words = ["run", "--config", str(config), "--max_steps", "4"]
    assert evaluate.main([*words, "--out", str(tmp_path / "kept")]) == 0
    words += ["--drop_evaluated", "true"]
    code = forks.call(["-c", KILLED.format(count=count, words=words)], tmp_path / "log.txt", Path.cwd())
    assert code == -signal.SIGKILL and (run / "eval/checkpoint-2/additions.json").exists()
    assert len(list(run.glob("checkpoint-2/*.safetensors"))) == shards - count > 0
    assert evaluate.main(words) == 0
    assert weights_in(run) == ["checkpoint-4/model.safetensors", "model/model.safetensors"]
    curve = (tmp_path / "kept/srpo/small-additions/srpo-seed0/eval/curve.json").read_bytes()
    assert (run / "eval/curve.json").read_bytes() == curve


def test_only_evaluated_checkpoints_of_a_finished_run_lose_their_weights(config, tmp_path, monkeypatch):
    args, settings = train.parse(["--config", str(config), "--drop_evaluated", "true"])
    for step in (2, 4, 10):
        made_up_checkpoint(tmp_path, step)
    (made_up_checkpoint(tmp_path, 3) / "train_seconds.json").unlink()  # somebody else's
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "model")
    before = weights_in(tmp_path)

    def score(model, *_):
        if model.endswith("checkpoint-4"):
            raise InterruptedError
        return {}

    monkeypatch.setattr(evaluate, "score", score)
    with pytest.raises(ValueError, match="holds no finished run"):
        evaluate.evaluate_run(tmp_path, args, settings)
    assert weights_in(tmp_path) == before
    monkeypatch.setattr(evaluate, "is_done", lambda run: True)
    with pytest.raises(InterruptedError):
        evaluate.evaluate_run(tmp_path, args, settings)
    left = ["checkpoint-10", "checkpoint-3", "checkpoint-4", "model"]
    assert weights_in(tmp_path) == [f"{name}/model.safetensors" for name in left]
    evaluate.evaluate_run(tmp_path, args, settings, 3, 3)  # the last one keeps its weights in a part too
    assert len(weights_in(tmp_path)) == 4


def test_a_policy_keeps_its_weights(config, policy, tmp_path):
    model = shutil.copytree(policy, tmp_path / "policy")
    before = weights_in(tmp_path)
    assert evaluate.main(["base", "--config", str(config), "--model", str(model), "--drop_evaluated", "true"]) == 0
    assert weights_in(tmp_path) == before


def test_a_run_without_a_checkpoint_to_evaluate_is_one_sentence(config, tmp_path, monkeypatch):
    args, settings = train.parse(["--config", str(config)])
    with pytest.raises(ValueError, match="holds no finished run: run srpo.train with the same settings first"):
        evaluate.evaluate_run(tmp_path, args, settings)
    monkeypatch.setattr(evaluate, "is_done", lambda run: True)
    with pytest.raises(
        ValueError, match=f"holds no checkpoint: set save_steps to at most max_steps={settings.max_steps}"
    ):
        evaluate.evaluate_run(tmp_path, args, settings)


def test_answers_are_sampled_by_the_seed_of_the_run(config, tmp_path, monkeypatch):
    asked = {}

    def generate(prompts, decoding, seeds):
        asked[settings.seed] = set(seeds)
        return [Completion("1", 1, "length" if i else "stop") for i in range(len(seeds))]

    engine = SimpleNamespace(name="policy", generate=generate, close=lambda: None)
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: engine)
    for seed in ("3", "4"):
        args, settings = train.parse(["--config", str(config), "--seed", seed, "--eval_samples", "1"])
        benchmark = evaluate.benchmark_of(args, settings)
        figures = evaluate.score("policy", benchmark, args, settings, tmp_path / seed / "eval" / "base")
    assert len(asked[3]) == len(asked[4]) == 40 and asked[3].isdisjoint(asked[4])
    assert figures["mean_tokens"] == 1 and figures["truncated"] == 39 / 40
    low, high = figures["interval"]
    assert low <= figures["accuracy"] <= high


def test_a_record_names_its_scorer_from_the_start(config, tmp_path, monkeypatch):
    """Added to the record afterwards, a kill in between let a command with the other scorer take it."""
    harness, closed = evaluate.evaluate, []

    def killed(*given, **options):
        harness(*given, **options)
        raise InterruptedError

    args, settings = train.parse(["--config", str(config)])
    engine = SimpleNamespace(
        name="policy",
        template_options=settings.chat_template_kwargs,
        generate=lambda prompts, *_: [Completion("1", 1, "stop") for _ in prompts],
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: engine)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", killed)
        with pytest.raises(InterruptedError):
            evaluate.score("policy", evaluate.benchmark_of(args, settings), args, settings, tmp_path / "eval/base")
    assert closed == [True]
    strict = replace(args, strict=True)
    benchmark = evaluate.benchmark_of(strict, settings)
    with pytest.raises(ValueError, match="strict=False, these settings have True"):
        evaluate.score("policy", benchmark, strict, settings, tmp_path / "eval/base")
    figures = evaluate.score("policy", evaluate.benchmark_of(args, settings), args, settings, tmp_path / "eval/base")
    assert 0 <= figures["accuracy"] <= 1


def test_budgets_leave_out_what_came_later():
    curve = [{"hours": hours, "accuracy": value} for hours, value in ((0.5, 0.2), (0.9, 0.6), (4.0, 0.4), (11.0, 0.9))]
    table = evaluate.within_budgets(curve)
    assert table["1h"] == {"best": 0.6, "mean": pytest.approx(0.4), "last": 0.6, "hours": 1}
    assert table["5h"]["last"] == table["10h"]["last"] == 0.4
    assert table["all"]["best"] == 0.9
    assert "1h" not in evaluate.within_budgets(curve[2:])
    assert (table["10h"]["hours"], table["all"]["hours"]) == (10, 11.0)
    assert evaluate.within_budgets(curve[:3])["10h"] == {**evaluate.within_budgets(curve[:3])["all"], "hours": 4.0}


def test_options_of_the_engine_reach_it(config, monkeypatch, capsys):
    args, settings = train.parse(["--config", str(config)])
    assert evaluate.build_engine(args, args.model, settings).batch_size == 100
    given = {}
    with monkeypatch.context() as patch:
        patch.setattr(engines, "load_engine", lambda *names, **options: given.update(options, names=names))
        evaluate.build_engine(args, "other", settings)
    options = {"chat_template_kwargs": {"enable_thinking": False}, "options": {}}
    expected = {"names": ("transformers", "other", 100), "bf16": False, "device": settings.device}
    assert given == {**expected, **options}
    made = []
    monkeypatch.setattr(engines, "VLLMEngine", lambda *names, **options: made.append(options))
    fields = ["--config", str(config), "--engine", "vllm", "--engine_options"]
    args, settings = train.parse([*fields, '{"tensor_parallel_size": 2}'])
    evaluate.build_engine(args, args.model, settings)
    assert made[0].items() >= {"tensor_parallel_size": 2}.items()
    plan = loop.plan(fields, args, ["srpo"], ["additions"], ["0"], [])
    assert not any(isinstance(stage, stages.OneGPUEach) for stage in plan)
    assert train.main([*fields, "2", "--dry_run", "true"]) == 2
    assert 'engine_options must be JSON such as {"tensor_parallel_size": 2}, got 2' in capsys.readouterr().err
