"""Run folders: every kill leaves a folder that can go on, and nothing of another run is overwritten."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from common import runs
from common.runs import RunFolder, exclusive

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
    with pytest.raises(ValueError, match="model held another config, tokenizer or template: put back"):
        opened_with("model")
    (tmp_path / "model/model.safetensors").write_text("other")
    with pytest.raises(ValueError, match="began when the folder of model held other weights: put back"):
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
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path, **changes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="data train='abc'"):
        RunFolder.open(tmp_path, CONFIG, data={"train": "other"}, seed=0)
    with pytest.raises(ValueError, match="seed=0, this one has 1"):
        RunFolder.open(tmp_path, CONFIG, data=DATA, seed=1)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_setting_turned_off_is_not_its_default(tmp_path):
    opened(tmp_path / "a")
    with pytest.raises(ValueError, match="with top_k=its default, this one has None"):
        opened(tmp_path / "a", top_k=None)
    opened(tmp_path / "b", top_k=None)
    with pytest.raises(ValueError, match="with top_k=None, this one has its default"):
        opened(tmp_path / "b")
    assert opened(tmp_path / "b", top_k=None).manifest["resumed"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run folder"):
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


def test_a_broken_manifest_and_a_file_in_the_way_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"config": ')
    with pytest.raises(ValueError, match="cannot be read"):
        opened(tmp_path)
    for content in (
        "{}",
        "[]",
        '{"config": {}, "seed": 0, "data": {}}',
        '{"config": 5, "seed": 0, "data": {}, "state": 1}',
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be read"):
            opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        opened(tmp_path / "file" / "run")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
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
