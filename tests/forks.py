"""Programs in forks of one process that has imported TRL: a Python that starts and imports it takes ten seconds."""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")  # not this process, whose state a fork would have
SERVER.set_forkserver_preload(["trl.trainer.grpo_trainer", "trl.trainer.distillation_trainer"])


def start(words: list[str], log: Path, folder: Path, **environment: str) -> multiprocessing.process.BaseProcess:
    """`python WORDS...` in `folder`, which writes to `log`; the project's modules are imported anew.

    Unlike `subprocess.Popen` the process is no child of this one, and its `terminate` and `kill` are the signals.
    """
    process = SERVER.Process(target=_python, args=(words, str(log), str(folder), {**os.environ, **environment}))
    process.start()
    atexit.register(process.kill)  # of one that hangs: multiprocessing would wait for it
    return process


def call(words: list[str], log: Path, folder: Path, **environment: str) -> int:
    """Exit code of `start`; after eight minutes the process is killed."""
    process = start(words, log, folder, **environment)
    process.join(480)
    process.kill()
    process.join()
    return process.exitcode


def run_stages(stages, logs: Path, gpus: int = 1) -> int:
    """`common.stages.run_stages` with forks, one after the other."""
    from common.stages import commands_of  # not above: a fork imports this file, and has to import `common` anew

    logs.mkdir(parents=True, exist_ok=True)
    for name, (python, *words) in commands_of(stages):
        assert python == sys.executable
        if code := call(words, logs / f"{name}.log", Path.cwd()):
            print((logs / f"{name}.log").read_text()[-3000:])
            return code
    return 0


def _python(words: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    gc.freeze()  # as in conftest.py; and memory that is not visited stays shared
    os.environ.clear()  # of the server's start
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    option, *rest = words
    if option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = words[:1] + words[2:]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(option, run_name="__main__")
