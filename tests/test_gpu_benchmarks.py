"""The measurements for a GPU: what they compute there, what stays of one that is ended, what does not fit."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3ForCausalLM

from benchmarks import (
    evaluation,
    gpu,
    r_diverse_step,
    srpo_loss,
    srpo_memory,
    srpo_step,
    tables,
    va_opd_loss,
    va_opd_scoring,
)
from benchmarks.machine import in_own_process, unless_out_of_memory
from common.evaluation import Completion
from common.tiny import char_tokenizer
from va_opd.teacher import Teacher

STEP = argparse.Namespace(
    hidden=64, layers=2, vocabulary=128, real=None, kinds=srpo_step.PAIR, rollouts=8, prompt=8, response=8,
    micro_batch=4, repeats=1,
)  # fmt: skip
BFLOAT16 = {"use_cpu": True, "bf16": True, "gradient_checkpointing": True}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Folder of a tiny model for `srpo_step`; what that replaces for good is put back."""
    monkeypatch.setattr(srpo_step.GRPOTrainer, "_generate_single_turn", srpo_step.GRPOTrainer._generate_single_turn)
    monkeypatch.setattr(srpo_step.SDPOTrainer, "_generate", srpo_step.SDPOTrainer._generate)
    srpo_step.save_model(str(tmp_path / "model"), char_tokenizer(), STEP)
    return str(tmp_path / "model")


def out_of_memory(*args, **given):
    raise torch.cuda.OutOfMemoryError("too large")


def products(model, work) -> set[torch.dtype]:
    """Dtypes that the model's first linear layer of a block gives while it works."""
    found = set()
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    hook = layer.register_forward_hook(lambda module, args, output: found.add(output.dtype))
    work()
    hook.remove()
    return found


@pytest.mark.parametrize("kind", srpo_step.PAIR)
def test_both_steps_compute_in_bfloat16_and_checkpoint_as_training_does(kind, saved, monkeypatch):
    monkeypatch.setattr(srpo_step, "precision", lambda: BFLOAT16)
    trainer = srpo_step.build(kind, saved, char_tokenizer(), STEP)
    srpo_step.fix_rollouts(srpo_step.rollout_ids(8, 8, char_tokenizer().eos_token_id))
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert trainer.model.is_gradient_checkpointing and trainer.model.training
    assert products(trainer.model, lambda: srpo_step.seconds_of_a_step(trainer)) == {torch.bfloat16}


