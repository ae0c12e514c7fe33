"""Child processes that serve a model with vLLM: started, polled until they answer, ended by their process group."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

READY_SECONDS = 1800  # loading 8B weights from a cold network disk and compiling
POLL_SECONDS = 0.5
END_SECONDS = 20  # for a server that was told to end; vLLM ends its workers meanwhile
GROUP_SECONDS = 5  # for workers that outlive it
CAUSE = re.compile(r"\b(?:\w+Error|OutOfMemory\w*): ")


def vllm_command(
    model: str,
    port: int,
    memory: float,
    replicas: int = 1,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    chat_template: str | None = None,
) -> list[str]:
    """The command `vllm serve` for one model, which takes the share `memory` of each GPU's memory.

    Args:
        replicas: copies of the model, each on `tensor_parallel` GPUs.
        max_model_len: tokens of prompt and answer together; None is the model's own limit.
        chat_template: Jinja text for a model that has none.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--gpu-memory-utilization", str(memory), "--served-model-name", model]
    if replicas > 1:
        command += ["--data-parallel-size", str(replicas)]
    if tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(tensor_parallel)]
    if max_model_len:
        command += ["--max-model-len", str(max_model_len)]
    return command + (["--chat-template", chat_template] if chat_template else [])


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    port: int,
    log: Path,
    gpus: str | None = None,
    ready_seconds: float = READY_SECONDS,
    preexec_fn: Callable[[], None] | None = None,
) -> Iterator[str]:
    """Starts a server, yields its address, such as http://127.0.0.1:8000/v1, and ends its process group afterwards.

    `gpus` is its CUDA_VISIBLE_DEVICES, `preexec_fn` as in `subprocess.Popen`. Raises `ConnectionError`, with the end
    of the log, if the server ends or does not answer in time. A `ConnectionError` raised inside gets the end of the
    log too if the server has ended meanwhile.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # FlashInfer's sampler, which seeded requests do not use, is compiled at the start and needs a CUDA toolkit
    environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0", **os.environ}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=preexec_fn,
        )
    try:
        _wait_until_ready(process, port, log, ready_seconds)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        except ConnectionError as error:
            if process.poll() is None:
                raise
            raise ConnectionError(f"{error}; {_ended(process, log)}") from error
    finally:
        _end(process)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen, port: int, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConnectionError(_ended(process, log))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (OSError, http.client.HTTPException):  # the first also for a status such as 503
            time.sleep(POLL_SECONDS)
    raise ConnectionError(f"the server did not answer within {seconds:.0f} s; {_end_of(log)}")


def _ended(process: subprocess.Popen, log: Path) -> str:
    return f"the server ended with exit code {process.returncode}; {_end_of(log)}"


def _end_of(log: Path) -> str:
    """The log's last lines, after its first that names an error: vLLM's last ones only say "see above"."""
    lines = log.read_text(errors="replace").splitlines()
    cause = next((line for line in lines[:-5] if CAUSE.search(line)), None)
    return f"the end of {log}: {' | '.join([*([cause, '...'] if cause else []), *lines[-5:]])}"


def _end(process: subprocess.Popen) -> None:
    """Ends the server and all of its process group, which could outlive it and hold GPU memory in the next stage.

    The group has a session of its own, so no other process can be hit.
    """
    try:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            _wait_until_empty(process)
    finally:  # also where another Ctrl-C or SIGTERM cuts the waiting short
        if _signal_group(process, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
                _wait_until_empty(process)


def _wait_until_empty(process: subprocess.Popen) -> None:
    """Waits until the group is empty, but not for ever: in a container that reaps no orphans, zombies stay in it."""
    deadline = time.monotonic() + GROUP_SECONDS
    while _signal_group(process, 0) and time.monotonic() < deadline:
        time.sleep(0.05)


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Sends signal `number` (0: none); whether the group still had a process, even a zombie."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # the second where only zombies are left, on macOS
        return False
    return True
