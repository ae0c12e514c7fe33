"""A training's log and its states: one line a step, seconds that go on, done with its model."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging

from common import runs, training
from common.training import RunLog, row_fingerprints, train_run


def test_a_step_has_one_line_and_its_rollouts_once(tmp_path, capsys, monkeypatch):
    class Log(RunLog):
        SHOWN = ("loss", "reward")

        def rollouts(self):
            return [{"response": "a"}, {"response": "b"}]

    log, state = Log(tmp_path, None, None), SimpleNamespace(global_step=3, max_steps=6)
    logged = [{"loss": 0.51234567, "reward": "none"}, {"eval_loss": 0.4}, {"train_runtime": 1.0}]
    for logs in logged:
        log.on_log(None, state, None, logs)
    assert runs.read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 3, "train_seconds": 0.0, **logs} for logs in logged
    ]
    assert runs.read_jsonl(tmp_path / "samples.jsonl") == [{"step": 3, "response": word} for word in "ab"]
    assert capsys.readouterr().out == "step 3/6  loss 0.5123\n"
    waits = []
    monkeypatch.setattr(runs.os, "fsync", waits.append)
    log.on_log(None, state, None, logged[0])
    assert len(waits) == 2  # a file each, whatever the number of rollouts


def test_the_seconds_of_training_are_those_of_its_steps_and_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    """By a clock of the test: a step takes 10 seconds, and what is between two, as saving a checkpoint, 1,000."""
    now = itertools.accumulate(itertools.cycle((1000, 10)))
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(now)))

    def train(checkpoint, steps):
        log = RunLog(tmp_path, checkpoint, None)
        for step in steps:
            state = SimpleNamespace(global_step=step, max_steps=6)
            log.on_step_begin(None, state, None)
            log.on_step_end(None, state, None)
            log.on_log(None, state, None, {"loss": 1.0})
            if step % 2 == 0:
                (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
                log.on_save(None, state, None)

    train(None, (1, 2, 3, 4, 5))
    train(tmp_path / "checkpoint-4", (5, 6))  # killed after step 5, which is done again and counted once
    lines = runs.read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train_seconds"]) for line in lines] == [(s, 10.0 * s) for s in range(1, 7)]
    assert [training.train_seconds(tmp_path / f"checkpoint-{s}") for s in (2, 4, 6)] == [20.0, 40.0, 60.0]


def test_a_step_is_over_when_the_gpu_has_done_it(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + 5))
    log = RunLog(tmp_path, None, None)
    log.on_step_begin(None, None, None)
    log.on_step_end(None, None, None)
    assert log.seconds == 5.0


def test_a_run_is_done_with_its_model_and_not_before(tmp_path, monkeypatch, capsys):
    """Stopped while the model is saved, and started twice more."""
    run, removed, trained, saved = tmp_path / "run", [], [], iter([KeyboardInterrupt, None])

    def save_model(path: str) -> None:
        assert path == str(run / "model") and not runs.is_done(run)
        assert not logging.is_progress_bar_enabled()  # one a checkpoint would stand between the lines of `RunLog`
        if error := next(saved):
            raise error

    def build() -> SimpleNamespace:
        assert trained or not run.exists()  # what is wrong with models and data leaves nothing
        return SimpleNamespace(add_callback=list, remove_callback=removed.append, save_model=save_model)

    logging.enable_progress_bar()
    points = iter([None, run / "checkpoint-4"])
    monkeypatch.setattr(training, "resume_point", lambda trainer: next(points))
    monkeypatch.setattr(training.preemption, "train", lambda trainer, at, keep_weights: trained.append(at))
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8}
    config = SimpleNamespace(**batch, report_to=[])
    folder = lambda: runs.RunFolder.open(run, {}, data={}, seed=0)  # noqa: E731
    start = lambda: train_run("srpo.train", run, config, folder, build, lambda *given: given)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        start()
    assert not runs.is_done(run)
    start()
    assert runs.is_done(run)
    assert trained == [None, run / "checkpoint-4"]
    assert removed == [PrinterCallback] * 2  # whose dictionaries would be between the lines of `RunLog`
    update = "one update: 2 prompts x 8 rollouts, 1 processes x 4 rollouts x 4 micro-batches"
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("srpo.train: Python ") for line in printed[::3])
    assert [*printed[1:3], *printed[4:]] == [update, f"{run}: starting", update, f"{run}: resuming at step 4"]
    start()
    assert capsys.readouterr().out == f"{run}: done already\n"


def test_a_folder_that_cannot_be_made_and_a_missing_tracker_are_said_before_models_are_loaded(tmp_path):
    (tmp_path / "file").touch()
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}

    def start(run: Path, report_to: list[str]) -> None:
        build = lambda: pytest.fail("loads")  # noqa: E731
        train_run("srpo.train", run, SimpleNamespace(**batch, report_to=report_to), None, build, None)

    with pytest.raises(FileExistsError, match="tmp.*/file"):
        start(tmp_path / "file/a/b", [])
    with pytest.raises(ValueError, match="report_to has tracks, which this Python does not have: install it"):
        start(tmp_path / "a/b", ["tracks"])
    with pytest.raises(pytest.fail.Exception, match="loads"):
        start(tmp_path / "a/b", ["flyte"])
    assert not (tmp_path / "a").exists()


def test_other_ids_prompts_answers_and_images_are_other_data():
    file = {"bytes": b"a", "path": None}
    rows = [{"id": str(i), "prompt": f"{i} + 7?", "answer": str(7 + i), "images": [file]} for i in range(2)]
    of = [
        row_fingerprints({"train": Dataset.from_list(data)})["train"]
        for data in (
            *(rows, [{**row, "other": "c"} for row in rows]),  # other columns are left out
            *([rows[0], {**rows[1], "images": [{**file, "bytes": b"b"}]}], [rows[0], {**rows[1], "images": []}]),
            *(rows[::-1], rows[:1], [rows[0], {**rows[1], "answer": "9"}], [rows[0], {**rows[1], "id": "2"}]),
            [rows[0], {**rows[1], "prompt": "8?"}],
        )
    ]
    assert of[0] == of[1] and len(set(of)) == 8
