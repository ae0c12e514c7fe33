"""The measured tables say what the result files say, and the kill harness sees a difference."""

import importlib
import json
import os

import pytest
import torch
from PIL import Image

from benchmarks import kill_test, tables, vllm_gap, vllm_on_cpu
from benchmarks.machine import machine
from common import tiny
from common.runs import write_jsonl
from r_diverse import loop as r_diverse_loop

GAP_OF_TRL = "sampling/sampling_logp_difference/mean"


def test_the_readme_is_made_of_the_results():
    assert tables.main(["--check"]) == 0


def test_every_results_file_is_in_a_table_or_in_the_text():
    readme = (tables.FOLDER / "README.md").read_text()
    for path in (tables.FOLDER / "results").glob("*.json"):
        assert path.stem.removesuffix("_gpu") in tables.ROWS or f"benchmarks.{path.stem}" in readme, path.name


def test_the_table_of_gaps_is_that_of_the_results():
    runs = json.loads((tables.FOLDER / "results/vllm_gap.json").read_text())["runs"]
    assert vllm_gap.table(runs) in (tables.FOLDER.parent / "docs/vllm.md").read_text()


def test_the_table_of_kills_is_that_of_the_results():
    runs = json.loads((tables.FOLDER / "results/kill_test.json").read_text())["runs"]
    readme = (tables.FOLDER / "README.md").read_text()
    for line in kill_test.table(runs).splitlines()[2:]:
        assert line.partition(" | ")[2] in readme  # behind the method's name


def test_answer_checks_of_any_files_and_peers_have_rows():
    """As of the command without arguments, or where a peer is not installed: it ended in a KeyError."""
    result = json.loads((tables.FOLDER / "results/answers.json").read_text())
    del result["files"]["cases.jsonl"]
    for sides in (result["files"]["answer_pairs.jsonl"]["checks_per_second"], *result["batches"].values()):
        del sides["mathruler"]
    pairs, works = result["files"]["answer_pairs.jsonl"]["pairs"], [row[:2] for row in tables.answers(result)]
    assert works[:2] == [
        [f"answer checks a second, {pairs:,} own pairs", "math-verify"],
        ["2,048 responses, s", "math-verify"],
    ]


def test_growth_is_the_exponent_of_ours_and_the_peers():
    assert tables.growth([1, 2, 4], [3, 6, 12], [1, 4, 16]) == "1.00 / 2.00"


