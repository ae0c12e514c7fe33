"""Run folders: every kill leaves a folder that can go on, and nothing of another run is overwritten."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging

from common import runs, training
from common.runs import RunFolder, RunFolderError, exclusive
from common.training import RunLog, row_fingerprints, train_run

ROOT = Path(__file__).resolve().parents[2]
CONFIG, DATA = {"learning_rate": 1e-3, "name": "a"}, {"train": "abc"}


def opened(path: Path, **changes) -> RunFolder:
    return RunFolder.open(path, {**CONFIG, **changes}, data=DATA, seed=0)


def test_a_new_run_and_the_same_run_again(tmp_path):
    with opened(tmp_path / "run") as folder:
        runs.append_jsonl(folder.path / "metrics.jsonl", {"step": 1, "loss": float("nan"), "mean": np.float32(0.5)})
        assert not folder.is_done
        folder.finish(note="x")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["state"], manifest["seed"], manifest["data"], manifest["note"]) == ("done", 0, DATA, "x")
    assert {"torch", "trl"} <= manifest["packages"].keys()
    assert manifest["started"] <= manifest["ended"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == CONFIG
    assert runs.read_jsonl(tmp_path / "run/metrics.jsonl") == [{"step": 1, "loss": None, "mean": 0.5}]
    again = opened(tmp_path / "run")
    assert again.is_done
    assert len(again.manifest["resumed"]) == 1


def test_results_belong_to_the_settings_that_they_were_made_with(tmp_path):
    path = tmp_path / "identity.json"
    runs.claim(path, {"a": 0}, has_results=False)
    runs.claim(path, {"a": 1}, has_results=False)  # there was nothing yet
    runs.claim(path, {"a": 1, "b": 2}, has_results=True)  # an older version may not have recorded b
    with pytest.raises(ValueError, match="holds results of a=1, these settings have 2: set a back"):
        runs.claim(path, {"a": 2}, has_results=True)


def test_the_digest_of_weights_is_of_names_sizes_and_blocks_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BLOCKS", 4)
    monkeypatch.setattr(runs, "BLOCK_BYTES", 8)
    digests = [runs.weights_fingerprint(str(tmp_path))]
    for name, content in (
        ("model.safetensors", bytes(4000)),
        *(("model.safetensors", bytes(place) + b"x" + bytes(3999 - place)) for place in (0, 1007, 2000, 3007)),
        ("model.safetensors", bytes(4001)),
        ("model-1.safetensors", bytes(4000)),
    ):
        (tmp_path / name).write_bytes(content)
        digests.append(runs.weights_fingerprint(str(tmp_path)))
        (tmp_path / "self_teacher.safetensors").write_bytes(content)  # none of the model's weights
        assert runs.weights_fingerprint(str(tmp_path)) == digests[-1]
        (tmp_path / name).unlink()
    assert digests[0] is None and len(set(digests)) == 8


def test_what_was_trained_with_is_that_of_the_manifests(tmp_path):
    """Not of the command line; a model that was evaluated without training has none."""
    folders = {name: tmp_path / name for name in ("base", "one", "two")}
    assert runs.trained_with(folders, ("name",)) == ""
    for name in ("one", "two"):
        opened(folders[name])
    assert runs.trained_with(folders, ("name", "teacher")) == "Trained with name `a`."
    opened(tmp_path / "other", name="b", teacher="c")
    said = runs.trained_with({**folders, "three": tmp_path / "other"}, ("name", "teacher"))
    assert said == "Trained with name `a` (one, two); name `b`, teacher `c` (three)."


def test_a_run_that_began_with_other_models_at_the_same_path_is_refused(tmp_path):
    def opened_with(*names: str) -> RunFolder:
        models = {name: str(tmp_path / name) for name in names}
        return RunFolder.open(tmp_path / "run", CONFIG, data=DATA, seed=0, models=models)

    for name in ("model", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        (tmp_path / name / "chat_template.jinja").write_text(name)
    opened_with("model", "nowhere").finish()
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["weights"] == runs.weights_of(model=str(tmp_path / "model"))
    assert manifest["folders"] == runs.folders_of(model=str(tmp_path / "model"))
    opened_with("model", "teacher")  # which the run has not recorded
    opened_with()  # the folders are gone
    (tmp_path / "model/chat_template.jinja").write_text("other")
    with pytest.raises(RunFolderError, match="model held another config, tokenizer or template: put back"):
        opened_with("model")
    (tmp_path / "model/model.safetensors").write_text("other")
    with pytest.raises(RunFolderError, match="began when the folder of model held other weights: put back"):
        opened_with("model")


def test_a_finished_run_with_more_to_do_is_running_again(tmp_path):
    opened(tmp_path).finish()
    again = opened(tmp_path)
    again.restart()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["state"], manifest["ended"], again.is_done) == ("running", None, False)


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(), "interrupted")],
)
def test_how_a_run_ended_is_recorded(tmp_path, error, state):
    with pytest.raises(type(error)) as raised, opened(tmp_path):
        raise error
    assert raised.value.__notes__ == [f"in {tmp_path}"]
    assert json.loads((tmp_path / "manifest.json").read_text())["state"] == state
    again = opened(tmp_path)
    assert not again.is_done
    assert json.loads((tmp_path / "manifest.json").read_text())["ended"] is None
    assert len(opened(tmp_path).manifest["resumed"]) == 2
    again.finish()
    assert "error" not in json.loads((tmp_path / "manifest.json").read_text())  # a finished run has none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-4}, "learning_rate=0.001, this one has 0.0001"),
        ({"extra": 1}, "extra=its default, this one has 1"),
    ],
)
def test_another_runs_folder_is_refused_and_untouched(tmp_path, changes, message):
    runs.append_jsonl(opened(tmp_path).path / "metrics.jsonl", {"step": 1})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match=message) as error:
        opened(tmp_path, **changes)
    assert "\n" not in str(error.value)
    with pytest.raises(RunFolderError, match="data train='abc'"):
        RunFolder.open(tmp_path, CONFIG, data={"train": "other"}, seed=0)
    with pytest.raises(RunFolderError, match="seed=0, this one has 1"):
        RunFolder.open(tmp_path, CONFIG, data=DATA, seed=1)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_setting_turned_off_is_not_its_default(tmp_path):
    opened(tmp_path / "a")
    with pytest.raises(RunFolderError, match="with top_k=its default, this one has None"):
        opened(tmp_path / "a", top_k=None)
    opened(tmp_path / "b", top_k=None)
    with pytest.raises(RunFolderError, match="with top_k=None, this one has its default"):
        opened(tmp_path / "b")
    assert opened(tmp_path / "b", top_k=None).manifest["resumed"]


def test_a_folder_of_older_code_is_compared_by_what_both_record(tmp_path):
    opened(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    old = {name: value for name, value in manifest.items() if name not in ("format", "weights")}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert opened(tmp_path, top_k=None, gpus=8).manifest["resumed"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG  # as it was begun
    with pytest.raises(RunFolderError, match="learning_rate="):
        opened(tmp_path, learning_rate=1.0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run folder"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_process_at_a_time_works_in_a_folder_and_a_kill_frees_it(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common.runs import exclusive\nfrom pathlib import Path\n"
    )
    code += f"with exclusive(Path({str(tmp_path)!r})):\n    print('in', flush=True)\n    input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ValueError, match="is in use by another process: wait for it, or choose another out"):
            exclusive(tmp_path).__enter__()
        other.kill()
    with exclusive(tmp_path), pytest.raises(ValueError, match="in use"):
        exclusive(tmp_path).__enter__()
    with exclusive(tmp_path):
        pass


def test_a_broken_manifest_and_a_file_in_the_way_are_one_sentence(tmp_path):
    (tmp_path / "manifest.json").write_text('{"config": ')
    with pytest.raises(RunFolderError, match="cannot be read"):
        opened(tmp_path)
    for content in (
        "{}",
        "[]",
        '{"config": {}, "seed": 0, "data": {}}',
        '{"config": 5, "seed": 0, "data": {}, "state": 1}',
        '{"config": {}, "seed": 0, "data": {}, "state": "running", "resumed": null}',
        '{"config": {}, "seed": 0, "data": {}, "state": "running", "resumed": [], "weights": null}',
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(RunFolderError, match="cannot be read"):
            opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        opened(tmp_path / "file" / "run")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\)"):
        opened(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("step", range(8))
def test_a_kill_before_any_file_operation_of_open_leaves_a_folder_that_goes_on(tmp_path, step):
    """The process ends at the n-th fsync or rename of `RunFolder.open`; opened again, the run starts or goes on."""
    program = f"""
