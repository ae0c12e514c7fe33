"""Child servers: started, polled, ended with all that they started; here a small HTTP server plays vLLM."""

import contextlib
import ctypes
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.preemption import sigterm_raises
from common.tiny import tiny_qwen3
from r_diverse import RDiverseConfig, servers
from r_diverse.servers import free_port, serving, vllm_command
from r_diverse.train import server_engine

SERVER = """
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE)
child.stdout.readline()
names = ("VLLM_USE_FLASHINFER_SAMPLER", "CUDA_VISIBLE_DEVICES")
print("child", child.pid, *map(os.environ.get, names), flush=True)
if "interrupts" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
WORKER = "import signal, sys, time\n{}\nprint('ready', flush=True)\ntime.sleep(600)"
HEEDS, IS_DEAF = WORKER.format(""), WORKER.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
CLEARS_UP = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open({!r}, 'w').close(), sys.exit()))"
SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


@pytest.fixture
def ctrl_c():
    """SIGINT raises also where the tests run in the background of a script, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def worker_of_a_server(
    log: Path, work: Callable[[int], None] = lambda _: None, worker: str = HEEDS, *words: str
) -> int:
    """Process id of what a server started that has run while `work` was done with it."""
    port = free_port()
    with serving([sys.executable, "-c", SERVER, str(port), worker, *words], port, log, ready_seconds=60):
        child = int(log.read_text().split()[1])
        assert alive(child)
        work(child)
    return child


@pytest.mark.parametrize(
    ("own", "gpus", "seen"), [({}, "3", ["0", "3"]), ({SAMPLER: "1", "CUDA_VISIBLE_DEVICES": "7"}, None, ["1", "7"])]
)
def test_a_server_and_its_children_end_with_the_block(tmp_path, monkeypatch, own, gpus, seen):
    monkeypatch.delenv(SAMPLER, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    port, log = free_port(), tmp_path / "logs" / "server.log"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with serving([sys.executable, "-c", SERVER, str(port), HEEDS], port, log, gpus, ready_seconds=60) as url:
            assert url == f"http://127.0.0.1:{port}/v1"
            child, *environment = log.read_text().split()[1:]
            child = int(child)
            assert alive(child) and environment == seen
        assert not alive(child)
        assert bystander.poll() is None  # another Python of the user goes on
    finally:
        bystander.kill()
        bystander.wait()


def test_a_worker_that_is_deaf_to_sigterm_ends_too(tmp_path, monkeypatch):
    """Its server ends at once, and no longer waits for it."""
    monkeypatch.setattr(servers, "GROUP_SECONDS", 0.1)
    child = worker_of_a_server(tmp_path / "server.log", worker=IS_DEAF)
    assert not alive(child)


def test_a_worker_that_outlives_its_server_has_time_to_clear_up(tmp_path):
    worker_of_a_server(tmp_path / "server.log", worker=WORKER.format(CLEARS_UP.format(str(tmp_path / "cleared"))))
    assert (tmp_path / "cleared").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="orphans of a process are its own on Linux only")
