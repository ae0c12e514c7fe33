"""A stopped or killed run ends with the same files as a straight one, and never trains from half a checkpoint."""

import inspect
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import PartialState
from transformers import Trainer
from trl import DistillationTrainer, GRPOTrainer, SFTTrainer

import r_diverse.train
import srpo.train
import va_opd.train
from common.checkpoints import LOG_SUMS, ExactCheckpoints, check_saves_weights, resume_point, thin_out
from common.preemption import SaveOnSigterm
from common.runs import (
    atomic_write_text,
    begin_checkpoint,
    checkpoint_fault,
    complete_checkpoint,
    last_checkpoint,
    read_jsonl,
    weights_fingerprint,
)
from common.tiny import tiny_qwen3, tiny_qwen3_vl
from common.training import train_seconds
from tests.processes import ZERO, run, two_processes

# Lines of metrics.jsonl and checkpoints fall on different steps, so that sums must live through a restart
TRAINER = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 4,
    "logging_steps": 3, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
PHASE = {"top_p": 1.0, "max_completion_length": 12}
SETTINGS = {
    "va_opd": {
        **TRAINER, "dataset": "digits", "limit": 64, "validation_size": 8, "max_completion_length": 6, "use_cpu": True,
    },
    "srpo": {**TRAINER, "dataset": "additions", "limit": 64, "max_completion_length": 4, "use_cpu": True},
    "r_diverse": {
        "m_reward": 2, "penalty": "none", "challenger_system": "", "challenger_user": "new", "solver_system": "",
        "answer_tokens": 4, "challenger": {**TRAINER, **PHASE},
    },
}  # fmt: skip
MODULES = {"va_opd": va_opd.train, "srpo": srpo.train, "r_diverse": r_diverse.train}
VARIANTS = [("va_opd", ()), ("va_opd", ("--method", "kd")), ("srpo", ()), ("r_diverse", ())]
OF_A_PROCESS = ("time", "second", "runtime", "_per_", "va/null")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    parts = {"text": tiny_qwen3(hidden=32), "student": tiny_qwen3_vl(32), "teacher": tiny_qwen3_vl(64, seed=1)}
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
    return {name: str(folder / name) for name in parts}


class Runs:
    """Runs of one method; `straight` is the undisturbed one."""

    def __init__(self, method: str, extra: tuple[str, ...], models: dict[str, str], folder: Path):
        self.method, self.extra, self.folder = method, extra, folder
        own = {"model": models["student"], "teacher": models["teacher"]} if method == "va_opd" else {}
        settings = {"model": models["text"], **own, "experiment": "x", **SETTINGS[method]}
        atomic_write_text(folder / "settings.yaml", yaml.safe_dump(settings))
        assert self.run("straight") == 0

    def run(self, name: str) -> int:
        first = ["challenger", "--iteration", "1"] if self.method == "r_diverse" else []
        config = ["--config", str(self.folder / "settings.yaml"), "--out", str(self.folder / name)]
        return MODULES[self.method].main([*first, *config, *self.extra])

    def path(self, name: str) -> Path:
        """The folder with the logs."""
        (metrics,) = (self.folder / name).rglob("metrics.jsonl")
        return metrics.parent

    def copy_of_straight(self, name: str) -> Path:
        """A run killed after its last checkpoint."""
        shutil.copytree(self.folder / "straight", self.folder / name)
        path = self.path(name)
        shutil.rmtree(path / "model")
        manifest = path / "manifest.json"
        if manifest.exists():
            manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
        return path

    def content(self, name: str) -> dict:
        path = self.path(name)
        lines = read_jsonl(path / "metrics.jsonl")
        return {
            "metrics": [{k: v for k, v in line.items() if not any(p in k for p in OF_A_PROCESS)} for line in lines],
            "samples": (path / "samples.jsonl").read_text() if (path / "samples.jsonl").exists() else None,
            "weights": (path / "model/model.safetensors").read_bytes(),
            "checkpoints": sorted(folder.name for folder in path.glob("checkpoint-*")),
        }


def even_length(completions, answer, **columns) -> list[float]:
    """A random policy never adds right: a reward from which there is something to learn."""
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


