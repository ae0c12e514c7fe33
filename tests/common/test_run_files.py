"""Files of a run folder: written whole or not at all, read without what a kill has cut, and their digests."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import runs
from common.training import RunLog

ROOT = Path(__file__).resolve().parents[2]


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
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/train_seconds.json").write_text("1.0")
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


def test_infinity_is_logged_as_null_too_and_a_path_as_text(tmp_path):
    record = {"grad_norm": math.inf, "reward": -math.inf, "image": tmp_path / "a.png"}  # JSON has none of these
    runs.append_jsonl(tmp_path / "metrics.jsonl", record)
    (written,) = runs.read_jsonl(tmp_path / "metrics.jsonl")
    assert written == {"grad_norm": None, "reward": None, "image": f"{tmp_path}/a.png"}


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
