"""SIGTERM: a checkpoint, a sentence, exit code 143, and the same command ends as if nothing had been."""

import atexit
import errno
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forks
import httpx
import pytest
import torch
from safetensors import SafetensorError

from common import preemption, runs
from common.cli import make_model_main, run_main
from common.runs import RunFolder, read_jsonl
from common.tiny import tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
SRPO = ["srpo.train", "--config", "srpo/configs/tiny.yaml", "--max_steps", "40", "--save_steps", "40"]
SRPO += ["--logging_steps", "1", "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2"]


def stopped_once(condition, words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command that gets SIGTERM as soon as `condition()` is true."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not condition():
        time.sleep(0.02)
    process.terminate()
    return process.wait(timeout=200), process.stdout.read()


def test_training_saves_and_goes_on(tmp_path):
    """That it ends with the files of a straight run: test_checkpoints.py."""
    for part in tiny_qwen3(hidden=32):
        part.save_pretrained(tmp_path / "model")
    words = [*SRPO, "--model", str(tmp_path / "model"), "--out", str(tmp_path)]
    folder = tmp_path / "srpo/tiny-additions/srpo-seed0"
    metrics = folder / "metrics.jsonl"
    code, said = stopped_once(lambda: metrics.exists() and len(read_jsonl(metrics)) >= 3, words)
    assert code == 143, said
    assert "srpo.train: stopped; the same command goes on from here" in said
    (checkpoint,) = folder.glob("checkpoint-*")
    stopped = int(checkpoint.name.split("-")[1])
    assert 3 <= stopped < 40
    assert [line["step"] for line in read_jsonl(metrics)] == list(range(1, stopped + 1))
    assert not (folder / "model").exists()
    assert forks.call(["-m", *words], tmp_path / "log.txt", ROOT) == 0
    assert [line["step"] for line in read_jsonl(metrics)] == [*range(1, 41), 40]


class FakeTrainer:
    """Twelve steps, four on each generation batch unless said otherwise; the process gets SIGTERM in one of them."""

    def __init__(self, signal_at: int | None, steps_per_generation: int = 8, num_iterations: int = 1):
        self.args = SimpleNamespace(
            gradient_accumulation_steps=2, device="cpu",
            steps_per_generation=steps_per_generation, num_iterations=num_iterations,
        )  # fmt: skip
        self.signal_at, self.saved, self.state = signal_at, [], SimpleNamespace(global_step=0, max_steps=12)

    def add_callback(self, callback):
        if isinstance(callback, preemption.SaveOnSigterm):
            self.callback = callback

    def train(self, resume_from_checkpoint):
        self.resumed, control = resume_from_checkpoint, SimpleNamespace(should_save=False, should_training_stop=False)
        while self.state.global_step < 12 and not control.should_training_stop:
            self.state.global_step += 1
            if self.state.global_step == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.callback.on_step_end(self.args, self.state, control)
            if control.should_save:
                self.saved.append(self.state.global_step)
        self.callback.on_epoch_end(self.args, self.state, control)
        self.ended = True


def test_only_between_generation_batches():
    trainer = FakeTrainer(signal_at=5)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Preempted):
        preemption.train(trainer, "checkpoint-4")
    assert signal.getsignal(signal.SIGTERM) == before
    assert trainer.resumed == "checkpoint-4"
    assert trainer.saved == [8]
    assert not hasattr(trainer, "ended")


@pytest.mark.parametrize(
    ("steps_per_generation", "num_iterations", "saved"),
    [(None, 1, 4), (1, 1, 4), (4, 2, 4), (6, 1, 6), (3, 1, 6), (5, 1, 5), (1, 3, 6), (2, 5, 5)],
)
def test_where_generation_batches_and_steps_end_together(steps_per_generation, num_iterations, saved):
    """Also where a generation batch ends within a step of two micro-batches."""
    trainer = FakeTrainer(4, steps_per_generation, num_iterations)
    with pytest.raises(preemption.Preempted):
        preemption.train(trainer, None)
    assert trainer.saved == [saved]


def test_a_signal_in_the_last_step_leaves_the_end_of_the_training_alone():
    """transformers saves then by itself; the next start writes the model."""
    trainer = FakeTrainer(signal_at=12)
    with pytest.raises(preemption.Preempted):
        preemption.train(trainer, None)
    assert trainer.ended
    assert trainer.saved == []