@pytest.fixture(scope="module", autouse=True)
def easy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srpo.train, "reward_of", lambda *_: even_length)
        yield


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda p: "-".join([p[0], *p[1][1:]]))
def method(request, models, tmp_path_factory) -> Runs:
    return Runs(*request.param, models, tmp_path_factory.mktemp(request.param[0]))


def sigterm_at(monkeypatch, step: int) -> None:
    asked, original = [], SaveOnSigterm.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(SaveOnSigterm, "on_step_end", on_step_end)


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_ends_with_the_files_of_a_straight_one(method, monkeypatch, step):
    sigterm_at(monkeypatch, step)
    name = f"stopped-{step}"
    assert method.run(name) == 143
    last = {2: 4, 5: 8}[step] if method.method == "r_diverse" else step  # of a generation batch
    (path,) = (folder.parent for folder in (method.folder / name).rglob(f"checkpoint-{last}"))
    assert not (path / "model").exists()
    if last < 8:  # no line that closes the training
        logged = read_jsonl(path / "metrics.jsonl") if last >= 3 else []
        assert [line["step"] for line in logged] == [3][: last // 3]
    assert method.run(name) == 0
    straight = method.content("straight")
    assert [line["step"] for line in straight["metrics"]] == [3, 6, 8]
    if straight["samples"] is not None:  # none with the line that closes the training
        assert {json.loads(line)["step"] for line in straight["samples"].splitlines()} == {3, 6}
    assert method.content(name) == straight


def test_a_run_killed_after_its_last_checkpoint_does_not_train_on(method, capsys):
    method.copy_of_straight("killed")
    assert method.run("killed") == 0
    assert ": resuming at step 8\n" in capsys.readouterr().out
    assert method.content("killed") == method.content("straight")
    path = method.path("killed")
    seconds = [line["train_seconds"] for line in read_jsonl(path / "metrics.jsonl")]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == train_seconds(last_checkpoint(path))


def test_what_a_kill_after_the_last_checkpoint_has_left_is_cleared_up(srpo_runs):
    """Between its last file and the clearing up; SIGTERM's checkpoint would be evaluated among the others."""
    path = srpo_runs.copy_of_straight("untidy")
    shutil.copytree(path / "checkpoint-8", path / "checkpoint-6")
    shutil.copy(path / "checkpoint-8/optimizer.pt", path / "checkpoint-4")
    assert srpo_runs.run("untidy") == 0
    assert srpo_runs.content("untidy") == srpo_runs.content("straight")
    assert not (path / "checkpoint-4/optimizer.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


DAMAGES = {
    "model.safetensors has": cut,
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "complete.json cannot be read": lambda folder: os.truncate(folder / "complete.json", 10),
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
}


@pytest.fixture(scope="module")
def srpo_runs(models, tmp_path_factory, easy) -> Runs:
    """With the run `at-4`, stopped at step 4."""
    runs = Runs("srpo", (), models, tmp_path_factory.mktemp("srpo"))
    with pytest.MonkeyPatch.context() as patch:
        sigterm_at(patch, 4)
        assert runs.run("at-4") == 143
    return runs


def said(capsys) -> list[str]:
    """Lines on stderr but those of libraries."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "checkpoint-" in line and not line.startswith("[transformers]")]


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(srpo_runs, capsys, fault):
    name = f"older-{fault.split()[0]}"
    shutil.copytree(srpo_runs.folder / "at-4", srpo_runs.folder / name)
    newest = srpo_runs.path(name) / "checkpoint-8"
    shutil.copytree(srpo_runs.path("straight") / "checkpoint-8", newest)
    DAMAGES[fault](newest)
    assert srpo_runs.run(name) == 0
    (sentence,) = said(capsys)
    assert sentence.startswith(f"{newest}: {fault}") and sentence.endswith("; going on from checkpoint-4")
    assert srpo_runs.content(name) == srpo_runs.content("straight")


@pytest.mark.parametrize("fault", DAMAGES)
def test_without_a_whole_checkpoint_nothing_is_touched(srpo_runs, capsys, fault):
    path = srpo_runs.copy_of_straight(f"none-{fault.split()[0]}")  # its checkpoint-4 has weights only
    DAMAGES[fault](path / "checkpoint-8")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert srpo_runs.run(f"none-{fault.split()[0]}") == 2
    (sentence,) = said(capsys)
    assert fault in sentence and "restore its files, or delete all checkpoint folders beside it" in sentence
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_a_save_cut_short_by_a_kill_is_no_checkpoint(srpo_runs, capsys):
    shutil.copytree(srpo_runs.folder / "at-4", srpo_runs.folder / "cut")
    newest = srpo_runs.path("cut") / "checkpoint-4"
    (newest / "complete.json").write_text("false")
    assert srpo_runs.run("cut") == 0
    assert said(capsys) == [f"{newest}: it was not saved to its end; starting from the beginning"]
    assert srpo_runs.content("cut") == srpo_runs.content("straight")


def test_older_checkpoints_of_other_code_with_weights_only_are_not_used(srpo_runs, capsys):
    path = srpo_runs.copy_of_straight("weights")
    (path / "checkpoint-4/complete.json").unlink()
    cut(path / "checkpoint-8")
    assert srpo_runs.run("weights") == 2
    assert "no older checkpoint can be resumed from" in said(capsys)[0]


def test_a_checkpoint_of_other_code_is_used(srpo_runs, capsys):
    shutil.copytree(srpo_runs.folder / "at-4", srpo_runs.folder / "other")
    for name in ("complete.json", "log_sums_0.pt"):
        (srpo_runs.path("other") / "checkpoint-4" / name).unlink()
    assert srpo_runs.run("other") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert srpo_runs.content("other")["weights"] == srpo_runs.content("straight")["weights"]


@pytest.mark.parametrize("trainer", [GRPOTrainer, DistillationTrainer, SFTTrainer])
def test_what_is_used_of_transformers(trainer):
    """An upgrade that renames a sum, or that saves in another order, fails here."""
    sources = "".join(map(inspect.getsource, trainer.__mro__[:-1]))
    for name in (*LOG_SUMS, "_tr_loss", "_metrics"):
        assert f"self.{name}" in sources
    given = ["epoch_iterator", "num_batches", "device"]
    assert list(inspect.signature(Trainer.get_batch_samples).parameters)[1:] == given
    saving = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert saving.index("_save_checkpoint(") < saving.index("callback_handler.on_save(")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def checkpoint_of(path: Path, step: int, processes: int, deepspeed: bool) -> Path:
    """Files as transformers and DeepSpeed name them."""
    folder = path / f"checkpoint-{step}"
    begin_checkpoint(folder)
    names = ["model.safetensors", *(f"rng_state_{rank}.pth" for rank in range(processes))]
    names += [f"global_step{step}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
    for name in names if deepspeed else [*names[: processes + 1], "optimizer.pt"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x" * 9)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert checkpoint_fault(folder) == "it was not saved to its end"
    complete_checkpoint(folder)
    return folder


def trainer(path: Path, processes: int, deepspeed: bool, rank: int = 0) -> SimpleNamespace:
    args = SimpleNamespace(
        output_dir=str(path), world_size=processes, process_index=rank, save_strategy="steps", save_total_limit=None
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    return SimpleNamespace(args=args, is_deepspeed_enabled=deepspeed, is_fsdp_enabled=False, accelerator=accelerator)


@pytest.mark.parametrize(
    ("fsdp", "deepspeed", "message"),
    [
        ("SHARDED_STATE_DICT", None, "set it to FULL_STATE_DICT"),
        ("StateDictType.FULL_STATE_DICT", None, None),
        (None, (3, False), "zero3_save_16bit_model is off"),
        (None, (3, True), None),
        (None, (2, False), None),
    ],
)
def test_a_config_whose_checkpoints_have_no_weights_is_refused(fsdp, deepspeed, message):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=fsdp))
    if deepspeed:
        state.deepspeed_plugin = SimpleNamespace(zero_stage=deepspeed[0], zero3_save_16bit_model=deepspeed[1])
    trainer = SimpleNamespace(
        is_fsdp_enabled=bool(fsdp), is_deepspeed_enabled=bool(deepspeed), accelerator=SimpleNamespace(state=state)
    )
    if message is None:
        check_saves_weights(trainer)
    else:
        with pytest.raises(ValueError, match=message):
            resume_point(trainer)  # before anything is looked for


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ((2, False), (4, False), "by 2 processes without DeepSpeed and the run cannot go on with 4 without it"),
        ((2, False), (1, False), "by 2 processes without DeepSpeed and the run cannot go on with 1 without it"),
        ((2, True), (4, True), "by 2 processes with DeepSpeed and the run cannot go on with 4 with it"),
        ((2, True), (2, False), "by 2 processes with DeepSpeed and the run cannot go on with 2 without it"),
    ],
)
def test_a_run_does_not_go_on_with_other_processes(tmp_path, before, now, message):
    saved = checkpoint_of(tmp_path, 4, *before)
    assert resume_point(trainer(tmp_path, *before)) == saved
    with pytest.raises(ValueError, match=message):
        resume_point(trainer(tmp_path, *now))


def stopped_and_straight(folder: Path) -> dict:
    """In each of two processes, of which the second gets SIGTERM, two steps into an epoch of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srpo.train, "reward_of", lambda *_: even_length)
        patch.setitem(SETTINGS, "srpo", {**SETTINGS["srpo"], "limit": 12})
        runs = Runs("srpo", (), {"text": str(folder / "text")}, folder)
        if os.environ["RANK"] == "1":
            sigterm_at(patch, 5)
        codes = [runs.run("stopped"), runs.run("stopped")]
    PartialState().wait_for_everyone()  # the first writes the model
    return {"codes": codes, "stopped": runs.content("stopped"), "straight": runs.content("straight")}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("sharding", ZERO[:1])
def test_two_processes_stop_at_the_same_step_and_go_on(sharding, models, tmp_path):
    shutil.copytree(models["text"], tmp_path / "text")
    for rank in two_processes(__file__, tmp_path, sharding):
        assert rank["codes"] == [143, 0]
        assert rank["stopped"] == rank["straight"]


def saved_checkpoint(folder: Path) -> Path:
    """With weights in two files, what resuming needs, and what an evaluation looks at."""
    (folder / "self_teacher").mkdir(parents=True)
    for name in ("model-1.safetensors", "model-2.safetensors", "optimizer.pt", "self_teacher/average.safetensors"):
        (folder / name).write_text(name)
    (folder / "config.json").write_text("{}")
    complete_checkpoint(folder)
    return folder


def test_what_is_deleted_of_an_evaluated_checkpoint(tmp_path):
    older, newest = (saved_checkpoint(tmp_path / f"checkpoint-{step}") for step in (2, 4))
    whole = weights_fingerprint(str(newest))
    for _ in range(2):
        thin_out(older, weights=True)
        thin_out(newest, weights=False)
        assert sorted(path.name for path in older.iterdir()) == ["complete.json", "config.json"]
        names = ["complete.json", "config.json", "model-1.safetensors", "model-2.safetensors"]
        assert sorted(path.name for path in newest.iterdir()) == names
        assert weights_fingerprint(str(newest)) == whole and weights_fingerprint(str(older)) is None


def test_what_a_kill_leaves_of_weights_does_not_pass_for_them(tmp_path, monkeypatch):
    checkpoint, unlink = saved_checkpoint(tmp_path / "checkpoint-2"), Path.unlink

    def killed(path: Path) -> None:
        unlink(path)
        if path.name == "model-1.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            thin_out(checkpoint, weights=True)
    assert len(list(checkpoint.glob("*.safetensors"))) == 1 and weights_fingerprint(str(checkpoint)) is None
    thin_out(checkpoint, weights=True)
    assert not list(checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("linked", [".", "model-2.safetensors", "self_teacher"])
def test_nothing_is_deleted_through_a_link(tmp_path, capsys, linked):
    """A checkpoint that was moved to another disk, say, or shares a file with another run."""
    checkpoint = saved_checkpoint(tmp_path / "run/checkpoint-2")
    shutil.move(checkpoint / linked, tmp_path / "elsewhere")
    (checkpoint / linked).symlink_to(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    thin_out(checkpoint, weights=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert f"{checkpoint} is a link or holds one: nothing in it is deleted" in capsys.readouterr().err


def test_the_older_checkpoint_goes_only_when_the_newer_one_is_whole(models, tmp_path, monkeypatch):
    """A phase of R-Diverse keeps one, which transformers would delete before the next can be resumed from."""
    runs = Runs("r_diverse", (), models, tmp_path)

    def killed(folder: Path) -> None:
        if folder.name == "checkpoint-8":
            raise KeyboardInterrupt
        complete_checkpoint(folder)

    with monkeypatch.context() as patch:
        patch.setattr("common.checkpoints.complete_checkpoint", killed)
        assert runs.run("killed") == 130
    assert last_checkpoint(runs.path("killed")).name == "checkpoint-4"
    assert runs.run("killed") == 0
    assert runs.content("killed") == runs.content("straight")


def test_what_a_kill_left_beyond_the_step_is_not_taken_for_the_newest(models, tmp_path, monkeypatch):
    """Killed while checkpoint-8 is written, gone on from 4, stopped at 6: that one stays and not the rest of 8."""
    monkeypatch.setitem(SETTINGS, "srpo", {**SETTINGS["srpo"], "save_total_limit": 1})
    monkeypatch.setattr(srpo.train, "reward_of", lambda *_: even_length)
    runs = Runs("srpo", (), models, tmp_path)
    sigterm_at(monkeypatch, 4)
    assert runs.run("stopped") == 143
    begin_checkpoint(runs.path("stopped") / "checkpoint-8")
    sigterm_at(monkeypatch, 6)
    assert runs.run("stopped") == 143
    assert [folder.name for folder in runs.path("stopped").glob("checkpoint-*")] == ["checkpoint-6"]
    assert runs.run("stopped") == 0
    assert runs.content("stopped") == runs.content("straight")


def test_a_run_that_saves_at_its_end_alone_can_be_stopped_twice(models, tmp_path, monkeypatch):
    """save_steps=0: SIGTERM's checkpoints are none of a schedule."""
    monkeypatch.setitem(SETTINGS, "srpo", {**SETTINGS["srpo"], "save_steps": 0})
    monkeypatch.setattr(srpo.train, "reward_of", lambda *_: even_length)
    runs = Runs("srpo", (), models, tmp_path)
    for step in (4, 6):
        sigterm_at(monkeypatch, step)
        assert runs.run("stopped") == 143
        assert [folder.name for folder in runs.path("stopped").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert runs.run("stopped") == 0
    assert runs.content("stopped") == runs.content("straight")
    assert runs.content("straight")["checkpoints"] == ["checkpoint-8"]


def test_the_limit_of_checkpoints_is_only_away_while_training(tmp_path):
    """Else training_args.bin, beside the trained model, would have another."""
    args, state = trainer(tmp_path, 1, deepspeed=False).args, SimpleNamespace(global_step=0, max_steps=8)
    args.save_total_limit, callback = 2, ExactCheckpoints(None, None, keep_weights=True)
    callback.on_train_begin(args, state, None)
    assert (args.save_total_limit, callback.limit) == (None, 2)
    callback.on_train_end(args, state, None)
    assert args.save_total_limit == 2


def test_the_best_checkpoint_is_kept(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint_of(tmp_path, step, processes=1, deepspeed=False)
    callback = ExactCheckpoints(None, None, keep_weights=True)
    callback.limit = 2
    state = SimpleNamespace(global_step=8, save_steps=2, best_model_checkpoint=str(tmp_path / "checkpoint-4"))
    callback._tidy(trainer(tmp_path, 1, deepspeed=False).args, state)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("keep_weights", [True, False])
def test_only_the_newest_keeps_what_only_resuming_needs(tmp_path, keep_weights):
    folders = [checkpoint_of(tmp_path, step, processes=1, deepspeed=False) for step in (4, 8)]
    resuming = {"optimizer.pt", "self_teacher", "pytorch_model_fsdp_0"}
    for folder in folders:
        (folder / "self_teacher").mkdir()
        (folder / "pytorch_model_fsdp_0").mkdir()
    callback, state = ExactCheckpoints(None, None, keep_weights), SimpleNamespace(global_step=8, save_steps=4)
    callback._tidy(trainer(tmp_path, 1, deepspeed=False).args, state)
    older, newest = ({path.name for path in folder.iterdir()} for folder in folders)
    assert newest - older == (resuming if keep_weights else set())
    assert {"model.safetensors", "trainer_state.json"} < older


@pytest.mark.parametrize("limit", [None, 0, -1])  # none, as transformers reads them
def test_checkpoints_of_epochs_are_all_of_the_schedule(tmp_path, limit):
    for step in (3, 6):
        checkpoint_of(tmp_path, step, processes=1, deepspeed=False)
    args, state = trainer(tmp_path, 1, deepspeed=False).args, SimpleNamespace(global_step=6, save_steps=500)
    args.save_strategy = "epoch"
    callback = ExactCheckpoints(None, None, keep_weights=True)
    callback.limit = limit
    callback._tidy(args, state)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("rank", "begun", "saved"),
    [(0, ["begin", "wait"], ["sums 0", "wait", "complete", "tidy"]), (1, ["wait"], ["sums 1", "wait"])],
)
def test_a_checkpoint_is_whole_when_every_process_has_written_its_part(tmp_path, monkeypatch, rank, begun, saved):
    """The first process empties the folder before any writes there, and completes it after all have."""
    done = []
    monkeypatch.setattr("common.checkpoints.begin_checkpoint", lambda folder: done.append("begin"))
    monkeypatch.setattr("common.checkpoints.complete_checkpoint", lambda folder: done.append("complete"))
    monkeypatch.setattr(ExactCheckpoints, "_tidy", lambda *_: done.append("tidy"))
    monkeypatch.setattr("torch.save", lambda sums, path: done.append(f"sums {path.stem.split('_')[-1]}"))
    fake = trainer(tmp_path, 2, deepspeed=False, rank=rank)
    fake.accelerator.wait_for_everyone = lambda: done.append("wait")
    fake._metrics, fake._tr_loss = {"train": {}}, None
    for name in LOG_SUMS:
        setattr(fake, name, 0)
    callback = ExactCheckpoints(fake, None, keep_weights=True)
    state, control = SimpleNamespace(global_step=4, save_steps=4), SimpleNamespace(should_save=True)
    for event in (callback.on_step_end, callback.on_epoch_end):
        event(fake.args, state, control)
        assert done == begun
        done.clear()
    callback.on_save(fake.args, state, control)
    assert done == saved


def test_the_first_process_alone_names_the_newest_that_is_not_whole(tmp_path, capsys):
    (checkpoint_of(tmp_path, 2, processes=2, deepspeed=False) / "optimizer.pt").unlink()
    whole = checkpoint_of(tmp_path, 4, processes=2, deepspeed=False)
    assert resume_point(trainer(tmp_path, 2, deepspeed=False)) == whole
    assert said(capsys) == []  # of an older one, which may have weights only
    for step in (6, 8):
        begin_checkpoint(tmp_path / f"checkpoint-{step}")
    assert resume_point(trainer(tmp_path, 2, deepspeed=False, rank=1)) == whole
    assert said(capsys) == []
    assert resume_point(trainer(tmp_path, 2, deepspeed=False)) == whole
    newest = tmp_path / "checkpoint-8"
    assert said(capsys) == [f"{newest}: it was not saved to its end; going on from checkpoint-4"]


def test_deepspeeds_parts_are_looked_at_and_freed(tmp_path):
    older, newest = (checkpoint_of(tmp_path, step, processes=2, deepspeed=True) for step in (4, 8))
    sigterms = checkpoint_of(tmp_path, 6, processes=2, deepspeed=True)
    state = SimpleNamespace(global_step=8, save_steps=4)
    ExactCheckpoints(None, None, keep_weights=True)._tidy(trainer(tmp_path, 2, deepspeed=True).args, state)
    assert not sigterms.exists()
    assert (older / "model.safetensors").exists()
    assert not (older / "global_step4").exists()
    assert last_checkpoint(tmp_path) == newest
    (newest / "global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt").write_text("x" * 8)
    assert "rank_1_mp_rank_00_optim_states.pt has 8 of 9 bytes" in checkpoint_fault(newest)
    (newest / "global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt").write_text("x" * 10)
    assert "rank_1_mp_rank_00_optim_states.pt has 10 of 9 bytes" in checkpoint_fault(newest)
    assert last_checkpoint(tmp_path) is None


if __name__ == "__main__":
    run(stopped_and_straight)
