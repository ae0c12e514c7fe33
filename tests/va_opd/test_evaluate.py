"""Evaluation of VA-OPD's runs: held-out problems, the paper's benchmarks, visual advantage; refused results."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from training_runs import Parrot

from benchmarks import va_opd as report
from common import stages
from common.evaluation import BENCHMARKS, Decoding, engines
from common.runs import atomic_write_json, claim, read_jsonl
from va_opd import VAOPDTrainer, data, evaluate, loop, train
from va_opd.degraded import degraded_pixel_values
from va_opd.objective import pixelate

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "va_opd" / "configs").glob("*.yaml"))


# --- results belong to their settings ---


def test_results_of_other_settings_are_refused_without_loading_a_model(config, tiny_models, capsys, monkeypatch):
    fields = ["--config", str(config)]
    assert evaluate.main(["base", *fields]) == 0
    out = train.run_path(*train.parse(fields)).with_name("base-seed0") / "eval"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.delattr(evaluate, "build_engine")
    monkeypatch.delattr(evaluate, "VAOPDTrainer")
    others = {
        "eval_temperature": ("0.5", "1.0"),
        "eval_samples": ("2", "1"),
        "model": (tiny_models["teacher"], repr(tiny_models["student"])),
        "teacher": (tiny_models["student"], repr(tiny_models["teacher"])),
        "degradation_ratio": ("0.5", "0.1"),
        "validation_size": ("4", "8"),
        "max_pixels": ("5000000", "4194304"),
    }
    for name, (other, found) in others.items():
        capsys.readouterr()
        assert evaluate.main(["base", *fields, f"--{name}", other]) == 2
        assert f"{out} holds results of {name}={found}, these settings have" in capsys.readouterr().err
    assert evaluate.main(["base", *fields]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    args, _ = train.parse([*fields, "--eval_temperature", "0.5", "--eval_samples", "2"])
    assert "8 held-out problems, 1 samples each at temperature 1.0, top-p 1.0;" in report.report(
        args, 0
    )  # of the record

    with monkeypatch.context() as patch:
        weights = evaluate.weights_of(other=tiny_models["teacher"])["other"]
        patch.setattr(evaluate, "weights_of", lambda **models: {"weights of teacher": "other"})
        assert evaluate.main(["base", *fields]) == 2
        assert f"{out} holds results of weights of teacher={weights!r}" in capsys.readouterr().err
        patch.undo()
        patch.setattr(evaluate, "folders_of", lambda **models: dict.fromkeys(models, "other"))
        assert evaluate.main(["base", *fields]) == 2
        assert f"{out} holds results of config and tokenizer of model='" in capsys.readouterr().err

    (out / "settings.json").unlink()
    capsys.readouterr()
    assert evaluate.main(["base", *fields]) == 2
    assert "no readable settings.json that says of which settings: move the folder away" in capsys.readouterr().err


def test_a_run_is_evaluated_with_the_models_that_it_was_trained_with(config, tiny_models, capsys):
    fields = ["--config", str(config), "--max_steps", "1"]
    assert train.main(fields) == 0
    for name, other in (("model", "teacher"), ("teacher", "student")):
        capsys.readouterr()
        assert evaluate.main(["run", *fields, f"--{name}", tiny_models[other]]) == 2
        assert f"was trained with {name}=" in capsys.readouterr().err


def test_an_evaluation_that_failed_before_its_first_result_leaves_the_folder_free(config, capsys):
    fields = ["--config", str(config)]
    assert evaluate.main(["base", *fields, "--model", "/nowhere"]) == 2
    args, settings = train.parse(fields)
    rows = train.load_splits_of(args)["validation"]
    out = train.run_path(args, settings).with_name("base-seed0") / "eval"
    assert json.loads((out / "settings.json").read_text())["model"] == "/nowhere"
    claim(out / "settings.json", evaluate.settings_of("base", args, settings, rows), any(out.rglob("*.jsonl")))
    assert json.loads((out / "settings.json").read_text())["model"] == args.model


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_results_that_do_not_say_of_which_settings_are_refused(tmp_path, content):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="no readable settings.json that says of which settings: move the folder"):
        claim(path, {"seed": 0}, True)


# --- what is evaluated, and how ---


def test_a_model_is_evaluated_on_the_benchmarks_of_the_config(config, vision_data, tmp_path, capsys):
    fields = ["--config", str(config), "--benchmarks", "mmstar,hallusionbench", "--benchmark_data", vision_data]
    assert evaluate.main(["base", *fields, "--eval_limit", "4"]) == 0
    folder = tmp_path / "runs/va_opd/small/base-seed0/eval"
    metrics = json.loads((folder / "hallusionbench.json").read_text())
    assert metrics["questions"] == 4 and {"aAcc", "fAcc", "qAcc", "score"} <= metrics["metric"].keys()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert evaluate.main(["base", *fields, "--eval_limit", "4"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert evaluate.main(["base", *fields]) == 2  # the records of four questions are not those of all
    assert "mmstar.json is of 4 questions, this evaluation has eval_limit for 8" in capsys.readouterr().err
    text = report.report(*_seeded(fields))
    assert "n=4 |" in text and "| CoT-SFT | 39.7 |  | 64.4 |  |" in text


@pytest.mark.parametrize(
    ("limit", "questions", "wanted"),
    [
        *((None, 8, None), (None, 6, None), (100, 8, None), (100, 6, None), (4, 4, None)),
        *((None, 4, 8), (100, 4, 8), (4, 8, 4), (7, 8, 7), (7, 6, None)),
    ],
)
def test_a_result_is_of_as_many_questions_as_there_are_or_as_the_limit_says(
    tmp_path, monkeypatch, limit, questions, wanted
):
    """Some benchmarks are published with two numbers of questions, here 8 and 6."""
    monkeypatch.setitem(BENCHMARKS, "mmstar", dataclasses.replace(BENCHMARKS["mmstar"], rows=8, also=(6,)))
    assert not evaluate.is_evaluated(tmp_path, "mmstar", limit)
    atomic_write_json(tmp_path / "mmstar.json", {"questions": questions})
    if wanted is None:
        assert evaluate.is_evaluated(tmp_path, "mmstar", limit)
    else:
        with pytest.raises(ValueError, match=f"is of {questions} questions, .* eval_limit for {wanted}: set it to"):
            evaluate.is_evaluated(tmp_path, "mmstar", limit)


def _seeded(fields: list[str]):
    args, config = train.parse(fields)
    return args, config.seed


def test_of_equal_checkpoints_the_earlier_is_chosen(config, tmp_path):
    args, settings = train.parse(["--config", str(config)])
    rows, run, accuracy = train.load_splits_of(args)["validation"], tmp_path / "run", {4: 0.5, 8: 0.75, 12: 0.75}
    for step, value in accuracy.items():
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "model.safetensors").touch()
        atomic_write_json(run / "eval" / f"checkpoint-{step}" / "digits.json", {"avg@k": value})
    (run / "checkpoint-16").mkdir()  # killed before its weights
    for step, seconds in ((4, 1800.0), (8, 5400), (12, 9000.0)):
        (run / f"checkpoint-{step}" / "train_seconds.json").write_text(str(seconds))
    assert evaluate.best_checkpoint(run, args, settings, rows) == run / "checkpoint-8"
    assert json.loads((run / "eval/selection.json").read_text()) == {
        "accuracy": {str(step): value for step, value in accuracy.items()},
        "hours": {"4": 0.5, "8": 1.5, "12": 2.5},
        "best": 8,
    }


@pytest.mark.parametrize(("dataset", "length"), [("digits", 24), ("geo3k", 4096)])
def test_held_out_problems_are_sampled_as_the_config_says(config, dataset, length):
    args, settings = train.parse(["--config", str(config), "--eval_temperature", "0.5"])
    rows = train.load_splits_of(args)["validation"]
    args.dataset = dataset
    true, pixelated = evaluate.benchmark_of(args, rows), evaluate.benchmark_of(args, rows, settings)
    assert true.decoding == pixelated.decoding == Decoding(temperature=0.5, top_p=1.0, max_new_tokens=length)
    assert true.rows[0]["images"] == rows[0]["images"] != pixelated.rows[0]["images"]
    assert pixelated.rows[0]["images"][0].tobytes() == pixelate(rows[0]["images"][0], 0.1).tobytes()


@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_pixelated_problems_are_the_second_view_of_training(config, pixelate_at):
    """Also where the processor shows the model a smaller image, in which the same ratio leaves fewer cells."""
    args, settings = train.parse(["--config", str(config), "--pixelate_at", pixelate_at])
    part = train.models.load_processor(args.model).image_processor
    image = train.load_splits_of(args)["validation"][0]["images"][0].resize((960, 320))
    seen = part(images=[image], return_tensors="pt")
    assert seen["image_grid_thw"].prod() * part.patch_size**2 < image.width * image.height / 4
    trained, _ = degraded_pixel_values(part, seen, [[image]], [0], settings.degradation_ratio, pixelate_at)
    row = {"id": "0", "prompt": [], "images": [image], "answer": "1"}
    (view,) = evaluate.benchmark_of(args, [row], settings).rows[0]["images"]
    assert torch.equal(part(images=[view], return_tensors="pt")["pixel_values"], trained)


def test_benchmarks_are_sampled_at_the_temperature_of_the_config(config, vision_data):
    fields = ["--benchmark_data", vision_data, "--eval_temperature", "0.5", "--eval_limit", "4"]
    args, _ = train.parse(["--config", str(config), *fields])
    benchmark = evaluate.paper_benchmark(args, "mmstar")
    assert benchmark.decoding == dataclasses.replace(BENCHMARKS["mmstar"].decoding, temperature=0.5)
    assert len(benchmark.rows) == 4


def test_va_is_of_one_rollout_a_problem_and_0_where_images_are_as_they_were(config, tmp_path):
    uneven = ["--per_device_eval_batch_size", "3"]  # of 8 problems
    args, settings = train.parse(["--config", str(config), "--degradation_ratio", "1.0", *uneven])
    rows, out = train.load_splits_of(args)["validation"], tmp_path / "eval"
    out.mkdir()
    (out / "va_tokens.jsonl").write_text('{"id": "of a process that was killed", "va": [1.0]}\n')
    evaluate.score_visual_advantage(args.model, args, settings, rows, out)
    records = read_jsonl(out / "va_tokens.jsonl")
    assert [record["id"] for record in records] == rows["id"]
    tokens = sum(len(record["tokens"]) for record in records)
    assert json.loads((out / "va.json").read_text()) == {"mean": 0.0, "positive_share": 0.0, "tokens": tokens}


def test_a_problem_without_an_image_has_no_part_in_va(config, tmp_path):
    args, settings = train.parse(["--config", str(config)])
    rows = train.load_splits_of(args)["validation"].select(range(4))
    draw = rows.format["format_kwargs"]["transform"]

    def every_other(batch):
        batch = draw(batch)
        if "images" in batch:
            batch["images"] = [
                images if int(name[-1]) % 2 else [] for name, images in zip(batch["id"], batch["images"], strict=True)
            ]
        return batch

    out = tmp_path / "eval"
    out.mkdir()
    evaluate.score_visual_advantage(args.model, args, settings, rows.with_transform(every_other), out)
    assert [record["id"] for record in read_jsonl(out / "va_tokens.jsonl")] == rows["id"][1::2]


@pytest.mark.parametrize(
    ("what", "dataset", "scored"), [("base", "geo3k", True), ("teacher", "geo3k", False), ("teacher", "digits", True)]
)
def test_va_is_scored_of_all_but_a_papers_teacher(config, tmp_path, monkeypatch, what, dataset, scored):
    """Which is too large to be student and teacher at once. Answers are sampled by the seed of the run."""
    seen, answers = [], []
    monkeypatch.setattr(evaluate, "build_engine", lambda args, model, config: Parrot(model))
    monkeypatch.setattr(evaluate, "score_visual_advantage", lambda model, *_: seen.append(model))
    for seed in ("3", "4"):
        args, settings = train.parse(["--config", str(config), "--seed", seed])
        rows = train.load_splits_of(args)["validation"]
        monkeypatch.setattr(evaluate, "load_validation_of", lambda args, rows=rows: rows)
        args.dataset = dataset
        evaluate.evaluate_model(what, args, settings)
        out = tmp_path / f"runs/va_opd/small/{what}-seed{seed}/eval" / evaluate.benchmark_name(args)
        answers.append({record["response"] for record in read_jsonl(out / "samples.jsonl")})
    assert seen == [args.model if what == "base" else args.teacher] * 2 * scored
    assert len(answers[0]) == len(rows) and answers[0].isdisjoint(answers[1])


def test_evaluation_is_one_process_whatever_the_training_was(config, capsys):
    """A training on 8 GPUs may have one rollout a process; the evaluation after it has no other processes."""
    command = ["--config", str(config), "--max_steps", "1", "--save_strategy", "no"]
    assert train.main(command) == 0
    batch = ["--per_device_train_batch_size", "1"]
    args, settings = train.parse([*command, *batch])
    rows = train.load_splits_of(args)["validation"]
    run = train.run_path(args, settings)
    evaluate.score_visual_advantage(str(run / "model"), args, settings, rows, run / "eval")
    assert json.loads((run / "eval/va.json").read_text())["tokens"] > 0


def test_visual_advantage_is_of_the_adapter_that_is_evaluated(config, tiny_models, tmp_path, monkeypatch):
    """Merged into weights in bfloat16, a small adapter is rounded away."""
    base, adapter = train.models.load_model(tiny_models["student"]), tmp_path / "adapter"
    adapted = peft.get_peft_model(base, train.lora_config(2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(1e-5)
    adapted.save_pretrained(adapter)
    train.models.load_processor(tiny_models["student"]).save_pretrained(adapter)
    args, settings = train.parse(["--config", str(config), "--bf16", "true"])
    trainers = []

    def trainer(**parts):
        trainers.append(VAOPDTrainer(**parts))
        return trainers[0]

    monkeypatch.setattr(evaluate, "VAOPDTrainer", trainer)
    rows = train.load_splits_of(args)["validation"]
    evaluate.score_visual_advantage(str(adapter), args, settings, rows, tmp_path / "eval")
    assert json.loads((tmp_path / "eval/va.json").read_text())["tokens"] > 0
    evaluated = evaluate.build_engine(args, str(adapter), settings).model.state_dict()
    assert any("lora_B" in name for name in evaluated)
    scored = trainers[0].model.state_dict()
    assert scored.keys() == evaluated.keys()
    assert all(torch.equal(scored[name], weight) for name, weight in evaluated.items())


def test_a_teacher_that_only_a_server_can_hold_is_loaded_nowhere(config, monkeypatch):
    served = ["--teacher_server", "http://127.0.0.1:9", "--teacher_mode", "sampled_token"]
    args, settings = train.parse(["--config", str(config), *served, "--teacher_parity", "false"])
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_: pytest.fail("the teacher is loaded"))
    seen = {}

    def trainer(**parts):
        seen.update(parts)
        raise InterruptedError

    monkeypatch.setattr(evaluate, "VAOPDTrainer", trainer)
    with pytest.raises(InterruptedError):
        evaluate.score_visual_advantage(args.model, args, settings, [], Path(args.out))
    assert seen["teacher_model"] is None and seen["args"].teacher_server == served[1]
    args.dataset = "geo3k"
    args.benchmarks = "mmstar"
    for local in (True, False):
        stages = loop.plan([], args, ["opd"], ["0"], [], local)
        assert local is any("teacher" in words for stage in stages for _, words in stage)


def test_a_local_teacher_needs_no_server_in_evaluation(config):
    served = ["--teacher_server", "http://127.0.0.1:9", "--teacher_mode", "sampled_token"]
    args, settings = train.parse(["--config", str(config), *served])
    rows = train.load_splits_of(args)["validation"]
    out = Path(args.out) / "eval"
    evaluate.score_visual_advantage(args.model, args, settings, rows, out)
    assert json.loads((out / "va.json").read_text())["tokens"] > 0
    assert settings.teacher_server == served[1]


def test_the_engine_is_where_the_trainer_would_be(config, monkeypatch):
    args, settings = train.parse(["--config", str(config), "--eval_batch_size", "3"])
    monkeypatch.setattr(type(settings), "device", torch.device("meta"), raising=False)
    engine = evaluate.build_engine(args, args.model, settings)
    assert engine.model.device.type == "meta" and engine.batch_size == 3


def test_prompts_are_rendered_as_in_training(config):
    options = ["--chat_template_kwargs", '{"enable_thinking": false}']
    args, settings = train.parse(["--config", str(config), *options])
    engine = evaluate.build_engine(args, args.model, settings)
    assert engine.template_options == {"enable_thinking": False}
    rows = train.load_validation_of(args)
    for found in (evaluate.settings_of("base", args, settings, rows), data.teacher_settings(args, settings, rows)):
        assert found["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_paper_presets_evaluate_student_and_teacher_on_the_eight(capsys):
    for path in CONFIGS:
        args, _ = train.parse(["--config", str(path), "--dry_run"])
        names = evaluate.benchmark_names(args)
        assert names == ([] if path.stem == "tiny" else [*report.MATH, *report.VISUAL])
    assert loop.main(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for what in ("run", "base", "teacher"):
        assert f"va_opd.evaluate {what} --config" in printed


def test_options_of_the_engine_reach_it(config, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(engines, "VLLMEngine", lambda *names, **options: made.append(options))
    fields = ["--config", str(config), "--engine", "vllm", "--engine_options"]
    args, settings = train.parse([*fields, '{"tensor_parallel_size": 2}'])
    evaluate.build_engine(args, args.model, settings)
    assert made[0].items() >= {"tensor_parallel_size": 2}.items()
    assert not any(isinstance(stage, stages.OneGPUEach) for stage in loop.plan(fields, args, ["opd"], ["0"], []))
    assert train.main([*fields, "2", "--dry_run", "true"]) == 2
    assert 'engine_options must be JSON such as {"tensor_parallel_size": 2}, got 2' in capsys.readouterr().err