def test_a_training_that_was_not_stopped_ends_as_ever():
    trainer = FakeTrainer(signal_at=None)
    preemption.train(trainer, None)
    assert trainer.ended
    assert (trainer.saved, trainer.state.global_step) == ([], 12)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1228608 vs 1228500"),
        OSError("1501 requested and 496 written"),  # numpy's
    ],
)
def test_a_full_disk_in_any_writer_is_one_sentence(capsys, error):
    def command(_):
        raise error

    assert run_main("x.y", command, []) == 2
    said = capsys.readouterr().err
    assert "x.y: the disk is full; free some of it, then the same command goes on from here" in said
    assert len(said.splitlines()) == 1


def test_a_full_disk_is_told_with_the_run_folder(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def command(_):
        with RunFolder.open(tmp_path / "run", {}, data={}, seed=0):
            monkeypatch.setattr(runs, "atomic_write_text", full)  # nor can the manifest be written
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    assert run_main("x.y", command, []) == 2
    assert f"(PytorchStreamWriter failed writing file data/0, in {tmp_path / 'run'})" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_sentence_before_any_work(capsys, tmp_path, monkeypatch, number):
    def refuse(dir):
        raise OSError(number, os.strerror(number), str(dir / "tmp1"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    makers = {"base": lambda out, seed: pytest.fail("minutes of work")}
    assert make_model_main("x.data", makers, ["base", str(tmp_path / "models" / "base")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"x.data: {tmp_path}/models/base/tmp1: {os.strerror(number)}: choose another path")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("method", ["va_opd", "srpo", "r_diverse"])
def test_a_file_in_the_place_of_a_folder_is_one_sentence_before_any_work(capsys, tmp_path, method):
    (tmp_path / "out").touch()
    loop = importlib.import_module(f"{method}.loop")
    config = ["--config", str(ROOT / method / "configs" / "tiny.yaml"), "--seeds", "0"]
    assert loop.main([*config, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{method}.loop: {tmp_path}/out") and "choose another path" in said
    assert len(said.splitlines()) == 1


def test_a_folder_that_can_be_written_keeps_no_trace_of_the_check(tmp_path, capsys):
    seen = []
    makers = {"base": lambda out, seed: seen.extend(out.iterdir()) or "made"}
    assert make_model_main("x.data", makers, ["base", str(tmp_path / "models" / "base")]) == 0
    assert seen == []
    assert "made after" in capsys.readouterr().out


@pytest.fixture
def at_exit(monkeypatch):
    """What is registered for the end of this process."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    return registered


def with_process_group(folder: Path):
    def command(_):
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)

    return command


def test_a_process_group_is_closed_at_exit_and_not_before(tmp_path, at_exit):
    assert run_main("x.y", with_process_group(tmp_path), []) == 0
    assert run_main("x.y", lambda _: torch.distributed.barrier(), []) == 0
    for end in at_exit:
        end()
    assert not torch.distributed.is_initialized()


def test_a_process_group_that_a_colocated_engine_uses_is_left_to_it(tmp_path, monkeypatch, at_exit):
    engine = SimpleNamespace(model_parallel_is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", engine)
    assert run_main("x.y", with_process_group(tmp_path), []) == 0
    at_exit[0]()
    assert torch.distributed.is_initialized()
    engine.model_parallel_is_initialized = lambda: False
    at_exit[0]()
    assert not torch.distributed.is_initialized()


def test_an_unknown_error_keeps_its_traceback():
    def command(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_main("x.y", command, [])


def test_commands_exit_with_143(capsys):
    def command(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    assert run_main("x.y", command, []) == 143
    assert "x.y: stopped; the same command goes on from here" in capsys.readouterr().err


def test_an_interrupted_call_returns_after_its_command(tmp_path):
    """Else the machine may be taken back while it saves."""
    started, saved = tmp_path / "started", tmp_path / "saved"
    child = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""

    def interrupt():
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(preemption.Preempted), preemption.sigterm_raises():
        preemption.call([sys.executable, "-c", child], dict(os.environ))
    assert saved.exists()


def test_a_command_in_a_thread_leaves_signals_alone():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_main, "x.y", lambda _: 3, []).result() == 3


def test_a_command_under_way_is_told_to_end(tmp_path):
    """An experiment passes the signal on, and waits until its command has saved."""
    child = "import signal, sys, time, pathlib\n"
    child += "def stop(*_): time.sleep(0.5); pathlib.Path('saved').touch(); sys.exit(143)\n"
    child += "signal.signal(signal.SIGTERM, stop); pathlib.Path('started').touch(); time.sleep(60)"
    parent = f"""
import sys
from pathlib import Path
from common.cli import run_main
from common.stages import run_stages
stage = [("child", [sys.executable, "-c", {child!r}])]
sys.exit(run_main("x", lambda _: run_stages([stage], Path("logs")), []))
"""
    process = forks.start(["-c", parent], tmp_path / "log.txt", tmp_path)
    while not (tmp_path / "started").exists():
        assert process.exitcode is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_command_ends_with_a_killed_experiment(tmp_path, side_by_side):
    """Else it would train on beside the one that is started again."""
    child = "import os, time, pathlib; pathlib.Path(str(os.getpid())).touch(); time.sleep(60)"
    commands = [("child", [sys.executable, "-c", child])] * (2 if side_by_side else 1)
    parent = f"""
import sys
from pathlib import Path
from common import stages
stages.os.cpu_count = lambda: 2
commands = [(name, [sys.executable, *words[1:]]) for name, words in {commands!r}]
commands = [(f"{{name}}{{i}}", words) for i, (name, words) in enumerate(commands)]
stages.run_stages([commands], Path("logs"))
"""
    process = forks.start(["-c", parent], tmp_path / "log.txt", tmp_path)
    while len(pids := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]) < len(commands):
        assert process.exitcode is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_a_lost_terminal_is_as_sigterm_and_nohup_holds(capsys, monkeypatch):
    def command(_):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)

    assert run_main("x.y", command, []) == 143
    assert "x.y: stopped" in capsys.readouterr().err
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_main("x.y", command, []) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_after_sigterm_does_not_cut_the_clearing_up():
    """A shell sends both."""
    before, cleared = signal.signal(signal.SIGHUP, signal.SIG_DFL), []

    def stopped():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            cleared.append(1)

    try:
        with pytest.raises(preemption.Preempted), preemption.sigterm_raises():
            stopped()
        assert cleared == [1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_ends_by_the_signal_and_clears_up_nothing():
    """As a worker of a data loader: files and child processes are its parent's."""
    reads, writes = os.pipe()
    with preemption.sigterm_raises():
        child = os.fork()
        if child == 0:
            try:
                os.write(writes, b"x")
                time.sleep(20)
            finally:
                os._exit(7)
        os.read(reads, 1)  # Python forgets a signal that comes before the child's first step
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_launched_process_takes_the_signal_that_its_launcher_passes_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    try:
        assert run_main("x.y", lambda _: os.kill(os.getpid(), signal.SIGHUP), []) == 143
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_written_after_the_terminal_is_lost_ends_nothing(tmp_path):
    """As training, which logs before it saves."""
    ours, theirs = os.openpty()
    program = f"""
import fcntl, os, pathlib, sys, termios, time
os.setsid()
terminal = os.open({os.ttyname(theirs)!r}, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for stream in range(3):
    os.dup2(terminal, stream)
from common.cli import run_main
from common.preemption import _handled
asked = []
def command(_):
    with _handled(lambda *_: asked.append(1)):
        print("it runs", flush=True)
        while not asked:
            time.sleep(0.01)
        for stream in (sys.stdout, sys.stderr):
            print("step 7", file=stream, flush=True)
        pathlib.Path({str(tmp_path / "saved")!r}).touch()
run_main("x.y", command, [])
"""
    process = forks.start(["-c", program], tmp_path / "log.txt", tmp_path)
    read = b""
    while b"it runs" not in read:
        assert process.exitcode is None, (tmp_path / "log.txt").read_text()
        read += os.read(ours, 1000) if select.select([ours], [], [], 0.05)[0] else b""
    os.close(ours)
    process.join(60)
    os.close(theirs)
    assert process.exitcode == 0
    assert (tmp_path / "saved").exists()


def test_servers_on_this_machine_are_reached_without_the_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    for _ in range(2):  # commands call commands
        assert run_main("x.y", lambda _: 0, []) == 0
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert urllib.request.proxy_bypass("127.0.0.1:8000") and urllib.request.proxy_bypass("example.org")
    assert not urllib.request.proxy_bypass("elsewhere.org")
    monkeypatch.setenv("no_proxy", "*")
    assert run_main("x.y", lambda _: 0, []) == 0
    assert os.environ["no_proxy"] == "*"  # which means all where it is alone
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with httpx.Client() as client:
        served, hub = (client._transport_for_url(httpx.URL(url)) for url in ("http://127.0.0.1:1", "http://a.org"))
    assert served is not hub