def test_a_phase_is_measured_beside_trls_own_in_fewer_positions(tmp_path, monkeypatch, saved):
    settings = argparse.Namespace(**vars(STEP) | {"rollouts": 16, "response": 32, "micro_batch": 2})
    saves = []
    found = r_diverse_step.measure(saved, char_tokenizer(), settings, lambda x: saves.append(list(x)))
    assert saves == [[8], [8, 16], [8, 16, 32]]
    for longest, entry in found.items():
        ours, theirs = (entry["positions"][kind] for kind in ("ours", "trl"))
        # 24 forwards of 2 rows: 8 of each model for what is compared with, and 8 of the updates
        assert theirs % (2 * 24) == 0 and theirs // 48 > longest and ours < theirs
        assert len(entry["seconds"]["ours"]) == len(entry["seconds"]["trl"]) == 1
    result = {"settings": {"real": "4B"}, "responses": {str(longest): x for longest, x in found.items()}}
    rows = tables.r_diverse_step(result)
    assert [row[0] for row in rows] == [f"R-Diverse's phase, 4B, rollouts of up to {n}, s" for n in (8, 16, 32)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset a high-water mark")
def test_the_peak_of_a_step_counts_what_the_trainer_holds(saved, monkeypatch):
    """In a process of its own; here, where memory that was freed is used again, the marks are made up."""
    lengths = []
    monkeypatch.setattr(srpo_memory, "memory", {"VmRSS": 5, "VmHWM": 12}.__getitem__)
    monkeypatch.setattr(srpo_memory, "seconds_of_a_step", lambda trainer: lengths.append(trainer.args.routing))
    monkeypatch.setattr(srpo_memory, "fix_rollouts", lambda ids: lengths.append(max(map(len, ids)) <= 17))
    found = srpo_memory.measured("srpo", saved, argparse.Namespace(**vars(STEP) | {"response": 40}))
    weights = sum(weight.nbytes for weight in Qwen3ForCausalLM.from_pretrained(saved).float().parameters())
    assert found == {"peak": 7, "weights": weights}
    assert lengths == [True, "srpo", False, "srpo"]  # a short step first


def test_a_process_of_its_own_is_another_one():
    assert in_own_process(os.getpid) != os.getpid()


def test_the_table_of_memory_says_what_grpo_and_a_teacher_have():
    peaks = {"srpo": [11e9, 13e9, 14e9], "grpo": [10e9, 12e9, 13e9], "sdpo (trl)": [22e9, 24e9, 28e9]}
    result = {
        "settings": {"responses": [1, 2, 4]},
        "teacher": 2e9,
        "peak": {
            kind: {str(n): [peak] for n, peak in zip((1, 2, 4), row, strict=True)} for kind, row in peaks.items()
        },
    }
    (grpo, sdpo) = tables.srpo_memory(result)
    assert grpo[1:6] == ["our own GRPO", "14.00", "13.00", "0.93 x", "15.00 GB, with a teacher"]
    assert sdpo[1:6] == ["trl.experimental.sdpo", "14.00", "28.00", "2.00 x", ""]


def options(repeats: int = 1) -> argparse.Namespace:
    va_opd_scoring.build_model.cache_clear()
    shapes = {"real": False, "hidden": 128, "layers": 1, "vision_hidden": 64, "vision_layers": 1}
    return argparse.Namespace(**shapes, repeats=repeats)


def test_the_student_of_va_opd_checkpoints_too(tmp_path, monkeypatch):
    monkeypatch.setattr(va_opd_scoring, "precision", lambda: BFLOAT16)
    trainer = va_opd_scoring.build(str(tmp_path), options(), 16, [6, 4, 3, 2])
    assert trainer.model.is_gradient_checkpointing and trainer.model.training


def test_trls_way_is_one_forward_of_all_rows_a_view(tmp_path):
    found = va_opd_scoring.scoring(options(), str(tmp_path), 16, (1.0, 0.75, 0.5, 0.25), 8)
    counted = found["counted"]
    assert [counted[way]["forwards"] for way in ("shared", va_opd_scoring.TRL, va_opd_scoring.ALONE)] == [2, 2, 8]
    width = found["prompt"] + 8  # of the longest rollout
    assert counted[va_opd_scoring.TRL]["tokens"] == counted[va_opd_scoring.ALONE]["tokens"] == 8 * width
    assert list(found["ratio"]) == [va_opd_scoring.TRL, va_opd_scoring.ALONE]
    assert found["largest_difference_in_logps"] < 1e-5


def test_a_whole_step_of_plain_opd_has_one_view_and_no_log_probabilities(tmp_path, monkeypatch):
    scored, views, score, logps = [], [], Teacher.score, va_opd_scoring.sampled_logps

    def noted(self, given, *others):
        views.append(len(given))
        return score(self, given, *others)

    monkeypatch.setattr(Teacher, "score", noted)
    monkeypatch.setattr("va_opd.teacher.sampled_logps", lambda *given: scored.append(len(views)) or logps(*given))
    found = va_opd_scoring.whole_step(options(), str(tmp_path), 16, 4)
    assert views == [2, 1, 2, 1] and set(scored) == {1, 3}  # a pair to warm up, and the measured one
    (va,), (plain,) = found["steps"]["va"], found["steps"]["none"]
    assert found["va_over_opd"]["median"] == va["step"] / plain["step"] - 1
    ((work, _, ours, theirs, *_),) = tables.va_opd_scoring({"whole step, size 1/1": found})
    seconds = [va["step"], plain["step"]]
    assert work == "VA-OPD's whole step, size 1/1, s" and [float(ours), float(theirs)] == pytest.approx(seconds, 0.1)


def entry(*ways: str) -> dict:
    counts = {"forwards": 1, "tokens": 10, "patches": 0}
    return {"seconds": {way: [i + 1.0] for i, way in enumerate(ways)}, "counted": dict.fromkeys(ways, counts)}


def test_the_overview_has_a_row_of_each_peer():
    new = {"equal lengths, size 1/1": entry("shared", va_opd_scoring.TRL, va_opd_scoring.ALONE)}
    new |= {"student, size 1/1": {"out_of_memory": True}, "whole step, size 1/1": {"out_of_memory": True}}
    rows = [[row[1], row[4]] for row in tables.va_opd_scoring(new)]
    assert rows == [["TRL's way", "2.00 x [2.00, 2.00]"], ["2 x K whole forwards", "3.00 x [3.00, 3.00]"]]


def test_what_has_been_measured_is_saved_before_the_next_section(tmp_path, monkeypatch, capsys):
    parts = {"whole step, one": lambda: {"ratio": 1}, "whole step, two": out_of_memory, "three": lambda: sys.exit(1)}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(va_opd_scoring, "sections", lambda options, folder: parts)
    command = ["--out", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit):
        va_opd_scoring.main(command)
    found = json.loads((tmp_path / "found.json").read_text())
    one, two = (found.get(name) for name in list(parts)[:2])
    assert (one, two, "three" in found) == ({"ratio": 1}, {"out_of_memory": True}, False)
    assert tables.va_opd_scoring(found) == []
    del parts["three"]
    va_opd_scoring.main(command)
    assert "teacher scoring, equal lengths: 2.14" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "peer"), [(va_opd_loss, "trl"), (srpo_loss, "full logits")])