def test_a_machine_names_absent_packages():
    found = machine("numpy", "no-such-package")
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["numpy"]
    assert "cores" in found["processor"] or found["processor"]


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    lines = [{"step": 1, "loss": 0.5, "step_time": 1.0, "samples_per_second": 3.0}, {"step": 1, "train_loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"older")
    return tmp_path


def test_runs_are_compared_without_times_and_checkpoints(finished):
    before = kill_test.content(finished)
    assert sorted(before) == ["metrics.jsonl", "model/model.safetensors"]
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("1.0", "2.0").replace('"train_loss": 0.5', '"train_loss": 0.1'))
    assert kill_test.content(finished) == before
    metrics.write_text(metrics.read_text().replace('"loss": 0.5', '"loss": 0.5000001'))
    assert kill_test.content(finished) != before


def test_a_changed_weight_is_a_difference(finished):
    before = kill_test.content(finished)
    (finished / "model/model.safetensors").write_bytes(b"weightz")
    assert kill_test.content(finished)["metrics.jsonl"] == before["metrics.jsonl"]
    assert kill_test.content(finished) != before


def test_runs_of_other_code_are_not_compared(tmp_path, capsys):
    assert kill_test.same_code(tmp_path) and kill_test.same_code(tmp_path)
    (tmp_path / "code.json").write_text('{"digest": "of before"}')
    assert kill_test.main(["--out", str(tmp_path)]) == 2
    assert "has runs of other code" in capsys.readouterr().err


def test_an_unknown_method_is_one_sentence(capsys):
    assert kill_test.main(["--methods", "ppo"]) == 2
    assert "unknown methods ['ppo']; choose among va_opd, srpo, r_diverse" in capsys.readouterr().err


def test_unknown_methods_and_modes_of_the_vllm_runs_are_one_sentence(capsys):
    assert vllm_gap.main(["--methods", "srpo,ppo"]) == 2
    assert "unknown methods ['ppo']; choose among va_opd, srpo, r_diverse" in capsys.readouterr().err
    assert vllm_gap.main(["--modes", "remote"]) == 2
    assert "unknown modes ['remote']; choose among colocate, server" in capsys.readouterr().err


@pytest.mark.parametrize("method", vllm_gap.METHODS)
@pytest.mark.parametrize("flags", [["--use_vllm=true", "--vllm_mode=server", "--vllm_max_model_length=256"]])
def test_the_vllm_runs_are_train_commands_with_settings_that_exist(method, flags, tmp_path):
    module, *words = vllm_gap.command(method, "somewhere", tmp_path, 8, flags)
    parsed = importlib.import_module(f"{method}.train").parse(words)
    configs = (parsed.challenger, parsed.solver) if method == "r_diverse" else parsed[1:]
    assert {(c.use_vllm, c.vllm_mode, c.max_steps, c.save_strategy) for c in configs} == {(True, "server", 8, "no")}
    assert module == ("r_diverse.loop" if method == "r_diverse" else f"{method}.train")


def test_on_a_gpu_the_vllm_run_of_self_play_is_one_that_its_loop_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_gap, "ON_CPU", False)
    _, *words = vllm_gap.command("r_diverse", "somewhere", tmp_path, 8, ["--use_vllm=true", "--vllm_mode=colocate"])
    settings = r_diverse_loop.parse(words)
    monkeypatch.setattr(r_diverse_loop.torch.cuda, "is_available", lambda: True)
    r_diverse_loop.check_gpus(settings)


@pytest.mark.parametrize(("method", "phases"), [("srpo", [""]), ("r_diverse", ["challenger", "solver"])])
def test_gaps_are_read_from_the_records_of_each_phase(method, phases, tmp_path, monkeypatch):
    def run(words):
        for number, phase in enumerate(phases):
            folder = tmp_path / "colocate" / "run" / phase
            folder.mkdir(parents=True)
            lines = [{"step": 1, "sampling/logps_gap": 0.5 + number}, {"step": 2}, {"step": 3, GAP_OF_TRL: 0.25}]
            write_jsonl(folder / "metrics.jsonl", lines)
            os.utime(folder / "metrics.jsonl", (number, number))

    monkeypatch.setattr(vllm_gap, "run", run)
    rows = vllm_gap.measured(method, "colocate", "model", 3, tmp_path)
    assert [row["gaps"] for row in rows] == [[0.5 + number, 0.25] for number in range(len(phases))]
    assert [row["run"] for row in rows] == [f"{method}, {phase}".rstrip(", ") for phase in phases]
    (tmp_path / "srpo").mkdir()
    monkeypatch.setattr(vllm_gap, "run", lambda words: None)
    with pytest.raises(RuntimeError, match="no gap in the records"):
        vllm_gap.measured(method, "colocate", "model", 3, tmp_path / "srpo")


@pytest.mark.parametrize("build", [tiny.tiny_qwen3, tiny.tiny_qwen3_vl])
def test_a_model_with_wider_heads_computes_the_same(build):
    model, processor = build(hidden=64)
    wider = vllm_on_cpu.widened(model)
    assert wider.config.get_text_config().head_dim == 32
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(7, 100, (2, 40))}
    if build is tiny.tiny_qwen3_vl:
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        image = Image.fromarray(torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy())
        inputs = processor(text=[text, text], images=[image, image], return_tensors="pt")
    torch.testing.assert_close(wider(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
