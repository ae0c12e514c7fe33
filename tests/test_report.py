"""The page of all runs, from small run folders that the real functions wrote."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from benchmarks import r_diverse, report, srpo, va_opd
from common.cli import changed_settings
from common.evaluation import Benchmark, Completion, evaluate
from common.once import once
from common.runs import RunFolder, append_jsonl, atomic_write_json, write_jsonl
from srpo.evaluate import within_budgets
from srpo.train import DERIVED
from srpo.train import parse as parse_srpo
from va_opd.train import parse as parse_va_opd

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
MODELS = {"model": "org/student", "experiment": "mini", "seed": 0}
HOSTILE = "x<img src=q onerror=alert(1)>`|_*]("


# --- Run folders -----------------------------------------------------------------------------------------------------


class Answers:
    """An engine whose first `right` answers are right; what it says is hostile."""

    name = "answers"

    def __init__(self, right: int):
        self.right = right

    def generate(self, prompts, decoding, seeds):
        said = [f"<script>{i < self.right}</script>" for i in range(len(prompts))]
        return [Completion(words, 3, "stop") for words in said]


def score(name: str, out: Path, right: int) -> dict:
    rows = [{"id": f"test-{i}", "prompt": "?", "answer": "yes"} for i in range(6)]
    benchmark = Benchmark(name, rows, score=lambda response, row: float("True" in response))
    return evaluate(Answers(right), benchmark, out, samples=1)


def finish(path: Path, config: dict, steps: list[dict] = ()) -> None:
    with RunFolder.open(path, {**MODELS, **config}, data={"train": "0"}, seed=0) as folder:
        for line in steps:
            append_jsonl(path / "metrics.jsonl", line)
        append_jsonl(path / "samples.jsonl", {"step": 1, "response": "<b>"})
        folder.finish()


def va_opd_run(path: Path, right: int, weighting: str | None) -> None:
    if weighting:
        config = {"teacher": "org/teacher", "dataset": "digits", "limit": 4, "validation_size": 6, "eval_samples": 1}
        finish(path, {**CPU, **config, "weighting": weighting}, [{"step": s, "kl/high": 1 / s} for s in (1, 2)])
    for name, count in (("digits", right), ("digits_pixelated", 0)):
        score(name, path / "eval", count)
    record = {"id": "test-1", "tokens": ["I see", " ", "4", "$<"], "va": [0.0, 0.1, 2.0, 0.0]}
    append_jsonl(path / "eval" / "va_tokens.jsonl", record)
    atomic_write_json(path / "eval" / "va.json", {"mean": 0.5})


def srpo_run(path: Path, right: list[int], routing: str | None) -> None:
    dataset = path.parent.name.rpartition("-")[2]
    steps = [{"step": s, "reward": s / 9, "step_time": 1.0} for s in (1, 2)]
    if routing:
        finish(path, {**CPU, "dataset": dataset, "eval_samples": 1, "routing": routing}, steps)
    curve = []
    for step, count in enumerate(right, start=1 if routing else 0):
        metrics = score(dataset, path / "eval" / (f"checkpoint-{step}" if step else "base"), count)
        found = {"accuracy": metrics["avg@k"], "interval": metrics["interval"], "mean_tokens": 3.0}
        curve.append({"step": step, "hours": 0.1 * step, **found})
    atomic_write_json(path / "eval" / "curve.json", {"curve": curve, **within_budgets(curve)})


def r_diverse_run(path: Path, penalty: str, right: tuple[int, int] = (2, 3)) -> None:
    finish(path, {"penalty": penalty})
    for t in range(2):
        stage = path / f"iteration_{t}"
        once(stage / "evaluate", {}, lambda folder, t=t: {"arithmetic": score("arithmetic", folder, right[t])})
        if t:
            once(stage / "embed", {}, embed)
            once(stage / "label_1", {}, lambda folder: {"usable": 4})
            once(stage / "filter", {}, lambda folder: {"label_accuracy": 0.5, "bank": 4, "replayed": 0})
            for step in (1, 2):
                line = {"step": step, "entropy": 1.0 / step, "challenger/uncertainty": 0.3}
                append_jsonl(stage / "challenger" / "metrics.jsonl", line)


def embed(folder: Path) -> dict:
    np.save(folder / "embeddings.npy", np.eye(4, dtype=np.float32))
    write_jsonl(folder / "programs.jsonl", [{"question": f"What is {i} + {i}?"} for i in range(4)])
    return {}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with runs/ and its report."""
    folder = tmp_path_factory.mktemp("made")
    runs = folder / "runs"
    for variant, right, weighting in (("base", 1, None), ("opd", 2, "none"), ("va_opd", 4, "va")):
        va_opd_run(runs / "va_opd" / "mini" / f"{variant}-seed0", right, weighting)
    srpo_run(runs / "srpo" / "mini-additions" / "base", [1], None)
    srpo_run(runs / "srpo" / "mini-additions" / "grpo-seed0", [2, 3], "grpo")
    srpo_run(runs / "srpo" / "mini-additions" / "srpo-seed0", [3, 5], "srpo")
    for penalty in ("r_diverse", "r_zero"):
        r_diverse_run(runs / "r_diverse" / "mini" / f"{penalty}-seed0", penalty)
    write_report(folder)
    return folder


