"""Stops tiny runs of all methods by SIGKILL and SIGTERM, resumes them, and compares them with straight runs.

    python -m benchmarks.kill_test --runs 30 [--methods va_opd,srpo,r_diverse] [--seed 0] [--parallel 2]

A run is started by one command and gets a signal, with all its children, one to three times: SIGKILL, or in a third of
the cases SIGTERM, at random points of the processor seconds of a straight run, which other load does not shift. Then
the same command finishes it. Compared: the bytes of the weights and of all records, and the logged metrics without
times. Finished runs are kept in --out, so the harness itself goes on where it stopped, with the same code.
Writes benchmarks/results/kill_test.json; exit code 1 if any run differs from the straight one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from common import plots
from common.cli import run_main
from common.runs import append_jsonl, atomic_write_json, last_checkpoint, read_jsonl
from common.stages import chosen

ROOT = Path(__file__).parents[1]
# Lines of the log fall between checkpoints, and kills inside accumulation windows
SHORT = ["--max_steps", "60", "--save_steps", "4", "--logging_steps", "3"]
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "va_opd": lambda models: [
        *("va_opd.train", "--config", "va_opd/configs/tiny.yaml", *SHORT, "--limit", "200"),
        *("--model", str(models / "va_opd/base"), "--teacher", str(models / "va_opd/teacher")),
    ],
    "srpo": lambda models: [
        *("srpo.train", "--config", "srpo/configs/tiny.yaml", *SHORT, "--model", str(models / "srpo/base")),
        *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "4"),
    ],
    "r_diverse": lambda models: [
        *("r_diverse.loop", "--config", "r_diverse/configs/tiny.yaml", "--model", str(models / "r_diverse/base")),
        *("--iterations", "1", "--candidates", "96", "--min_questions", "16", "--eval_limit", "60"),
        *("--challenger.max_steps", "16", "--challenger.save_steps", "4", "--challenger.logging_steps", "3"),
        *("--solver.max_steps", "40", "--solver.save_steps", "4", "--solver.logging_steps", "3"),
        *("--solver.per_device_train_batch_size", "20"),
    ],
}
MODELS = {"va_opd": ("teacher", "base"), "srpo": ("base",), "r_diverse": ("base",)}
PACKAGES, SOURCES = ("common", *COMMANDS), (".py", ".yaml")  # what the runs are made by
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM")
STOPPED = (128 + signal.SIGTERM, 0, -signal.SIGTERM)  # the last: while it imports, or when it has done its work
TIMES = ("time", "second", "runtime", "_per_")  # in the names of metrics that no two runs share
SINCE_START = ("train_loss", "va/null")  # of the process that ended the run: its mean loss, a check at its first step


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.kill_test", _main, argv)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kill_test", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="killed runs, shared among the methods (30)")
    parser.add_argument("--methods", default=",".join(COMMANDS), help="comma list")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time (2)")
    parser.add_argument("--out", type=Path, default=Path("runs/kill_test"), help="folder of runs and models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/kill_test.json")
    args = parser.parse_args(argv)
    methods, out = chosen("methods", args.methods, COMMANDS), args.out.resolve()
    if not same_code(out):
        raise ValueError(
            f"--out {out} has runs of other code, which these cannot be compared with; remove it or name another one"
        )
    with ThreadPoolExecutor(args.parallel) as pool:
        straight = dict(zip(methods, pool.map(lambda method: straight_run(method, out), methods), strict=True))
        done = {(r["method"], r["index"], r["seed"]) for r in results(out)}
        wanted = [(methods[i % len(methods)], i // len(methods)) for i in range(args.runs)]
        jobs = [(method, i) for method, i in wanted if (method, i, args.seed) not in done]
        started = [pool.submit(killed_run, method, i, args.seed, straight[method], out) for method, i in jobs]
        for count, future in enumerate(as_completed(started), 1):
            record = future.result()
            append_jsonl(out / "results.jsonl", record)
            say(f"{count}/{len(jobs)} {record['method']} {record['index']}: {record['verdict']}; {record['stops']}")
    records = [r for r in results(out) if (r["method"], r["index"]) in wanted and r["seed"] == args.seed]
    print(table(records))
    atomic_write_json(args.results, {**machine("transformers", "trl"), "runs": records})
    return int(any(record["verdict"] != "equal" for record in records))


def same_code(out: Path) -> bool:
    """Whether the folder's runs were made by the present code; an empty folder is marked with that."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.*"))]
    digest = _digest(b"".join(path.read_bytes() for path in files if path.suffix in SOURCES))
    if not (out.exists() and any(out.iterdir())):
        atomic_write_json(out / "code.json", {"digest": digest})
    mark = out / "code.json"
    return mark.exists() and json.loads(mark.read_text())["digest"] == digest


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def results(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return read_jsonl(path) if path.exists() else []


def straight_run(method: str, out: Path) -> dict[str, Any]:
    """Processor seconds and content of an undisturbed run; it and its models are made once."""
    done = out / f"straight-{method}.json"
    if not done.exists():
        say(f"{method}: its models and a straight run")
        for name in MODELS[method]:
            check([f"{method}.data", name, str(out / "models" / method / name)], out / f"models-{method}.log")
        folder = out / f"straight-{method}"
        shutil.rmtree(folder, ignore_errors=True)
        seconds = check([*COMMANDS[method](out / "models"), "--out", str(folder)], out / f"straight-{method}.log")
        atomic_write_json(done, {"processor_seconds": seconds, "content": content(folder)})
        say(f"{method}: a straight run of {seconds:.0f} processor seconds")
    return json.loads(done.read_text())


def killed_run(method: str, index: int, seed: int, straight: dict[str, Any], out: Path) -> dict[str, Any]:
    rng = random.Random(f"{seed}/{method}/{index}")
    folder, log = out / f"{method}-{seed}-{index}", out / f"{method}-{seed}-{index}.log"
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed harness: the instants are counted from the start
    command = [*COMMANDS[method](out / "models"), "--out", str(folder)]
    stops, verdict = [], None
    for _ in range(rng.randint(1, 3)):
        name, instant = rng.choice(SIGNALS), rng.uniform(0, straight["processor_seconds"])
        code, _, waited = run(command, log, name, instant)
        if waited is None:
            break  # it had less left to do than that
        stops.append({"signal": name, "second": round(instant, 1), "exit": code, "waited": waited, **place(folder)})
        if name == "SIGTERM" and code not in STOPPED:
            verdict = f"exit code {code} after SIGTERM"
    code = run(command, log)[0]
    found, wanted = content(folder), straight["content"]
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    verdict = verdict or (
        f"exit code {code}" if code else f"differs in {', '.join(differing[:5])}" if differing else "equal"
    )
    if verdict == "equal":
        shutil.rmtree(folder)
    return {"method": method, "index": index, "seed": seed, "stops": stops, "verdict": verdict}


def run(
    command: Sequence[str], log: Path, name: str | None = None, instant: float = 0.0
) -> tuple[int, float, float | None]:
    """Exit code and processor seconds of a command, and how many seconds it outlived its signal (None without one).

    The signal `name` goes to the command and all its children once they have had `instant` processor seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    seconds = 0.0
    while process.poll() is None:
        seconds = max(seconds, processor_seconds(process.pid))
        if name and seconds >= instant:
            sent = time.monotonic()
            os.killpg(process.pid, signal.Signals[name])
            return process.wait(), seconds, round(time.monotonic() - sent, 1)
        time.sleep(0.05)
    return process.returncode, seconds, None


def processor_seconds(pid: int) -> float:
    """Processor seconds of a process and of its children that have ended (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def check(command: Sequence[str], log: Path) -> float:
    """Runs a command that must succeed; returns its processor seconds."""
    code, seconds, _ = run(command, log)
    if code:
        raise SystemExit(f"benchmarks.kill_test: {' '.join(command)} ended with exit code {code}: see {log}")
    return seconds


def place(folder: Path) -> dict[str, Any]:
    """What is on disk after a stop: the stage that a loop was in, and the newest whole checkpoint."""
    started = [path.parent for path in folder.rglob("STARTED.json")]
    begun = [path for path in started if not (path / "DONE.json").exists()]
    runs = {path.parent for path in (begun[0] if begun else folder).rglob("checkpoint-*")}
    newest = [path.name for path in map(last_checkpoint, runs) if path]
    stage = begun[0].name if begun else "between stages" if started else ""
    return {"stage": stage, "checkpoint": max((int(name.rpartition("-")[2]) for name in newest), default=0)}


def content(folder: Path) -> dict[str, str]:
    """Digests by file name: weights and records as bytes, metrics without times; checkpoints are left out."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(("checkpoint-", ".", "logs")) for part in relative.parts) or not path.is_file():
            continue
        if path.name == "metrics.jsonl":
            digests[str(relative)] = _digest(json.dumps([_timeless(line) for line in read_jsonl(path)]).encode())
        elif path.suffix in (".safetensors", ".npy") or path.name in (
            "samples.jsonl",
            "labelled.jsonl",
            "records.jsonl",
        ):
            digests[str(relative)] = _digest(path.read_bytes())
    return digests


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    kept = (name for name in line if name not in SINCE_START and not any(part in name for part in TIMES))
    return {name: line[name] for name in kept}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for method in COMMANDS:
        mine = [record for record in records if record["method"] == method]
        stops = [stop for record in mine for stop in record["stops"]]
        terms = [stop["waited"] for stop in stops if stop["signal"] == "SIGTERM"]
        equal = sum(record["verdict"] == "equal" for record in mine)
        if mine:
            rows.append([method, len(mine), len(stops) - len(terms), len(terms), max(terms, default=0), equal])
            rows[-1].append(places(stops))
    header = ["method", "runs", "SIGKILL", "SIGTERM", "longest s from SIGTERM to exit", "equal", "stopped at"]
    return plots.table_markdown(rows, header)


def places(stops: Sequence[dict[str, Any]]) -> str:
    """Where runs were stopped: "before the first checkpoint (5), steps 4 to 20 (9)" or, for a loop, "solver (6)"."""
    steps = [stop["checkpoint"] for stop in stops if stop["checkpoint"] and not stop["stage"]]
    between = f"steps {min(steps)} to {max(steps)}" if steps else ""
    names = [stop["stage"] or (between if stop["checkpoint"] else "before the first checkpoint") for stop in stops]
    return ", ".join(f"{name} ({names.count(name)})" for name in sorted(set(names)))


if __name__ == "__main__":
    sys.exit(main())
