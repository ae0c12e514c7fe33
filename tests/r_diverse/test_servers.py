"""Child servers: started, polled, ended with all that they started; here a small HTTP server plays vLLM."""

import os
import subprocess
import sys
import time

import pytest

from common.tiny import tiny_qwen3
from r_diverse import RDiverseConfig
from r_diverse.servers import free_port, serving, vllm_command
from r_diverse.train import server_engine

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
names = ("VLLM_USE_FLASHINFER_SAMPLER", "CUDA_VISIBLE_DEVICES")
print("child", child.pid, *map(os.environ.get, names), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_server_and_its_children_end_with_the_block(tmp_path):
    port, log = free_port(), tmp_path / "logs" / "server.log"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with serving([sys.executable, "-c", SERVER, str(port)], port, log, gpus="3", ready_seconds=60) as url:
            assert url == f"http://127.0.0.1:{port}/v1"
            child, *environment = log.read_text().split()[1:]
            child = int(child)
            assert alive(child) and environment == ["0", "3"]
        time.sleep(0.2)
        assert not alive(child)
        assert bystander.poll() is None  # another Python of the user goes on
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_ends_also_when_the_work_fails(tmp_path):
    port, log = free_port(), tmp_path / "server.log"

    def interrupted():
        with serving([sys.executable, "-c", SERVER, str(port)], port, log):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    time.sleep(0.2)
    assert not alive(int(log.read_text().split()[1]))


def test_a_server_that_dies_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; print('out of memory'); sys.exit(3)"]
    with (
        pytest.raises(ConnectionError, match=r"ended with exit code 3; .*out of memory"),
        serving(command, free_port(), tmp_path / "server.log", ready_seconds=30),
    ):
        pass


def test_the_cause_is_shown_where_the_last_lines_only_point_to_it(tmp_path):
    lines = ["INFO starting", "(EngineCore) ValueError: Free memory on device cuda:0 (3/80 GiB) is less than desired"]
    lines += [f"frame {i}" for i in range(9)] + [
        "RuntimeError: Engine core initialization failed. See root cause above."
    ]
    command = [sys.executable, "-c", f"import sys; print({chr(10).join(lines)!r}); sys.exit(1)"]
    with (
        pytest.raises(ConnectionError, match=r"Free memory on device cuda:0 .* \| \.\.\. \| frame 5 .*See root cause"),
        serving(command, free_port(), tmp_path / "server.log", ready_seconds=30),
    ):
        pass


def test_a_server_that_never_answers_is_given_up(tmp_path):
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with (
        pytest.raises(ConnectionError, match="did not answer within 1 s"),
        serving(command, free_port(), tmp_path / "server.log", ready_seconds=1),
    ):
        pass


def test_the_command_of_vllm():
    command = vllm_command("a model", 8000, 0.4, replicas=4, tensor_parallel=2, max_model_len=4096)
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "a model"]
    assert command[command.index("--data-parallel-size") + 1] == "4"
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert command[command.index("--max-model-len") + 1] == "4096"
    assert command[command.index("--served-model-name") + 1] == "a model"
    for flag in ("--data-parallel-size", "--tensor-parallel-size", "--max-model-len", "--chat-template"):
        assert flag not in vllm_command("m", 1, 0.5)
    assert vllm_command("m", 1, 0.5, chat_template="{{ x }}")[-2:] == ["--chat-template", "{{ x }}"]


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