def test_a_worker_that_nobody_reaps_is_no_failure(tmp_path, monkeypatch):
    """As in a container whose first process does not reap: the group is never empty."""
    monkeypatch.setattr(servers, "GROUP_SECONDS", 0.1)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = worker_of_a_server(tmp_path / "server.log")
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)
    os.killpg(os.getpgid(child), 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_group_that_may_not_be_signalled_is_no_failure(tmp_path, monkeypatch):
    """So macOS says that only zombies are left."""
    command = [sys.executable, "-c", "print('out of memory')"]

    def forbidden(group, number):
        raise PermissionError

    monkeypatch.setattr(os, "killpg", forbidden)
    with (
        pytest.raises(ConnectionError, match="ended with exit code 0"),
        serving(command, free_port(), tmp_path / "server.log", ready_seconds=30),
    ):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_server_ends_also_when_the_work_fails(tmp_path, error):
    def fails(_):
        raise error

    log = tmp_path / "server.log"
    with pytest.raises(error):
        worker_of_a_server(log, fails)
    assert not alive(int(log.read_text().split()[1]))


def test_a_second_ctrl_c_ends_a_server_at_once(tmp_path, ctrl_c):
    """It comes while the server, which does not heed SIGTERM, is waited for."""
    log = tmp_path / "server.log"
    with pytest.raises(KeyboardInterrupt):
        worker_of_a_server(log, lambda _: None, IS_DEAF, "interrupts")
    assert not alive(int(log.read_text().split()[1]))


def test_a_server_that_dies_says_why(tmp_path):
    words = "import os, sys; sys.stdout.buffer.write(bytes([255])); sys.exit(f'OSError: no memory in {os.getcwd()}')"
    command = [sys.executable, "-c", words]  # the byte is no UTF-8
    with (
        pytest.raises(ConnectionError, match=rf"ended with exit code 1; .*no memory in {tmp_path}") as error,
        serving(command, free_port(), tmp_path / "log", ready_seconds=30, preexec_fn=lambda: os.chdir(tmp_path)),
    ):
        pass
    assert str(error.value).count("no memory") == 1


def test_a_lost_connection_tells_whether_the_server_has_ended(tmp_path):
    def lost(child):
        raise ConnectionError("no answer")

    def ended(child):
        server = os.getpgid(child)
        os.kill(server, signal.SIGKILL)
        while alive(server):
            time.sleep(0.01)
        lost(child)

    with pytest.raises(ConnectionError, match="^no answer$"):
        worker_of_a_server(tmp_path / "log", lost)
    with pytest.raises(ConnectionError, match=r"^no answer; the server ended with exit code -9; the end of .*child"):
        worker_of_a_server(tmp_path / "log", ended)


def test_the_cause_is_shown_where_the_last_lines_only_point_to_it(tmp_path):
    lines = ["INFO starting", "(EngineCore) ValueError: Free memory on device cuda:0 (3/80 GiB) is less than desired"]
    lines += ["(Worker) RuntimeError: cancelled"]
    lines += [f"frame {i}" for i in range(9)] + [
        "RuntimeError: Engine core initialization failed. See root cause above."
    ]
    command = [sys.executable, "-c", f"import sys; print({chr(10).join(lines)!r}); sys.exit(1)"]
    (tmp_path / "server.log").write_text("OSError: of an earlier server on this port\n")
    with (
        pytest.raises(ConnectionError, match=r"Free memory on device cuda:0 .* \| \.\.\. \| frame 5 .*See root cause"),
        serving(command, free_port(), tmp_path / "server.log", ready_seconds=30),
    ):
        pass


def test_an_answer_that_is_no_http_is_none_yet(tmp_path, monkeypatch):
    answers = iter([http.client.BadStatusLine("SSH-2.0"), OSError()])

    def urlopen(url, timeout):
        assert url == "http://127.0.0.1:1/health"  # which vLLM answers with 200 while its engine lives
        if error := next(answers, None):
            raise error
        return contextlib.nullcontext()

    monkeypatch.setattr(servers.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.01)
    with serving([sys.executable, "-c", "import time; time.sleep(600)"], 1, tmp_path / "log", ready_seconds=60) as url:
        assert url == "http://127.0.0.1:1/v1" and next(answers, None) is None


def test_a_server_that_never_answers_is_given_up(tmp_path):
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    log = tmp_path / "server.log"
    with (
        pytest.raises(ConnectionError, match="did not answer within 1 s"),
        serving(command, free_port(), log, ready_seconds=1),
    ):
        pass
    assert not alive(int(log.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_a_server_starts_ends_it(tmp_path, ctrl_c, number):
    words = f"import os, time; print(os.getpid(), flush=True); time.sleep(0.3); os.kill(os.getppid(), {number})"
    log = tmp_path / "server.log"
    with (
        sigterm_raises(),
        pytest.raises(KeyboardInterrupt),
        serving([sys.executable, "-c", f"{words}; time.sleep(600)"], free_port(), log, ready_seconds=60),
    ):
        pytest.fail("it never answers")
    assert not alive(int(log.read_text()))


def test_the_command_of_vllm():
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "a model", "--port", "8123"]
    command += ["--host", "127.0.0.1", "--gpu-memory-utilization", "0.4", "--served-model-name", "a model"]
    assert vllm_command("a model", 8123, 0.4) == command
    more = ["--data-parallel-size", "2", "--tensor-parallel-size", "3", "--max-model-len", "4096"]
    assert vllm_command("a model", 8123, 0.4, 2, 3, 4096, "{{ x }}") == [*command, *more, "--chat-template", "{{ x }}"]


def test_a_server_of_a_base_model_is_told_the_end_of_a_turn(tmp_path):
    pytest.importorskip("openai")
    model, tokenizer = tiny_qwen3(hidden=32)
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = RDiverseConfig(str(tmp_path), chat_template_kwargs={"enable_thinking": False})
    engine = server_engine("http://127.0.0.1:9/v1", str(tmp_path), run)
    assert engine.stops == [turn_end]
    assert engine.template_options == {"enable_thinking": False}