def test_a_loss_that_does_not_fit_is_said_to(module, peer, tmp_path, monkeypatch):
    def run(loss, name, count, *widths):
        if (name, count) == (peer, 20):
            out_of_memory()
        if count == 40:
            sys.exit(1)
        return {"peak": 2**30, "seconds": 1.0, "loss": 0.0, "gradient_norm": 0.0}

    monkeypatch.setattr(va_opd_loss, "run", run)
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit):
        module.main(["--rows", "10", "20", "40", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["paths"][peer]["20"] == {"out_of_memory": True} and found["paths"]["ours"]["20"]["seconds"]
    rows = getattr(tables, module.__name__.rpartition(".")[2])(found)
    (row,) = [row for row in rows if "10 rows, s" in row[0]]
    assert row[3] == "1.00"


def test_a_step_that_does_not_fit_leaves_those_of_the_others(monkeypatch):
    lengths, saves = [], []

    def seconds(trainer):
        return out_of_memory() if trainer.kind == "sdpo (trl)" and len(lengths) == 3 else 2.0

    def build(kind, *others):
        return SimpleNamespace(kind=kind, _metrics={"train": {"teacher/scored_over_needed": [1.0]}})

    monkeypatch.setattr(srpo_step, "build", build)
    monkeypatch.setattr(srpo_step, "count_teacher", lambda trainer: [])
    monkeypatch.setattr(srpo_step, "fix_rollouts", lengths.append)
    monkeypatch.setattr(srpo_step, "seconds_of_a_step", seconds)
    tokenizer = char_tokenizer()
    srpo_step.measure("", tokenizer, STEP, lambda found: saves.append(srpo_step.summary(found, tokenizer, STEP)))
    assert [list(x["seconds"]) for x in saves] == [[], [], [], ["srpo"]]
    assert [list(x["seconds of shorter steps"][4]) for x in saves[1:]] == [list(srpo_step.PAIR)] * 3
    assert saves[-1]["out_of_memory"] == {"sdpo (trl)": 8} and "srpo_over_trl_sdpo" not in saves[-1]
    assert "sdpo (trl): out of memory, responses of 8" in srpo_step.table(saves[-1])
    assert tables.srpo_step(saves[-1]) == []


def test_only_a_lack_of_the_gpus_memory_is_passed_over():
    assert unless_out_of_memory(out_of_memory) is None
    assert unless_out_of_memory(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        unless_out_of_memory(lambda: 1 / 0)


def test_each_way_of_generating_is_warmed_up(monkeypatch):
    calls = []

    def ways(engine, asked, decoding):
        def work(name):
            calls.append((name, len(asked), decoding.max_new_tokens))
            return [Completion("", 1, "stop")] * len(asked)

        return {name: lambda name=name: work(name) for name in ("naive", "sorted", "ours")}

    monkeypatch.setattr(evaluation, "ways", ways)
    monkeypatch.setattr(evaluation, "small_engine", lambda counts, real: None)
    evaluation.measure(20, 1, False, 99)
    names = ("naive", "sorted", "ours")
    assert calls == [(name, 16, 2) for name in names] + [(name, 20, 99) for name in names]


@pytest.fixture
def works(monkeypatch, tmp_path):
    """Works that leave a file in their folder; one stays until it is killed."""

    def main(argv):
        folder = tempfile.mkdtemp()
        (Path(folder) / "model").write_text("large")
        Path(argv[-1]).write_text(json.dumps({"folder": folder}))
        os.write(1, f"measured {argv[0]}\n".encode())
        time.sleep(60 if argv[0] == "stays" else 0)

    monkeypatch.setitem(sys.modules, "benchmarks.fake", SimpleNamespace(main=main))
    monkeypatch.setattr(gpu, "WORKS", {"a": "fake stays", "b": "fake ends"})
    return tmp_path / "out"


def test_nothing_but_results_and_one_log_is_left_of_works_that_are_ended(works, capsys):
    assert gpu.main(["--only", "a", "b", "--limit", "1", "--out", str(works)]) == 1
    assert sorted(path.name for path in works.iterdir()) == ["a_gpu.json", "b_gpu.json", "gpu.log"]
    for path in works.glob("*.json"):
        assert not Path(json.loads(path.read_text())["folder"]).exists()
    printed = capsys.readouterr().out
    first, second = printed.split("---")[1:]
    assert "a: " in first and "exit code -9\nmeasured stays" in first
    assert "exit code 0\nmeasured ends" in second and "stays" not in second
    assert len(gpu.WORKS) + 1 <= 8


def test_a_work_whose_imports_fail_does_not_stop_the_next(works, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "WORKS", {"lacks": "no_such_module", "b": "fake ends"})
    assert gpu.main(["--only", "lacks", "b", "--out", str(works)]) == 1
    lacks, b = capsys.readouterr().out.split("---")[1:]
    assert "exit code 1\n" in lacks and "exit code 0\n" in b and (works / "b_gpu.json").exists()


def test_what_does_not_fit_in_the_total_is_left_out(works, capsys):
    assert gpu.main(["--only", "b", "--total", "30", "--out", str(works)]) == 0
    assert "--- b: left out, 30 of 30 s remain" in capsys.readouterr().out
    assert not list(works.glob("*.json"))


def test_memory_holds_a_checkpoint_only_where_it_has_room(tmp_path, monkeypatch):
    free = SimpleNamespace(free=gpu.CHECKPOINT + 1)
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda folder: free)
    assert gpu.fast_folder(tmp_path) == tmp_path and gpu.fast_folder(tmp_path / "none") is None
    free.free = 64e6
    assert gpu.fast_folder(tmp_path) is None
