"""One report of all run folders: report.md, and report.html, a page that needs no other file, network or script.

    python -m benchmarks.report [--runs runs] [--out runs/report.html]

Makes each experiment's tables and figures anew with `benchmarks.va_opd`, `.srpo` and `.r_diverse`, which write them
into its folder, and adds states, versions, commands and links to the records. What cannot be included is named in the
report. The same folders give the same bytes. Names that begin with a dot are passed over.
"""

import argparse
import base64
import contextlib
import glob
import io
import json
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

from benchmarks import r_diverse, srpo, va_opd
from common.cli import run_main
from common.evaluation import headline
from common.plots import table_markdown
from common.runs import atomic_write_text, by_number

SERVICE = ("figures", "logs", "models", "report.md", "report.html")  # beside the runs of an experiment
MANIFEST = {"state": str, "started": str, "seed": int, "command": str, "hardware": dict, "packages": dict}
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a broken file leads to
STATES = {"done": "finished", "running": "running or killed"}
CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3, h4, h5 { line-height: 1.25; margin: 2em 0 .5em; }
h1 { margin-top: .5em; } h2 { border-bottom: 1px solid #bbb; } h5 { font-size: 1em; }
a { color: #0050a0; }
.table, pre { overflow-x: auto; margin: 1em 0; }
table { width: max-content; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; vertical-align: top; text-align: left; max-width: 26em; }
th { border-bottom-color: #888; background: #f4f4f4; vertical-align: bottom; max-width: 9em; }
td[style] { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; max-width: min(14em, 40vw); }
td:first-child { background: #fff; }
pre { background: #f4f4f4; padding: .7em; font-size: .8125rem; overflow-wrap: normal; }
.figure { display: block; margin: 1em 0; }
.figure img { display: block; max-width: 100%; height: auto; }
.figure span { font-size: .875rem; color: #444; }
"""
READING = (
    "Accuracies are between 0 and 1. A paper's tables, in percent, are there where one of its benchmarks was "
    "evaluated. Each experiment has tables and figures, its runs, the records behind the numbers, and the commands "
    "that make the runs again."
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Report of all runs</title>
<style>{css}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


class Run(NamedTuple):
    """A run folder and its manifest; None for a model that was evaluated without training, such as the base."""

    path: Path
    manifest: dict[str, Any] | None


class Method(NamedTuple):
    """What the report has to know about a method.

    tables: (settings as arguments, runs in the tables) -> the method's own report in Markdown.
    names: of its variants.
    evaluated: a file that a run in the tables has.
    records: name -> pattern of further files that numbers and curves come from.
    commands: modules, with their first words, that make a run again.
    """

    title: str
    sentence: str
    tables: Callable[[list[str], list[Run]], str]
    names: Collection[str]
    evaluated: str
    records: dict[str, str]
    commands: tuple[str, ...]


def _va_opd_tables(words: list[str], runs: list[Run]) -> str:
    args, _ = va_opd.parse([*words, "--dry_run"])  # settings of a GPU run can be read without one
    return va_opd.report(args, min(int(run.path.name.rpartition("-seed")[2]) for run in runs))


def _srpo_tables(words: list[str], runs: list[Run]) -> str:
    return srpo.report(srpo.parse([*words, "--dry_run"])[0])


def _r_diverse_tables(words: list[str], runs: list[Run]) -> str:
    return r_diverse.report(words)


TRAINING = {"training log": "metrics.jsonl", "training rollouts": "samples.jsonl"}
METHODS = {
    "va_opd": Method(
        "VA-OPD",
        "Visual-Advantage On-Policy Distillation (arXiv 2605.21924): a student learns from a teacher on its own "
        "responses, and a token or response weighs more where the teacher's prediction depends on the image.",
        _va_opd_tables,
        va_opd.NAMES,
        "eval/va.json",
        {"VA of each token": "eval/va_tokens.jsonl", "choice of the checkpoint": "eval/selection.json", **TRAINING},
        ("va_opd.train", "va_opd.evaluate run"),
    ),
    "srpo": Method(
        "SRPO",
        "Sample-Routed Policy Optimization (arXiv 2604.02288): correct rollouts learn by GRPO, failed ones by "
        "distillation from the policy that sees a correct sibling.",
        _srpo_tables,
        srpo.NAMES,
        "eval/curve.json",
        {"accuracy by step and hour": "eval/curve.json", **TRAINING},
        ("srpo.train", "srpo.evaluate run"),
    ),
    "r_diverse": Method(
        "R-Diverse",
        "Self-play with a memory and skill-aware diversity (arXiv 2602.13103): a Challenger writes questions that a "
        "Solver learns to answer, and is paid less for skills that it has asked for before.",
        _r_diverse_tables,
        r_diverse.NAMES,
        "iteration_1/evaluate/DONE.json",
        {
            "usable questions": "iteration_*/label_*/labelled.jsonl",
            "programs of the questions": "iteration_*/embed/programs.jsonl",
            "filter and memory": "iteration_*/filter/DONE.json",
            "Challenger's rewards": "iteration_*/challenger/metrics.jsonl",
        },
        ("r_diverse.loop",),
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--out", type=Path, help="the page; by default report.html in the folder of all runs")
    known = parser.parse_args(argv)
    return run_main("benchmarks.report", lambda _: report(known.runs, known.out or known.runs / "report.html"), [])


def report(runs: Path, out: Path) -> None:
    """Writes `out` and the same as Markdown beside it. Raises `ValueError` if there is no run at all."""
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html")
    experiments, left_out = find_experiments(runs, {out.name, out.with_suffix(".md").name})
    if not experiments:
        found = f"; it holds {', '.join(name for name, _ in left_out)}" if left_out else ""
        raise ValueError(f"{runs} holds no run of {', '.join(METHODS)}{found}: run `make demo` first")
    sections, rows = [], []
    for method in METHODS:
        mine = {name: found for (other, name), found in experiments.items() if other == method}
        if mine:
            sections += [f"## {METHODS[method].title}", METHODS[method].sentence]
        for name, found in mine.items():
            print(f"{method}/{one_line(name)}: {len(found)} runs", flush=True)
            page = ExperimentPage(method, name, found, runs, out.parent)
            rows.append(page.overview())
            sections += page.sections()
            left_out += page.left_out
    columns = ["method", "experiment", "finished", "interrupted", "best accuracy of a trained model", "last run"]
    parts = ["# Report of all runs", READING, "## Experiments", text_table(rows, columns), "## Not included"]
    parts.append("\n".join(f"- **{text(name)}** {text(why)}." for name, why in left_out) or "Nothing was left out.")
    markdown = "\n\n".join(filter(None, [*parts, *sections])) + "\n"
    atomic_write_text(out.with_suffix(".md"), markdown)
    atomic_write_text(out, html_page(markdown, out.parent))
    print(f"Written: {out} and {out.with_suffix('.md').name}; not included: {len(left_out)}")


# --- Which runs there are --------------------------------------------------------------------------------------------


def find_experiments(
    runs: Path, own: Collection[str] = ()
) -> tuple[dict[tuple[str, str], list[Run]], list[tuple[str, str]]]:
    """Runs by method and experiment, and (path, reason) of everything else; `own` are the report's files."""
    experiments: dict[tuple[str, str], list[Run]] = {}
    left_out: list[tuple[str, str]] = []
    for folder in _children(runs, own):
        if folder.name not in METHODS:
            left_out.append((folder.name, "belongs to none of the methods"))
        for inner in _children(folder) if folder.name in METHODS else []:
            place, name = f"{folder.name}/{inner.name}", experiment_name(folder.name, inner.name)
            found = []
            for path in _children(inner, SERVICE):
                try:
                    found.append(read_run(folder.name, path))
                except ValueError as error:
                    left_out.append((f"{place}/{path.name}", str(error)))
            if found and name is None:
                left_out.append((place, "holds runs, but its name does not end in a data set of SRPO"))
            elif found:
                experiments.setdefault((folder.name, name), []).extend(found)
            elif not (folder.name == "srpo" and inner.is_dir() and any(folder.glob(f"{glob.escape(inner.name)}-*/"))):
                left_out.append((place, "holds no run" if inner.is_dir() else "is a file, not an experiment"))
    return experiments, left_out


def _children(folder: Path, service: Collection[str] = ()) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name not in service and p.name[0] != "."), key=by_number)


def experiment_name(method: str, folder: str) -> str | None:
    """Name of a folder's experiment (SRPO has a folder for each data set); None if the data set is unknown."""
    if method != "srpo":
        return folder
    name, _, dataset = folder.rpartition("-")
    return name if name and dataset in srpo.DATASET_NAMES else None


def read_run(method: str, path: Path) -> Run:
    """A run folder of the method; `ValueError`, with the reason, if it is none or its manifest is broken."""
    name, _, seed = path.name.rpartition("-seed")
    variant = name or seed
    if not path.is_dir() or not set(variant.split("-")) <= {*METHODS[method].names, "gate"}:
        raise ValueError(f"is no run folder of {METHODS[method].title}: those are named like {method}-seed0")
    if name and not (seed.isascii() and seed.isdecimal()):
        raise ValueError(f"is no run folder: {seed!r} is no seed")
    if not (path / "manifest.json").exists():
        if not (path / "eval").is_dir():
            raise ValueError("holds neither manifest.json nor eval/, so it is no run folder")
        return Run(path, None)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if wrong := [name for name, kind in MANIFEST.items() if not isinstance(manifest[name], kind)]:
            raise ValueError(f"{wrong[0]} is {manifest[wrong[0]]!r}")
        versions(manifest)
    except BROKEN as error:
        raise ValueError(f"has a manifest.json that cannot be read ({_said(error)})") from error
    return Run(path, manifest)


# --- One experiment --------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """One model on one benchmark: `place` is its checkpoint or iteration, `scored` the sample records."""

    benchmark: str
    place: str
    value: float | None
    interval: list[float]
    scored: Path


def evaluations(run: Path) -> Iterator[Evaluation]:
    """All finished evaluations in a run folder. `ValueError` naming a broken metrics file."""
    for pattern in ("eval/*/scored.jsonl", "eval/*/*/scored.jsonl", "iteration_*/evaluate/*/scored.jsonl"):
        for scored in sorted(run.glob(pattern), key=by_number):
            folder = scored.parent
            path = folder.with_name(f"{folder.name}.json")
            try:
                value, interval = headline(json.loads(path.read_text()))
                value, interval = None if value is None else float(value), [float(end) for end in interval or ()]
            except BROKEN as error:
                raise ValueError(f"{path} does not hold the metrics of {scored} ({_said(error)})") from error
            place = next((part for part in folder.relative_to(run).parts[:-1] if part not in ("eval", "evaluate")), "")
            yield Evaluation(folder.name, place, value, interval, scored)


class ExperimentPage:
    """The sections of one experiment, and what cannot be included in them."""

    def __init__(self, method: str, name: str, runs: list[Run], root: Path, out: Path):
        self.key, self.method, self.name, self.runs = method, METHODS[method], name, runs
        self.root, self.out = root, out
        self.left_out: list[tuple[str, str]] = []
        self.evaluations: dict[Path, list[Evaluation]] = {}
        for run in runs:
            self._check(run)

    def _check(self, run: Run) -> None:
        place = run.path.relative_to(self.root).as_posix()
        state = state_of(run)
        if not self.in_tables(run):
            self.left_out.append((place, f"({state}) is not evaluated to the end, so it is in no table"))
        elif state not in ("finished", "not trained"):
            self.left_out.append((place, f"({state}) is in the tables with what it had finished"))
        try:
            self.evaluations[run.path] = list(evaluations(run.path))
        except ValueError as error:
            self.evaluations[run.path] = []
            self.left_out.append((place, f"has broken records: {one_line(error)}"))

    def in_tables(self, run: Run) -> bool:
        return (run.path / self.method.evaluated).is_file()

    def overview(self) -> list[Any]:
        trained = [run for run in self.runs if run.manifest]
        done = sum(run.manifest["state"] == "done" for run in trained)
        dates = [run.manifest.get("ended") or run.manifest["started"] for run in trained]
        link = f"[{text(self.name)}](#{slug(self.heading())})"
        last = text(max(map(str, dates))[:10]) if dates else ""
        return [self.method.title, link, done, len(trained) - done, self._best(), last]

    def _best(self) -> str:
        """Highest accuracy by benchmark, without the base before the first iteration and the pixelated control."""
        best: dict[str, tuple[float, Run]] = {}
        for run in (run for run in self.runs if run.manifest):
            for found in self.evaluations[run.path]:
                counts = found.place != "iteration_0" and not found.benchmark.endswith("_pixelated")
                if counts and found.value is not None and found.value > best.get(found.benchmark, (-1.0, run))[0]:
                    best[found.benchmark] = found.value, run
        return "; ".join(f"{text(name)} {value:.3f} ({text(run.path.name)})" for name, (value, run) in best.items())

    def heading(self) -> str:
        return f"{self.method.title}, experiment {one_line(self.name)}"

    def sections(self) -> list[str]:
        records = "Each number links to its scored records; samples.jsonl is beside them. Intervals are 95 %."
        commands = (
            "Settings are read from the run folder; `--out again` leaves the run that is there untouched. How a "
            "training was sharded over several GPUs is not recorded."
        )
        return [
            f"### {text(self.heading())}",
            self.tables(),
            "#### Runs",
            self.runs_table(),
            "#### Machines and versions",
            self.versions_table(),
            "#### Records behind the numbers",
            records,
            self.records_table(),
            "#### Commands",
            commands,
            textwrap.indent("\n".join(self.commands()), "    "),
        ]

    def tables(self) -> str:
        """The method's own report; a reason in its place where a broken file prevents it."""
        included = [run for run in self.runs if self.in_tables(run)]
        place = f"{self.key}/{self.name}"
        if not included:
            self.left_out.append((place, "has no table: no run is evaluated yet"))
            return "No run of it is evaluated yet."
        errors = io.StringIO()
        words = [f"--experiment={self.name}", f"--out={self.root}"]
        try:
            with contextlib.redirect_stderr(errors):
                markdown = self.method.tables(["--config", str(self._config()), *words], included)
        except (Exception, SystemExit) as error:  # whatever a broken file leads to: the report names it
            if os.environ.get("TRACEBACK"):
                raise
            refused = isinstance(error, SystemExit)  # by argparse, which has printed why
            why = one_line(errors.getvalue().rpartition("error: ")[2]) if refused else _said(error)
            self.left_out.append((place, f"has no tables, for they cannot be made: {why} (TRACEBACK=1 shows where)"))
            return text(f"Not included: {why}")
        figures = self._link(self.root / self.key / self.name / "figures")
        markdown = markdown.replace("](figures/", f"]({figures}/")
        seed = re.match(r"# .*?(, seed \d+)?$", markdown, re.M)[1] or ""
        body = re.sub(r"^#", "####", markdown.partition("\n")[2], flags=re.M)
        return f"#### Tables and figures{seed}\n{body}".strip()

    def _config(self) -> Path:
        """Settings of the experiment: those of its first trained run."""
        for run in self.runs:
            if (run.path / "config.yaml").is_file():
                return run.path / "config.yaml"
        raise ValueError("no run has a config.yaml: only models before training are evaluated")

    def runs_table(self) -> str:
        rows = []
        for run in self.runs:
            shown = run.manifest or {}
            times = [text(shown.get(name) or "") for name in ("started", "ended")]
            resumed = len(shown["resumed"]) if isinstance(shown.get("resumed"), list) else ""
            files = [path for name in ("manifest.json", "config.yaml") if (path := run.path / name).is_file()]
            links = ", ".join(f"[{path.name}]({self._link(path)})" for path in files)
            rows.append([self._place(run), text(state_of(run)), shown.get("seed", ""), *times, resumed, links])
        return text_table(rows, ["run", "state", "seed", "started", "ended", "times resumed", "settings"])

    def versions_table(self) -> str:
        """Runs that share code, machine and packages share a row."""
        rows: dict[tuple[str, ...], list[str]] = {}
        for run in self.runs:
            if run.manifest:
                rows.setdefault(versions(run.manifest), []).append(self._place(run))
        columns = ["runs", "git revision", "hardware", "packages"]
        return text_table([[", ".join(names), *map(text, key)] for key, names in rows.items()], columns)

    def records_table(self) -> str:
        rows = []
        for run in self.runs:
            cells: dict[str, list[str]] = {}
            for found in self.evaluations[run.path]:
                value = "no value" if found.value is None else f"{found.value:.3f}"
                interval = f" [{', '.join(f'{end:.3f}' for end in found.interval)}]" if found.interval else ""
                link = f"[{f'{text(found.place)} {value}'.strip()}]({self._link(found.scored)})"
                cells.setdefault(found.benchmark, []).append(link + interval.replace(" ", "\u00a0"))
            for what, pattern in self.method.records.items():
                for path in sorted(run.path.glob(pattern), key=by_number):
                    shown = path.relative_to(run.path).as_posix()
                    cells.setdefault(what, []).append(f"[{text(shown)}]({self._link(path)})")
            rows += [[self._place(run), text(what), ", ".join(links)] for what, links in cells.items()]
        return text_table(rows, ["run", "what", "records"])

    def commands(self) -> list[str]:
        lines = []
        for run in self.runs:
            lines += self._training_again(run) if run.manifest else self._evaluation_again(run)
        return [printable(line) for line in lines]

    def _training_again(self, run: Run) -> list[str]:
        lines = [f"# {one_line(self._place(run))}, started as: {one_line(run.manifest['command'])}"]
        gpus = len(run.manifest["hardware"].get("gpus") or ())
        config = str(run.path / "config.yaml")
        for command in self.method.commands:
            words = [*_launch(command, gpus), *command.split(), "--config", config, "--out", "again"]
            if self.key == "r_diverse":
                words += ["--iterations", str(r_diverse.finished_iterations(run.path) or 1)]
            lines.append(shlex.join(words))
        return lines

    def _evaluation_again(self, run: Run) -> list[str]:
        """Commands that evaluate an untrained model again, with the settings of a run on the same data."""
        variant, _, seed = run.path.name.partition("-seed")
        beside = (r.path for r in self.runs if r.manifest and r.path.parent == run.path.parent)
        if (trained := next(beside, None)) is None:
            return [f"# {one_line(self._place(run))}: no trained run that has its settings is beside it"]
        words = ["python", "-m", f"{self.key}.evaluate", variant, "--config", str(trained / "config.yaml")]
        words += ["--seed", seed] if seed else []
        return [f"# {one_line(self._place(run))}", shlex.join([*words, "--out", "again"])]

    def _place(self, run: Run) -> str:
        """Name of a run within its experiment; SRPO's is below its data set."""
        folder = f"{run.path.parent.name.rpartition('-')[2]}/" if self.key == "srpo" else ""
        return f"{folder}{run.path.name}"

    def _link(self, path: Path) -> str:
        return quote(os.fsencode(os.path.relpath(path, self.out)))


def state_of(run: Run) -> str:
    return STATES.get(run.manifest["state"], run.manifest["state"]) if run.manifest else "not trained"


def _launch(command: str, gpus: int) -> list[str]:
    alone = gpus <= 1 or not command.endswith(".train")
    return ["python", "-m"] if alone else ["accelerate", "launch", "--num_processes", str(gpus), "-m"]


def versions(manifest: dict[str, Any]) -> tuple[str, str, str]:
    """Code, machine and packages of a run as text."""
    git, hardware = manifest.get("git") or {}, manifest["hardware"]
    revision = f"{git.get('revision', 'unknown')}{' with changes' if git.get('dirty') else ''}"
    memory = f"{(hardware.get('memory_bytes') or 0) / 2**30:.0f} GiB"
    gpus = Counter(map(str, hardware.get("gpus") or ()))
    gpus = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU"
    machine = f"{hardware.get('cpus')} CPU cores, {memory}, {gpus}, {hardware.get('platform')}"
    packages = {"Python": manifest.get("python"), **manifest["packages"]}
    return revision, machine, ", ".join(f"{name} {version}" for name, version in packages.items() if version)


# --- Markdown and HTML -----------------------------------------------------------------------------------------------


def printable(value: Any) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))  # a file's name may hold anything


def one_line(value: Any) -> str:
    return printable(" ".join(str(value).split()))


def _said(error: BaseException) -> str:
    return one_line(error if type(error) is ValueError else f"{type(error).__name__}: {error}")


def text(value: Any) -> str:
    """Any value as plain text in Markdown, also in a table's cell."""
    return re.sub(r"[\\`*\[\]<>|&~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", one_line(value))


def text_table(rows: list[list[Any]], columns: list[str]) -> str:
    """A table of words: all columns flush left."""
    head, _, *body = table_markdown(rows, columns).split("\n")
    return "\n".join([head, f"|{' --- |' * len(columns)}", *body])


def slug(heading: str) -> str:
    """Name of a heading in links: letters, digits and hyphens, as on GitHub."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def html_page(markdown: str, folder: Path) -> str:
    """The page of a Markdown text: HTML in it is shown as text, PNG files below `folder` are embedded.

    A scrolling box is around each table, so that a wide one does not widen the page.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token, inner in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag in ("h2", "h3"):
            token.attrSet("id", slug(inner.content))
        for child in token.children or ():
            if child.type == "image":
                _embed(child, folder)
    rules = {
        "table_open": lambda *_: '<div class="table" tabindex="0">\n<table>\n',
        "table_close": lambda *_: "</table>\n</div>\n",
    }
    parser.renderer.rules.update(rules)
    return PAGE.format(css=CSS, body=parser.renderer.render(tokens, parser.options, {}))


def _embed(image: Token, folder: Path) -> None:
    """Makes an image a data URI with its name below it, or a note if there is no such PNG."""
    path, name = folder / unquote(str(image.attrs["src"])), escapeHtml(image.content.replace("_", " "))
    content = path.read_bytes() if path.is_file() else b""
    if content.startswith(b"\x89PNG\r\n"):
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        html = f'<span class="figure"><img src="{source}" alt="{name}"><span>{name}</span></span>'
    else:
        html = f"<span>(The figure {name} is missing.)</span>"
    image.type, image.content, image.children = "html_inline", html, None


if __name__ == "__main__":
    sys.exit(main())
