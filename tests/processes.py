"""For test files that are also a program: two processes of it on a CPU, sharded by the accelerate configs of users."""

import importlib
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.distributed.run
import yaml
from accelerate import DistributedType, PartialState
from accelerate.commands import launch

from common.models import load_model
from common.stages import launcher

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))  # of which this is one
ZERO = [
    pytest.param(
        name,
        marks=[
            pytest.mark.deepspeed,
            pytest.mark.skipif(
                importlib.util.find_spec("deepspeed") is None,
                reason="needs the deepspeed extra: make test-distributed",
            ),
        ],
    )
    for name in ("zero2", "zero3")
]


def two_processes(
    program: str, folder: Path, sharding: str = "", timeout: float = 560, mixed_precision: str = "no"
) -> list[Any]:
    """What `run` saves on each rank of two processes of `program`: plain on gloo, or under an accelerate config."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    plain = {"ACCELERATE_USE_CPU": "true"}
    environment = _of_accelerate(folder, sharding, mixed_precision) if sharding else plain
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        forks.start(
            [program, str(folder)], folder / f"rank{rank}.txt", folder, **environment, RANK=rank, LOCAL_RANK=rank
        )
        for rank in ("0", "1")
    ]
    end = time.monotonic() + timeout
    while None in (codes := [rank.exitcode for rank in ranks]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()  # one that waits for a rank that failed
        rank.join()
    said = [(folder / f"rank{rank}.txt").read_text()[-6000:] for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _of_accelerate(folder: Path, sharding: str, mixed_precision: str) -> dict[str, str]:
    """The variables with which `accelerate launch` has torchrun start two processes under a config, on CPUs here."""
    words = launcher(2, sharding)
    config, given = words.index("--config_file") + 1, {}
    settings = yaml.safe_load(Path(words[config]).read_text())
    settings |= {"use_cpu": True, "mixed_precision": mixed_precision}
    words[config] = str(folder / "accelerate.yaml")
    Path(words[config]).write_text(yaml.safe_dump(settings))
    assert words[:3] == [sys.executable, "-m", "common.launch"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda args: given.update(os.environ))
        launch.launch_command(launch.launch_command_parser().parse_args([*words[3:], "program"]))
    assert given, "accelerate launch has not come to torchrun: the processes would shard nothing"
    return given


def assert_same_run(got: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    """Two runs `{"logs": one dict a step, "model": folder}` agree in the logs of `expected` and in last weights."""
    for ours, theirs in zip(got["logs"], expected["logs"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-4, abs=2e-5, nan_ok=True), case
    ours, theirs = (load_model(run["model"]).state_dict() for run in (got, expected))
    for name, weight in theirs.items():
        # Adam enlarges the last bits of gradients that are all but zero
        assert (ours[name] - weight).abs().float().mean() < 1e-5, (case, name)


def run(main: Callable[[Path], Any]) -> None:
    """The program's side of `two_processes`: saves what `main` returns."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _fsdp_on_a_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _deepspeed_without_compiler()
    folder = Path(sys.argv[1])
    torch.save(main(folder), folder / f"rank{os.environ['RANK']}.pt")
    PartialState().destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # gloo's threads have aborted processes whose work was done while the interpreter ended


def _fsdp_on_a_cpu() -> None:
    """accelerate shards on several GPUs only; torch does on a CPU too."""
    original = PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def _deepspeed_without_compiler() -> None:
    """On a CPU DeepSpeed compiles a faster reduction for itself; gloo's gives the same sums."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
