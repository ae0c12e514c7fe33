"""For the tests of `python -m METHOD.train` and its siblings: runs of seconds, data, an engine, mistakes, kills."""

import json
import time
from pathlib import Path
from types import ModuleType

import forks

from common.evaluation import Completion
from common.runs import last_checkpoint

SMALL = {
    "experiment": "small",
    "limit": 64,
    "per_device_train_batch_size": 8,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "doctor_steps": 0,
    "seed": 0,
}


def choices(folder: Path) -> Path:
    """Questions in the form and number of the biology set."""
    for split, count in (("train", 450), ("test", 50)):
        lines = [
            json.dumps({"prompt": f"{split} {i}?\nA: x\nB: y", "system": None, "answer": "AB"[i % 2], "idx": i})
            for i in range(count)
        ]
        (folder / f"{split}.json").write_text("\n".join(lines))
    return folder


class Parrot:
    """An engine that answers with its name and the seed of the row."""

    finish_reason, closed = "stop", False

    def __init__(self, name: str):
        self.name = name

    def generate(self, prompts, decoding, seeds):
        return [Completion(f"{self.name} {seed}", 1, self.finish_reason) for seed in seeds]

    def close(self):
        self.closed = True


def fails(train: ModuleType, capsys, config: Path, *fields: str) -> str:
    """The one sentence that a mistake gives, after what libraries may have written of progress."""
    capsys.readouterr()
    assert train.main(["--config", str(config), *fields]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"{train.__name__}: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def run_until(train: ModuleType, config: Path, step: int | None, *fields: str) -> int:
    """`python -m` of the module, killed with SIGKILL once the checkpoint of `step` is complete; its exit code."""
    words = ["-m", train.__name__, "--config", str(config), *fields]
    process = forks.start(words, config.parent / "log.txt", config.parent)
    run = train.run_path(*train.parse(words[2:]))
    while step is not None and process.exitcode is None:
        found = last_checkpoint(run)
        if found is not None and int(found.name.split("-")[1]) >= step:
            process.kill()
            break
        time.sleep(0.01)
    process.join()
    return process.exitcode