import os, sys
from pathlib import Path
from common.runs import RunFolder
count = 0
def counted(function):
    def call(*args, **kwargs):
        global count
        if count == {step}:
            os._exit(9)
        count += 1
        return function(*args, **kwargs)
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
RunFolder.open({str(tmp_path / "run")!r}, {CONFIG!r}, data={DATA!r}, seed=0)
"""
    code = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    assert code == (9 if step < 6 else 0)  # two files, each two fsyncs and a rename
    folder = opened(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == CONFIG
    assert json.loads((tmp_path / "run/manifest.json").read_text())["state"] == "running"
    folder.finish()
    assert opened(tmp_path / "run").is_done


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "value.json"
    program = f"""
from common.runs import atomic_write_json
for n in range(10**9):
    atomic_write_json({str(path)!r}, {{"n": n, "padding": "x" * 100_000}})
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not path.exists():
            time.sleep(0.01)
        for _ in range(200):
            assert len(json.loads(path.read_text())["padding"]) == 100_000
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(json.loads(path.read_text())["padding"]) == 100_000


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    runs.atomic_write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        runs.atomic_write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_that_opens_no_folder_is_written_to(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, *arguments, **options):
        if Path(path) == tmp_path:
            raise PermissionError(13, "no folders")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    runs.atomic_write_text(tmp_path / "a.json", "1")
    assert (tmp_path / "a.json").read_text() == "1"