def write_report(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert report.main([]) == 0


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """A copy whose runs a test may spoil."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    return tmp_path / "runs"


# --- Reading the page ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, texts of cells and headings, and what each table has."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.heads: list[int] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(path.read_text())
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.heads.append(0)
        elif tag == "th":
            self.heads[-1] += 1
        elif tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] for name, found in self.elements if name == tag and attribute in found]

    @property
    def text(self) -> str:
        return "".join(self.words)


def figures(made: Path) -> list[Path]:
    return list((made / "runs").glob("*/mini/figures/*.png"))


def test_the_page_is_whole_and_needs_nothing_else(made):
    page = Page(made / "runs" / "report.html")
    images = page.all("img", "src")
    assert len(images) == len(figures(made)) > 9
    for source in images:
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)))
        assert (image.format, min(image.size) > 100) == ("PNG", True)
    assert len(page.heads) == 1 + 3 * 4 and all(count > 1 for count in page.heads)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for target in page.all("a", "href"):
        assert target[1:] in ids if target[0] == "#" else (made / "runs" / unquote(target)).is_file(), target
    assert "Nothing was left out." in page.text


def test_the_tables_are_those_of_the_methods(made):
    rows = Page(made / "runs" / "report.html").rows
    assert ["VA-OPD", "mini", "2", "0", "digits 0.667 (va_opd-seed0)"] in [row[:5] for row in rows]
    assert ["SRPO", "mini", "2", "0", "additions 0.833 (srpo-seed0)"] in [row[:5] for row in rows]
    assert ["R-Diverse", "mini", "2", "0", "arithmetic 0.500 (r_diverse-seed0)"] in [row[:5] for row in rows]
    assert ["SRPO", "1", "0.833", "0.667", "0.833"] in [row[:5] for row in rows]
    assert ["R-Diverse, iteration 1", "1", "0.500"] in [row[:3] for row in rows]
    assert "- SRPO minus GRPO, seed 0: +0.333 [" in (made / "runs/srpo/mini/report.md").read_text()
    assert any(row[0] == "VA-OPD" and row[1].startswith("0.667 [") for row in rows)
    manifest = json.loads((made / "runs/va_opd/mini/opd-seed0/manifest.json").read_text())
    assert ["opd-seed0", "finished", "0", manifest["started"], manifest["ended"], "0"] in [row[:6] for row in rows]
    assert any(f"torch {manifest['packages']['torch']}" in row[-1] for row in rows if row)


@pytest.mark.parametrize("method", [va_opd, srpo, r_diverse])
def test_a_run_that_measured_nothing_of_the_paper_has_none_of_its_tables(made, method):
    """Its own results stand under one sentence that says so."""
    text = (made / "runs" / method.__name__.rpartition(".")[2] / "mini" / "report.md").read_text()
    title, said, *_ = text.split("\n\n")
    assert title.endswith("experiment mini" + ", seed 0" * (method is va_opd)) and said == method.NOT_THE_PAPER
    assert "| ours" not in text and "| paper" not in text and "## The paper" not in text
    assert "Trained with model `org/student`" in text


def test_every_record_is_linked(made):
    targets = {unquote(target) for target in Page(made / "runs" / "report.html").all("a", "href")}
    scored = list((made / "runs").rglob("scored.jsonl"))
    assert len(scored) == 3 * 2 + 1 + 2 * 2 + 2 * 2
    for path in [*scored, *(made / "runs").rglob("va_tokens.jsonl"), *(made / "runs").rglob("curve.json")]:
        assert path.relative_to(made / "runs").as_posix() in targets


def test_the_commands_have_the_settings_of_their_runs(made, monkeypatch):
    monkeypatch.chdir(made)
    lines = Page(made / "runs" / "report.html").text.splitlines()
    found = {}
    for line in lines:
        words = shlex.split(line, comments=True) if ".train " in line else []
        if words[:2] == ["python", "-m"]:
            parse, follow = {"va_opd.train": (parse_va_opd, ()), "srpo.train": (parse_srpo, DERIVED)}[words[2]]
            args, config = parse(words[3:])
            found[config.output_dir] = {**vars(config), **changed_settings(args, config, follow)}
    assert sorted(found) == [
        f"again/{run}-seed0"
        for run in ("srpo/mini-additions/grpo", "srpo/mini-additions/srpo", "va_opd/mini/opd", "va_opd/mini/va_opd")
    ]
    for folder, settings in found.items():
        manifest = json.loads((made / "runs" / Path(folder).relative_to("again") / "manifest.json").read_text())
        settings["report_to"] = ",".join(settings["report_to"]) or "none"
        assert {name: settings[name] for name in manifest["config"]} == manifest["config"]
    assert any(line.startswith("python -m r_diverse.loop --config runs/r_diverse/mini/r_zero-seed0") for line in lines)


def commands(runs: Path) -> list[str]:
    """Lines of the commands in the report."""
    return [line.removeprefix("    ") for line in (runs / "report.md").read_text().splitlines() if "    " in line[:4]]


def test_a_model_before_training_is_evaluated_with_the_settings_of_a_run_beside_it(made):
    lines = commands(made / "runs")
    for line in (
        "python -m va_opd.evaluate base --config runs/va_opd/mini/opd-seed0/config.yaml --seed 0 --out again",
        "python -m srpo.evaluate base --config runs/srpo/mini-additions/grpo-seed0/config.yaml --out again",
    ):
        assert line in lines


def test_a_base_is_evaluated_with_the_settings_of_its_own_data_set(tmp_path):
    for name in ("base", "grpo-seed0"):
        for dataset in ("additions", "biology"):
            srpo_run(tmp_path / f"srpo/mini-{dataset}" / name, [1], None if name == "base" else "grpo")
    experiments, _ = report.find_experiments(tmp_path)
    page = report.ExperimentPage("srpo", "mini", experiments["srpo", "mini"], tmp_path, tmp_path)
    found = [shlex.split(line)[5] for line in page.commands() if " srpo.evaluate base " in line]
    assert found == [f"{tmp_path}/srpo/mini-{dataset}/grpo-seed0/config.yaml" for dataset in ("additions", "biology")]


def test_the_number_of_gpus_of_r_diverses_command_is_the_runs_and_not_the_machines(runs):
    """Its config.yaml has it; the machine may have had more."""
    path = runs / "r_diverse/mini/r_zero-seed0"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["hardware"]["gpus"] = ["H200"] * 8
    atomic_write_json(path / "manifest.json", manifest)
    write_report(runs.parent)
    (line,) = [line for line in commands(runs) if "r_zero-seed0/config.yaml" in line]
    config = "runs/r_diverse/mini/r_zero-seed0/config.yaml"
    assert line == f"python -m r_diverse.loop --config {config} --out again --iterations 1"


def test_the_same_folders_give_the_same_bytes(made, runs):
    for name in ("report.html", "report.md"):
        (runs / name).unlink()
    for _ in range(2):  # the second time there is a report
        write_report(runs.parent)
        for name in ("report.html", "report.md"):
            assert (runs / name).read_bytes() == (made / "runs" / name).read_bytes()


# --- What is broken, unfinished or foreign ---------------------------------------------------------------------------


def spoil(runs: Path) -> dict[str, str]:
    """Spoils folders in every way; what the report has to say of each."""
    mini, cut = runs / "va_opd" / "mini", runs / "srpo" / "cut-additions"
    for name in (HOSTILE, "torn", "mistyped", "reworded"):
        shutil.copytree(mini, mini.with_name(name))
    shutil.copytree(runs / "srpo" / "mini-additions", cut)
    (runs / "<script>alert(2)<").mkdir()
    (runs / "notes|\x1b.txt").write_text("")
    (runs / "1. [x](y)").mkdir()
    (runs / "va_opd" / "new" / "models").mkdir(parents=True)
    (mini / "opd-seed1").mkdir()
    (mini / "opd-seed0 (copy)").mkdir()
    with pytest.raises(KeyboardInterrupt), RunFolder.open(mini / "va_opd-seed3", {}, data={}, seed=3):
        raise KeyboardInterrupt
    (cut / "grpo-seed0" / "manifest.json").write_text("{")
    (runs / "r_diverse/mini/r_zero-seed0/iteration_1/embed/embeddings.npy").unlink()
    (runs / "va_opd/torn/va_opd-seed0/eval/digits/scored.jsonl").write_text("{\n")
    (runs / "va_opd/torn/va_opd-seed0/eval/digits.json").write_text("[]")
    (runs / "va_opd/mistyped/opd-seed0/config.yaml").write_text("max_steps: many\n")
    metrics = runs / "va_opd/reworded/opd-seed0/eval/digits.json"
    atomic_write_json(metrics, {**json.loads(metrics.read_text()), "rows": "of other questions"})
    return {
        "<script>alert(2)<": "belongs to none of the methods",
        "notes|\ufffd.txt": "belongs to none of the methods",
        "1. [x](y)": "belongs to none of the methods",
        "va_opd/new": "holds no run",
        "va_opd/mini/opd-seed1": "holds neither manifest.json nor eval/",
        "va_opd/mini/opd-seed0 (copy)": "is no run folder: '0 (copy)' is no seed",
        "va_opd/mini/va_opd-seed3": "(interrupted) is not evaluated to the end, so it is in no table",
        "srpo/cut-additions/grpo-seed0": "has a manifest.json that cannot be read",
        "srpo/cut": "has no tables",
        "r_diverse/mini": "has no tables, for they cannot be made: FileNotFoundError",
        "va_opd/torn/va_opd-seed0": "has broken records",
        "va_opd/torn": "scored.jsonl, line 1 is not JSON",
        "va_opd/mistyped": "invalid int value: 'many'",
        "va_opd/reworded": "opd-seed0/eval hold evaluations of digits on other questions",
    }


def test_what_cannot_be_included_is_named(runs, capsys):
    reasons = spoil(runs)
    write_report(runs.parent)
    printed = capsys.readouterr()
    assert f"not included: {len(reasons)}" in printed.out
    assert "Traceback" not in printed.out + printed.err
    page = Page(runs / "report.html")
    left_out = page.text.partition("Not included")[2].partition("\nVA-OPD\n")[0].strip().splitlines()
    assert len(left_out) == len(reasons)
    for name, reason in reasons.items():
        (line,) = [line for line in left_out if line.startswith(f"{name} ")]
        assert reason in line and line.endswith("."), line
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert all(source.startswith("data:image/png;base64,") for source in page.all("img", "src"))
    assert ["VA-OPD", HOSTILE, "2", "0"] in [row[:4] for row in page.rows]
    assert ["VA-OPD", "mini", "2", "1"] in [row[:4] for row in page.rows]
    assert ["va_opd-seed3", "interrupted", "3"] in [row[:3] for row in page.rows]
    for target in page.all("a", "href"):
        assert target[0] == "#" or (runs / unquote(target)).is_file(), target


def test_an_experiment_without_an_evaluated_run_has_no_tables(runs):
    """Nor one with models before training only, whose settings nobody knows."""
    with pytest.raises(KeyboardInterrupt), RunFolder.open(runs / "va_opd/cut/opd-seed0", {}, data={}, seed=0):
        raise KeyboardInterrupt
    shutil.copytree(runs / "va_opd/mini/base-seed0", runs / "va_opd/untrained/base-seed0")
    write_report(runs.parent)
    page = Page(runs / "report.html")
    assert "va_opd/cut has no table: no run is evaluated yet." in page.text
    assert page.text.count("No run of it is evaluated yet.") == 1
    assert ["VA-OPD", "cut", "0", "1", ""] in [row[:5] for row in page.rows]
    assert "untrained has no tables, for they cannot be made: no run has a config.yaml" in page.text
    assert ["VA-OPD", "untrained", "0", "0", "", ""] in page.rows
    assert "# base-seed0: no trained run that has its settings is beside it" in commands(runs)
    assert not [line for line in commands(runs) if "untrained" in line]


def test_the_best_accuracy_may_be_zero_and_is_never_the_bases(tmp_path):
    va_opd_run(tmp_path / "va_opd/mini/opd-seed0", 0, "none")
    r_diverse_run(tmp_path / "r_diverse/mini/r_zero-seed0", "r_zero", right=(5, 2))
    experiments, _ = report.find_experiments(tmp_path)
    best = [report.ExperimentPage(*key, found, tmp_path, tmp_path).overview()[4] for key, found in experiments.items()]
    assert best == ["arithmetic 0.333 (r_zero-seed0)", "digits 0.000 (opd-seed0)"]


def test_a_broken_manifest_is_one_sentence(runs):
    path = runs / "va_opd" / "mini" / "opd-seed0" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"state": 5}, {"hardware": {"gpus": 5}}, {"git": "abc"}, {"packages": None}):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=r"^has a manifest.json that cannot be read \("):
            report.read_run("va_opd", path.parent)


@pytest.mark.parametrize("content", [None, [], ["foreign", "va_opd/mini"]])
def test_no_run_at_all_is_one_sentence(tmp_path, content, capsys):
    for name in content or []:
        (tmp_path / "runs" / name / "models").mkdir(parents=True)
    assert report.main(["--runs", str(tmp_path / "runs")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "run `make demo` first" in lines[0]
    assert all(name in lines[0] for name in content or [])
    assert not list(tmp_path.rglob("report.*"))


# --- Pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [HOSTILE, "a_b", "_a_ __b__ **c** ~~d~~", "[x](javascript:alert(1))", "![x](//host/y.png)", "&lt;\\<br>", "# a"],
)
def test_any_value_is_plain_text_in_a_cell(value, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(report.html_page(report.text_table([[report.text(value), "b"]], ["one", "two"]), tmp_path))
    page = Page(path)
    assert page.rows == [["one", "two"], [value, "b"]]
    assert not page.all("a", "href") and not page.all("img", "src")


def test_only_png_files_are_embedded(tmp_path):
    (tmp_path / "a.png").write_text("<svg onload=alert(1)>")
    page = report.html_page("![a](a.png)\n![b](gone.png)\n![c](https://host/c.png)\n<b>d</b>", tmp_path)
    assert "<img" not in page and "<b>" not in page
    assert page.count("is missing.") == 3


def test_only_a_training_on_several_gpus_has_a_launcher():
    several = ["accelerate", "launch", "--num_processes", "2", "-m"]
    commands = [("va_opd.train", 1), ("va_opd.train", 2), ("va_opd.evaluate run", 2)]
    assert [report._launch(*command) for command in commands] == [["python", "-m"], several, ["python", "-m"]]


def test_packages_that_a_run_had_not_are_left_out():
    manifest = {"hardware": {}, "python": "3.11", "packages": {"torch": "2.9", "vllm": None}}
    assert report.versions(manifest)[2] == "Python 3.11, torch 2.9"


def test_an_experiment_with_a_longer_name_is_another_one(made, runs):
    shutil.copytree(runs / "srpo" / "mini-additions", runs / "srpo" / "mini-b-additions")
    write_report(runs.parent)
    before, after = ((folder / "srpo/mini/report.md").read_text() for folder in (made / "runs", runs))
    assert before == after
    rows = Page(runs / "report.html").rows
    assert [row[1] for row in rows if row[0] == "SRPO" and len(row) == 6] == ["mini", "mini-b"]


def test_seeds_are_in_the_order_of_their_numbers(runs):
    """So that the first seed, which some tables show alone, is the same one after a tenth more are run."""
    for run in ("va_opd/mini/va_opd", "srpo/mini-additions/srpo", "r_diverse/mini/r_zero"):
        (runs / f"{run}-seed0").rename(runs / f"{run}-seed9")
        for seed in (2, 10):
            shutil.copytree(runs / f"{run}-seed9", runs / f"{run}-seed{seed}")
        shutil.copytree(runs / f"{run}-seed9", runs / f"{run}-seed9_old")  # no further seed
    args, _ = parse_va_opd(["--config", str(runs / "va_opd/mini/opd-seed0/config.yaml"), f"--out={runs}", "--dry_run"])
    assert re.search(r"2: 0.\d+, 9: 0.\d+, 10: 0.\d+ \|", va_opd.seeds_table(va_opd.experiment_folder(args), args))
    args, _ = parse_srpo(["--config", str(runs / "srpo/mini-additions/grpo-seed0/config.yaml"), f"--out={runs}"])
    assert [seed for _, name, seed in srpo.find_runs(args) if name == "srpo"] == ["2", "9", "10"]
    found = r_diverse.find_runs(runs / "r_diverse/mini")
    assert [seed for name, seed in found if name == "r_zero"] == ["2", "9", "10"]


def test_seeds_that_were_evaluated_in_other_ways_are_named(runs):
    shutil.copytree(runs / "va_opd/mini/va_opd-seed0", runs / "va_opd/mini/va_opd-seed1")
    args, _ = parse_va_opd(["--config", str(runs / "va_opd/mini/opd-seed0/config.yaml"), f"--out={runs}", "--dry_run"])
    equal = "6 held-out problems, 1 samples each at temperature 0.0, top-p 1.0"
    folder = va_opd.experiment_folder(args)
    assert va_opd.seeds_table(folder, args).startswith(f"## All seeds\n\n{equal}.\n\n| variant |")
    path = runs / "va_opd/mini/va_opd-seed1/eval/digits.json"
    record = json.loads(path.read_text())
    for change, how in (
        ({"questions": 5}, "5 held-out problems, 1 samples each at temperature 0.0, top-p 1.0"),
        ({"samples": 4}, "6 held-out problems, 4 samples each at temperature 0.0, top-p 1.0"),
        (
            {"decoding": {**record["decoding"], "temperature": 0.6}},
            "6 held-out problems, 1 samples each at temperature 0.6, top-p 1.0",
        ),
    ):
        atomic_write_json(path, {**record, **change})
        warning = f"accuracies do not compare: VA-OPD seed 0: {equal}; VA-OPD seed 1: {how}."
        assert f"Evaluated in different ways, so that {warning}\n\n" in va_opd.seeds_table(folder, args)
    longest = record["decoding"]["max_new_tokens"]
    for change, here, there in (
        ({"decoding": {**record["decoding"], "max_new_tokens": 9}}, f"at most tokens {longest}", "at most tokens 9"),
        ({"rows": "a" * 64}, f"digest {record['rows'][:8]}", "digest aaaaaaaa"),
        ({"strict": True}, "strict scorer none", "strict scorer True"),
        ({"chat_template_kwargs": {"x": 1}}, "template with none", 'template with {"x": 1}'),
    ):
        atomic_write_json(path, {**record, **change})
        said = va_opd.seeds_table(folder, args)
        assert re.search(f"different ways.* seed 0: {equal}, .*{here}; VA-OPD seed 1: {equal}, .*{there}\\.\n", said)


@pytest.mark.parametrize("command", [r_diverse, srpo, va_opd])
def test_a_mistake_is_one_sentence_in_each_methods_report(command, capsys, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)
    assert command.main(["--config", "nowhere.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command.__name__}: config file 'nowhere.yaml' does not exist") and "TRACEBACK=1" in line


def test_the_heading_names_the_papers_model(runs):
    """Of an experiment with one of the paper's data sets; its table and ours stand there then."""
    srpo_run(runs / "srpo" / "mini-chemistry" / "grpo-seed0", [3, 3], "grpo")
    words = ["--config", "srpo/configs/tiny.yaml", "--experiment", "mini", "--out", str(runs), "--dry_run"]
    text = srpo.report(parse_srpo(words)[0])
    assert "## The paper's Table 1, Qwen3-8B\n" in text and srpo.NOT_THE_PAPER not in text
    assert (
        "| GRPO | 62.1 / 75.9 / 78.9 | 50.0 [" in text
        and "] n=6 ended at" in text
        and "| SRPO | 69.2 / 81.8 / 83.0 |  | 69.5 /" in text
    )


def test_an_image_that_is_not_at_hand_is_one_sentence(monkeypatch):
    args, _ = parse_va_opd(["--config", "va_opd/configs/tiny.yaml", "--dry_run"])
    monkeypatch.setattr(va_opd, "load_splits_of", lambda args: {"validation": [{"id": "a", "images": ["image"]}]})
    assert va_opd.held_out_image(args, "a") == "image"
    with pytest.raises(ValueError, match=r"id 'b', which the 1 held-out problems here do not have: give dataset"):
        va_opd.held_out_image(args, "b")


# --- A real browser --------------------------------------------------------------------------------------------------

MEASURE = """<!doctype html><meta charset="utf-8"><body>
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const beyond = x => x.getBoundingClientRect().right > root.clientWidth + 1 && !x.closest(".table, pre");
  const result = document.createElement("output");
  result.textContent = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    widths: [...page.images].map(x => x.naturalWidth),
    beyond: [...page.querySelectorAll("main *")].filter(beyond).map(x => x.outerHTML.slice(0, 80)),
    colours: [getComputedStyle(page.body).color, getComputedStyle(page.body).backgroundColor],
  }});
  document.body.append(result);
}};
</script>"""


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(made, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = html.escape((made / "runs" / "report.html").read_text())
    (tmp_path / "frame.html").write_text(MEASURE.format(width=width, page=page))
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
    result = json.loads(html.unescape(re.search("<output>(.*?)</output>", shown)[1]))
    assert result["overflow"] == 0 and result["beyond"] == []
    assert len(result["widths"]) == len(figures(made)) and all(result["widths"])
    assert result["colours"] == ["rgb(26, 26, 26)", "rgb(255, 255, 255)"]
