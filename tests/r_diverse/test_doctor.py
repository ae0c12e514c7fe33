"""Figures of a batch of the Challenger, and the doctor who reads them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from r_diverse_rewards import Table, bank, output, reward_of

from r_diverse import MemoryBank, RDiverseConfig, SkillEncoder, doctor
from r_diverse.reward import batch_figures


def test_figures_of_a_batch(tmp_path):
    _, reward = reward_of(RDiverseConfig("m"), [output("alike 1"), output("alike 1"), "x"], memory=bank(tmp_path))
    figures = batch_figures(reward.last_batch)
    assert figures["challenger/valid"] == pytest.approx(2 / 3)
    assert figures["challenger/distinct"] == 0.5
    assert figures["challenger/consistency"] == pytest.approx(0.6)
    assert figures["challenger/uncertainty"] == pytest.approx(0.4)
    assert figures["challenger/p_max"] == pytest.approx(0.96)
    assert figures["challenger/encoded"] == 1
    assert figures["challenger/bank"] == 3
    assert all(isinstance(value, float) for value in figures.values())


def test_uncertainty_is_the_mean_of_the_questions():
    answers = {"a": ["1"] * 10, "b": ["1"] * 3 + [str(i) for i in range(2, 9)]}
    config, outputs = RDiverseConfig("m", penalty="none"), [output("a"), output("b")]
    _, reward = reward_of(config, outputs, solver=lambda questions, step: [answers[q] for q in questions])
    assert batch_figures(reward.last_batch)["challenger/uncertainty"] == pytest.approx((0 + 0.3) / 2)


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({"reward": None}, "no rollout has a reward"),
        ({"challenger/valid": 0.4}, "have the asked form"),
        ({"challenger/consistency": 0.05}, "hardly ever agree"),
        ({"challenger/unanswered": 0.2}, "look at its log"),
        ({"challenger/encoded": 0.4}, "became a program"),
        ({"challenger/largest_cluster": 0.95}, "one cluster"),
        ({"challenger/late": 0.2}, "before all answers were compared"),
        ({"frac_reward_zero_std": 0.9}, "no gradient"),
        ({"completions/clipped_ratio": 0.6}, "truncated"),
        ({"entropy": 0.001}, "collapsed"),
        ({"sampling/logps_gap": 0.2}, "weight sync"),
    ],
)
def test_the_doctor_warns_in_words(logs, message):
    (warning,) = doctor.diagnose({"reward": 0.5, **logs})
    assert message in warning
    assert doctor.diagnose({"reward": 0.5, **dict.fromkeys(logs.keys() - {"reward"})}) == []


def test_the_doctor_warns_beyond_its_bounds_only():
    above = {
        "challenger/unanswered": 0.1,
        "challenger/largest_cluster": 0.9,
        "challenger/late": 0.1,
        "frac_reward_zero_std": 0.8,
        "completions/clipped_ratio": 0.5,
        "sampling/logps_gap": 0.1,
    }
    below = {"challenger/valid": 0.5, "challenger/consistency": 0.1, "challenger/encoded": 0.5, "entropy": 0.01}
    for bounds, expected in ((above, [0, 0, 1]), (below, [1, 0, 0])):
        for name, bound in bounds.items():
            assert [len(doctor.diagnose({name: bound + by})) for by in (-1e-4, 0, 1e-4)] == expected, name


def test_the_doctor_reads_the_logs_of_steps_only(capsys):
    """Not those of evaluations and of the end of training, which have other figures."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=50)
    for logs in ({"eval_reward": 0.5, "completions/clipped_ratio": 0.9}, {"train_runtime": 1.0}, None):
        doctor.DoctorCallback(every=20).on_log(None, state, None, logs)
    assert not capsys.readouterr().out


def test_the_doctor_line_comes_at_the_first_log_and_then_every_few_steps(capsys):
    callback = doctor.DoctorCallback(every=20)
    logs = {"reward": 0.25, "challenger/bank": 640.0, "challenger/valid": 0.3}
    for step in (4, 8, 24):
        callback.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step), None, logs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[doctor] step 4: reward 0.250; valid 30%; questions in memory 640"
    assert lines[1].startswith("[doctor] WARNING: fewer than half")
    assert [line for line in lines if "step" in line.split(":")[0]] == [lines[0], lines[2]]
    assert "step 24" in lines[2]


def test_one_giant_cluster_is_seen():
    """Pairwise cosine 0.7: P_rep is 1 for each question, which gives no gradient, and no two repeat each other."""

    class Alike(Table):
        dim = 65

        def encode(self, texts):
            rows = np.full((len(texts), 65), 0.0)
            rows[:, 0] = math.sqrt(0.7)
            rows[np.arange(len(texts)), [1 + int(text.split()[1]) for text in texts]] = math.sqrt(0.3)
            return rows

    outputs = [output(f"question {i}") for i in range(64)]
    figures = {}
    _, reward = reward_of(
        RDiverseConfig("m", beta=0.0), outputs, skills=SkillEncoder(Alike(), Alike()), log_metric=figures.__setitem__
    )
    assert set(reward.last_batch["repetition"]) == {1.0}
    assert figures["challenger/clusters"] == 1
    assert figures["challenger/largest_cluster"] == 1
    assert figures["challenger/median_cosine"] == pytest.approx(0.7)
    (warning,) = doctor.diagnose(figures)
    assert "one cluster" in warning and "median_cosine" in warning


def test_clusters_of_a_batch(tmp_path):
    outputs = [output("alike 1"), output("same 1"), output("far 1"), output("bad 1"), "no form"]
    _, reward = reward_of(RDiverseConfig("m"), outputs, memory=bank(tmp_path))
    figures = batch_figures(reward.last_batch)
    assert figures["challenger/clusters"] == 2  # of the three questions with a vector
    assert figures["challenger/largest_cluster"] == pytest.approx(2 / 3)
    assert figures["challenger/median_cosine"] == pytest.approx(-0.8)
    words = ["one two three four five", "one two three four five", "a b c d e"]
    _, reward = reward_of(RDiverseConfig("m", penalty="r_zero"), [*map(output, words), *["no form"] * 3], skills=None)
    figures = batch_figures(reward.last_batch)
    assert figures["challenger/largest_cluster"] == pytest.approx(2 / 3)
    assert "challenger/median_cosine" not in figures


def test_similarity_is_logged_where_it_was_measured_only(tmp_path):
    names = {"challenger/p_max", "challenger/p_mean", "challenger/p_max_p50", "challenger/p_mean_p90"}
    outputs = [output("alike 1"), output("far 1")]
    for config, memory in (
        (RDiverseConfig("m"), MemoryBank(tmp_path / "empty")),
        (RDiverseConfig("m", beta=0.0), None),
    ):
        _, reward = reward_of(config, outputs, memory=memory)
        assert not names & batch_figures(reward.last_batch).keys()
    _, reward = reward_of(RDiverseConfig("m"), outputs, memory=bank(tmp_path / "bank"))
    figures = batch_figures(reward.last_batch)
    assert names <= figures.keys()
    assert figures["challenger/p_max_p10"] < figures["challenger/p_max_p50"] < figures["challenger/p_max_p90"]
    for name in ("p_max", "p_mean"):
        assert figures[f"challenger/{name}_p50"] == pytest.approx(np.median(reward.last_batch[name]))