def test_a_half_written_last_line_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    runs.append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert runs.read_jsonl(path) == [{"step": 1}]
    runs.append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_several_records_wait_for_the_disk_once(tmp_path, monkeypatch):
    path, waits = tmp_path / "samples.jsonl", []
    monkeypatch.setattr(runs.os, "fsync", waits.append)
    path.write_text('{"id": 0}\n{"id"')
    runs.append_jsonl(path, {"id": 1}, {"id": 2, "text": "a\nb"}, {"id": 3})
    assert runs.read_jsonl(path) == [{"id": 0}, {"id": 1}, {"id": 2, "text": "a\nb"}, {"id": 3}]
    assert len(waits) == 1
    runs.append_jsonl(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        runs.read_jsonl(path)


def test_logs_after_a_checkpoint_are_dropped(tmp_path):
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        runs.append_jsonl(metrics, {"step": step})
        runs.append_jsonl(samples, {"step": step, "text": "\u2028 kept"})
        # closes a training: of a stopped run, or written again
        runs.append_jsonl(metrics, {"step": step, "train_runtime": 1.0})
    RunLog(tmp_path, tmp_path / "checkpoint-2", None)
    assert [record["step"] for record in runs.read_jsonl(metrics)] == [1, 2]
    assert [record["text"] for record in runs.read_jsonl(samples)] == ["\u2028 kept"] * 2


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert runs.last_checkpoint(tmp_path) is None
    for step, state in (("2", "{}"), ("5", '{"global_step": 5}'), ("10", '{"global_step": 10}'), ("20", '{"glo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    (tmp_path / "checkpoint-25").mkdir()
    (tmp_path / "checkpoint-25" / "trainer_state.json").write_text('{"global_step": 25}')  # weights only
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert runs.last_checkpoint(tmp_path).name == "checkpoint-10"


def test_fingerprints_tell_values_files_and_folders_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("1")
    first = runs.fingerprint(tmp_path / "a")
    assert first == runs.fingerprint(tmp_path / "a")
    (tmp_path / "a/x").write_text("2")
    assert runs.fingerprint(tmp_path / "a") != first
    (tmp_path / "a/x").rename(tmp_path / "a/y")
    assert len({first, runs.fingerprint(tmp_path / "a"), runs.fingerprint(tmp_path / "a/y")}) == 3
    big = tmp_path / "big"  # read in pieces of 2**24 bytes
    big.write_bytes(b"0" * (1 << 24))
    shorter = runs.fingerprint(big)
    big.write_bytes(b"0" * (1 << 24) + b"1")
    assert runs.fingerprint(big) != shorter
    assert runs.fingerprint({"a": 1, "b": 2}) == runs.fingerprint({"b": 2, "a": 1})
    assert runs.fingerprint([1, 2]) != runs.fingerprint([2, 1])


def test_hidden_files_do_not_change_the_fingerprint_of_a_folder(tmp_path):
    folder = tmp_path / ".cache" / "model"  # where it is does not matter
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    first = runs.fingerprint(folder)
    for name in (".git/x", ".cache/huggingface/download/config.json.metadata", ".DS_Store", "inner/.DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of today")
        assert runs.fingerprint(folder) == first
    (folder / "config.json").write_text('{"a": 1}')
    assert runs.fingerprint(folder) != first
    assert runs.fingerprint(folder / ".git/x") != runs.fingerprint(
        folder / "config.json"
    )  # a file given itself counts


def test_what_may_change_today_an_older_version_has_recorded(tmp_path):
    """At the top, and in a section of the settings."""
    old = {"rate": 1, "engine": "vllm", "solver": {"memory": 0.4, "steps": 9}}
    with RunFolder.open(tmp_path / "run", old, data={}, seed=0):
        pass
    new, free = {"rate": 1, "solver": {"steps": 9}}, {"engine": "transformers", "solver.memory": 0.3}
    with RunFolder.open(tmp_path / "run", new, data={}, seed=0, free=free):
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == new | free
    for _ in range(2):
        with RunFolder.open(tmp_path / "without the section", {"rate": 1}, data={}, seed=0, free=free):
            pass
    with pytest.raises(RunFolderError, match="belongs to a run with solver="):
        RunFolder.open(tmp_path / "run", {**new, "solver": {"steps": 8}}, data={}, seed=0, free=free)


def test_infinity_is_logged_as_null_too_and_a_path_as_text(tmp_path):
    record = {"grad_norm": math.inf, "reward": -math.inf, "image": tmp_path / "a.png"}  # JSON has none of these
    runs.append_jsonl(tmp_path / "metrics.jsonl", record)
    (written,) = runs.read_jsonl(tmp_path / "metrics.jsonl")
    assert written == {"grad_norm": None, "reward": None, "image": f"{tmp_path}/a.png"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_records_the_revision_and_whether_the_code_is_changed(tmp_path, monkeypatch):
    """A copy without git, such as of an archive, runs too."""
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.setattr(runs, "__file__", str(code / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert opened(tmp_path / "none").manifest["git"] is None
    (code / "a.py").write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "a.py"), (*who, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(code), *words], check=True)
    clean = opened(tmp_path / "clean").manifest["git"]
    (code / "a.py").write_text("2")
    assert len(clean["revision"]) == 40 and not clean["dirty"]
    assert opened(tmp_path / "changed").manifest["git"] == {**clean, "dirty": True}


def test_a_file_can_be_read_by_others(tmp_path):
    runs.atomic_write_text(tmp_path / "report.md", "x")
    assert (tmp_path / "report.md").stat().st_mode & 0o777 == 0o644


def test_the_fingerprint_of_a_folder_is_that_of_its_copies(tmp_path, monkeypatch):
    """Whatever order the file system lists files in; and a name is not taken for content."""
    for folder, files in (("one", {"a": "bc", "d": ""}), ("other", {"ab": "c", "d": ""})):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    first, listed = runs.fingerprint(tmp_path / "one"), runs._visible_files
    assert first != runs.fingerprint(tmp_path / "other")
    for descending in (False, True):
        monkeypatch.setattr(runs, "_visible_files", lambda path, d=descending: sorted(listed(path), reverse=d))
        assert runs.fingerprint(tmp_path / "one") == first


def test_a_checkpoint_is_on_disk_before_it_counts_as_whole(tmp_path, monkeypatch):
    folder, synced, before = tmp_path / "checkpoint-2", [], []
    runs.begin_checkpoint(folder)
    (folder / "inner").mkdir()
    files = [folder / "model.safetensors", folder / "inner/optimizer.pt"]
    for file in files:
        file.write_text("x")
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *names: (before.extend(synced), replace(*names)))
    runs.complete_checkpoint(folder)
    assert {path.stat().st_ino for path in (tmp_path, folder, folder / "inner", *files)} <= set(before)


def test_a_checkpoint_begins_empty(tmp_path):
    """A killed save of another launch may have left parts that resuming would read."""
    folder = tmp_path / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    runs.begin_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == [runs.COMPLETE]


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


def test_lines_and_rollouts_after_the_checkpoint_are_dropped(tmp_path):
    """They come again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        runs.append_jsonl(tmp_path / name, *({"step": step} for step in (1, 2, 3)))
    (tmp_path / "checkpoint-2").mkdir()
    RunLog(tmp_path, tmp_path / "checkpoint-2", None)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [line["step"] for line in runs.read_jsonl(tmp_path / name)] == [1, 2]


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
    start = lambda: train_run("srpo.train", run, config, lambda: opened(run), build, lambda *given: given)  # noqa: E731
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


def test_a_checkpoint_of_an_older_version_leaves_the_seconds_unknown(tmp_path):
    """From 0 on they would be too few."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    log, state = RunLog(tmp_path, tmp_path / "checkpoint-2", None), SimpleNamespace(global_step=3, max_steps=6)
    log.on_step_begin(None, state, None)
    log.on_step_end(None, state, None)
    log.on_log(None, state, None, {"loss": 1.0})
    log.on_save(None, state, None)
    assert runs.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 1.0}]
    assert training.train_seconds(tmp_path / "checkpoint-3") is None


def test_other_ids_prompts_and_answers_are_other_data():
    rows = [{"id": str(i), "prompt": f"{i} + 7?", "answer": str(7 + i), "images": "a"} for i in range(2)]
    of = [
        row_fingerprints({"train": Dataset.from_list(data)})["train"]
        for data in (
            *(rows, [{**row, "images": "c"} for row in rows]),  # images are left out
            *(rows[::-1], rows[:1], [rows[0], {**rows[1], "answer": "9"}], [rows[0], {**rows[1], "id": "2"}]),
            [rows[0], {**rows[1], "prompt": "8?"}],
        )
    ]
    assert of[0] == of[1] and len(set(of)) == 6
