"""The Challenger's reward over a whole batch, and the overrides of TRL's trainer."""

import inspect
import logging
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from common.tiny import tiny_qwen3
from r_diverse import ChallengerReward, MemoryBank, PhaseTrainer, RDiverseConfig, SkillEncoder, doctor, objective
from r_diverse.budget import Budget
from r_diverse.config import ChallengerConfig, SolverConfig
from r_diverse.questions import Challenge
from r_diverse.skills import Program
from r_diverse.trainer import batch_figures, logps_gap

VECTORS = {"alike": (0.8, 0.6), "same": (0.8, 0.6), "far": (-1.0, 0.0)}


class Table:
    """Coder and encoder in one: a question is its own program, its vector is in the table."""

    name, dim = "table", 2

    def write(self, questions):
        failures = {"bad": "no_block", "lost": "engine"}
        return [Program(None, failures[q[:4].strip()]) if q[:4].strip() in failures else Program(q) for q in questions]

    def encode(self, texts):
        return np.array([VECTORS.get(text.split()[0], (0.0, 1.0)) for text in texts])


def skills() -> SkillEncoder:
    return SkillEncoder(Table(), Table())


def bank(path) -> MemoryBank:
    """The toy bank of the specification."""
    memory = MemoryBank(path, "table > table")
    memory.add(["a", "b", "c"], np.array([(1.0, 0.0), (0.6, 0.8), (0.0, 1.0)]), ["1", "2", "3"], iteration=1)
    return memory


def solver(share: float, m: int = 10):
    """Answers "1" in a share of m, else all different; counts its calls."""

    def answer(questions, seed):
        right = round(share * m)
        answer.calls.append((list(questions), seed))
        return [["1"] * right + [f"other {i}" for i in range(m - right)] for _ in questions]

    answer.calls = []
    return answer


def output(question: str) -> str:
    return f"<question>{question}</question>\\boxed{{1}}"


def reward_of(config: RDiverseConfig, outputs, share=0.6, memory=None, **options):
    reward = ChallengerReward(
        config, options.pop("solver", solver(share)), lambda a, b: False, options.pop("skills", skills()), memory
    )
    return reward(outputs, **options), reward


# --- Eq. 11 on the batch ---


def test_the_worked_example(tmp_path):
    """e = (.8, .6) against the toy bank, s = .6, one of four questions in its cluster: -.3483333."""
    outputs = [output("alike 1"), output("far 1"), "no form", output("zero 1")]
    rewards, reward = reward_of(RDiverseConfig("m"), outputs, memory=bank(tmp_path))
    parts = reward.last_batch
    assert parts["p_max"][0] == pytest.approx(0.96)
    assert parts["p_mean"][0] == pytest.approx(0.7866667)
    assert parts["memory"][0] == pytest.approx(0.4983333)
    # (.8, .6) and (0, 1) are .6 alike, so they are one cluster of two: the share is .5
    assert parts["repetition"].tolist() == [0.5, 0.25, 0.0, 0.5]
    assert rewards[0] == pytest.approx(0.4 - 0.5 - 0.4983333)
    assert rewards[2] == -2.0
    lone, _ = reward_of(RDiverseConfig("m"), [output("alike"), *["no form"] * 3], memory=bank(tmp_path))
    assert lone[0] == pytest.approx(-0.3483333)


def test_settings_of_the_penalties_reach_the_reward(tmp_path):
    config = RDiverseConfig("m", gamma=0.3, tau_max=0.1, tau_mean=0.2, distance_threshold=0.3)
    outputs = [output("alike 1"), output("zero 1"), "no form"]
    parts = reward_of(config, outputs, memory=bank(tmp_path))[1].last_batch
    expected = objective.memory_penalty(parts["p_max"], parts["p_mean"], 0.3, 0.1, 0.2)
    assert parts["memory"][:2] == pytest.approx(expected)
    assert parts["repetition"].tolist() == pytest.approx([1 / 3, 1 / 3, 0])  # 0.4 apart: together at the default 0.5


@pytest.mark.parametrize(
    "settings",
    [{"tau_max": 0.0, "tau_mean": 0.0}, {"gamma": 1.0, "tau_max": 0.0}, {"alpha": 3.0, "beta": 2.0}, {"gamma": 0.0}],
)
def test_breaking_the_form_is_the_worst_at_every_threshold(tmp_path, settings):
    """A question without a program on which all answers agree has the lowest valid reward."""
    config = RDiverseConfig("m", **settings)
    (valid, invalid), _ = reward_of(config, [output("bad 1"), "no form"], share=1.0, memory=bank(tmp_path))
    lowest = objective.lowest_valid_reward(config.alpha, config.beta, config.gamma, config.tau_max, config.tau_mean)
    assert invalid < valid == pytest.approx(lowest)


def test_an_empty_bank_reduces_to_the_reward_without_map(tmp_path):
    outputs = [output(q) for q in ("alike 1", "same 2", "far 3", "bad 4")]
    with_map, _ = reward_of(RDiverseConfig("m"), outputs, memory=MemoryBank(tmp_path))
    without, _ = reward_of(RDiverseConfig("m", beta=0.0), outputs)
    assert with_map == without == pytest.approx([0.4 - 0.5, 0.4 - 0.5, 0.4 - 0.25, 0.4 - 1.0])


def test_a_failed_program_never_looks_new(tmp_path):
    outputs = [output("bad 1"), output("far 1")]
    (failed, _), reward = reward_of(RDiverseConfig("m"), outputs, memory=bank(tmp_path))
    assert failed == pytest.approx(0.4 - 1.0 - 0.625)
    assert reward.last_batch["encoded"] == 1


def test_r_zero_is_its_rule_on_text():
    """r = min(s, 1 - s) - P_rep by BLEU; an output without the form is the empty text and gets -1 - P_rep."""
    questions = ["What is the sum of 3 and 4 ?", "What is the sum of 3 and 5 ?", "Find all primes below ten .", "", ""]
    outputs = [output(q) if q else "nothing" for q in questions]
    rewards, reward = reward_of(RDiverseConfig("m", penalty="r_zero"), outputs, skills=None)
    repetition = objective.bleu_repetition_penalty(questions)
    expected = [0.4 - repetition[i] if q else -1 - repetition[i] for i, q in enumerate(questions)]
    assert rewards == pytest.approx(expected)
    assert repetition[0] == 0.4  # the two sums are one cluster of five outputs
    assert reward.last_batch["memory"].tolist() == [0] * 5


def test_a_question_without_a_box_is_no_repetition_of_r_zeros_others():
    """It is the empty text, as in the release, though its question can be read."""
    text = "What is the sum of one and two and three"
    rewards, reward = reward_of(RDiverseConfig("m", penalty="r_zero"), [output(text), f"<question>{text}</question>"])
    assert reward.last_batch["failures"] == [None, "no_box"]
    assert rewards == pytest.approx([0.4 - 0.5, -1 - 0.5])


def test_no_penalty_is_uncertainty():
    rewards, _ = reward_of(RDiverseConfig("m", penalty="none"), [output("a"), output("a"), ""], skills=None)
    assert rewards == pytest.approx([0.4, 0.4, -2.0])


def test_text_measures_use_bleu(tmp_path):
    words = "one two three four five six"
    outputs = [output(words), output(words), output("a b c d e f")]
    memory = MemoryBank(tmp_path, "x")
    memory.add([words], np.array([[1.0, 0.0]]), ["1"], iteration=1)
    for measure in ("question_text", "program_text"):
        _, reward = reward_of(RDiverseConfig("m", measure=measure), outputs, memory=memory)
        assert reward.last_batch["repetition"].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
        assert reward.last_batch["p_max"].tolist() == pytest.approx([1, 1, 0])
        assert reward.last_batch["memory"].tolist() == pytest.approx([0.625, 0.625, 0])


@pytest.mark.parametrize(("threshold", "cluster"), [(0.5, 2), (0.1, 1)])
def test_text_measures_count_the_whole_batch_and_the_whole_memory(tmp_path, threshold, cluster):
    """Two of four outputs have a question, at a distance of about 0.24; one of two in the memory is the first's."""
    words = "one two three four five six"
    outputs = [output(words), output("one two three four five seven"), "no form", "no form"]
    memory = MemoryBank(tmp_path, "x")
    memory.add([words, "a b c d e f"], np.eye(2), ["1", "2"], iteration=1)
    config = RDiverseConfig("m", measure="question_text", distance_threshold=threshold)
    parts = reward_of(config, outputs, memory=memory)[1].last_batch
    assert parts["repetition"].tolist() == pytest.approx([cluster / 4, cluster / 4, 0, 0])
    assert (parts["p_max"][0], parts["p_mean"][0]) == pytest.approx((1, 0.5))
    config = RDiverseConfig("m", penalty="r_zero", distance_threshold=threshold)
    parts = reward_of(config, outputs[:2], skills=None)[1].last_batch
    assert parts["repetition"].tolist() == pytest.approx([cluster / 2] * 2)


def test_the_order_of_a_batch_does_not_matter(tmp_path):
    outputs = [output(f"{name} {i}") for i, name in enumerate(["alike", "far", "zero", "bad", "same", "far"])] + ["x"]
    order = np.random.default_rng(0).permutation(len(outputs))
    rewards, _ = reward_of(RDiverseConfig("m"), outputs, memory=bank(tmp_path))
    shuffled, _ = reward_of(RDiverseConfig("m"), [outputs[i] for i in order], memory=bank(tmp_path))
    assert shuffled == pytest.approx([rewards[i] for i in order])


# --- groups and failures ---


def test_an_engine_that_fails_gives_no_reward_and_is_counted():
    figures = {}

    def half_dead(questions, seed):
        return [None if q.startswith("far") else ["1"] * 5 + ["2"] * 5 for q in questions]

    outputs = [output("alike"), output("far"), output("far"), "none"]
    config = RDiverseConfig("m", beta=0.0)
    rewards, _ = reward_of(config, outputs, solver=half_dead, log_metric=figures.__setitem__)
    assert rewards[1:3] == [None, None]
    assert rewards[0] == pytest.approx(0.5 - 0.25)
    assert rewards[3] == -2.0
    assert figures["challenger/unanswered"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", ["sam", "program_text"])
def test_a_question_that_the_coders_engine_failed_on_has_no_reward_and_is_not_in_the_batch(tmp_path, measure):
    config, figures, plain = RDiverseConfig("m", measure=measure), {}, {}
    outputs = [output(q) for q in ("alike 1", "same 1", "bad 1", "far 1")] + ["no form"]
    lost = [output("lost 1"), output("lost 2")]
    without, _ = reward_of(config, outputs, memory=bank(tmp_path), log_metric=plain.__setitem__)
    rewards, reward = reward_of(config, outputs + lost, memory=bank(tmp_path), log_metric=figures.__setitem__)
    assert rewards == [*without, None, None]
    assert np.isnan(reward.last_batch["repetition"][-2:]).all() and np.isnan(reward.last_batch["memory"][-2:]).all()
    assert figures["challenger/unanswered"] == pytest.approx(2 / 6)
    assert figures["challenger/encoded"] == 3 / 4
    for name in ("repetition", "memory", "clusters", "largest_cluster", "consistency"):
        assert figures[f"challenger/{name}"] == plain[f"challenger/{name}"]
    alone = {}
    assert reward_of(config, lost, memory=bank(tmp_path), log_metric=alone.__setitem__)[0] == [None, None]
    assert alone["challenger/unanswered"] == 1
    assert not {"challenger/repetition", "challenger/encoded", "challenger/consistency"} & alone.keys()


@pytest.mark.parametrize(
    ("past", "error", "message"),
    [
        (
            ["far 1", "lost 1", "bad 1"],
            ConnectionError,
            "1 of 3 questions of the memory have no program because requests to table failed: give SkillEncoder a",
        ),
        (["bad 1", "bad 2"], ValueError, "bank .* has 2 questions, and skills 'table > table' has a program for none"),
    ],
)
def test_questions_of_the_memory_do_not_fall_out_unseen(tmp_path, past, error, message):
    """Each new question would seem newer than it is."""
    memory = MemoryBank(tmp_path, "table > table")
    memory.add(past, np.eye(len(past)), ["1"] * len(past), iteration=1)
    with pytest.raises(error, match=message):
        reward_of(RDiverseConfig("m", measure="program_text"), [output("far 1")], memory=memory)
    _, reward = reward_of(RDiverseConfig("m", measure="question_text"), [output("far 1")], memory=memory)
    assert reward.last_batch["p_max"] == objective.bleu_similarity(["far 1"], past).max(1)  # no program is asked for


def test_nothing_valid_asks_nobody():
    asked, figures = solver(0.5), {}
    rewards, _ = reward_of(
        RDiverseConfig("m", beta=0.0), ["", "x", "<question></question>"], solver=asked, log_metric=figures.__setitem__
    )
    assert rewards == [-2.0] * 3
    assert asked.calls == []
    assert figures["challenger/valid"] == 0
    assert figures["challenger/failure/no_question"] == pytest.approx(2 / 3)
    assert "challenger/encoded" not in figures  # a share of nothing


def test_equal_questions_are_asked_once_and_by_step():
    class State:
        global_step = 7

    asked = solver(0.5)
    reward_of(
        RDiverseConfig("m", beta=0.0), [output("b"), output("a"), output("b")], solver=asked, trainer_state=State()
    )
    assert asked.calls == [(["a", "b"], 7)]


def test_conversational_completions():
    outputs = [[{"role": "assistant", "content": output("a")}]]
    assert reward_of(RDiverseConfig("m", beta=0.0), outputs)[0] == pytest.approx([0.4 - 1.0])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([None] * 10, 0.0),  # nobody commits: not an answer of its own
        (["None"] * 5 + ["1"] * 5, 0.5),
        (["1"] * 10, 0.0),
        (["1"] * 5 + ["2"] * 5, 0.5),  # a tie
        (["1"], 0.0),
    ],
)
def test_votes(answers, expected):
    rewards, _ = reward_of(RDiverseConfig("m", penalty="none"), [output("a")], solver=lambda q, s: [answers] * len(q))
    assert rewards == pytest.approx([expected])


@pytest.mark.parametrize("question", ["%s {0} {} box", "<|im_end|>", '"}{\\', "x" * 5000, "reply 5", "1\n2", "\ud800"])
def test_hostile_questions_are_scored_like_others(question, tmp_path):
    rewards, _ = reward_of(RDiverseConfig("m"), [output(question), output("far")], memory=bank(tmp_path))
    assert all(math.isfinite(reward) and reward > -2 for reward in rewards)


def test_a_solver_that_answers_too_few_questions():
    with pytest.raises(ValueError, match="the solver gave 1 rows of answers to 2 questions"):
        reward_of(RDiverseConfig("m", penalty="none"), [output("a"), output("b")], solver=lambda q, step: [["1"] * 10])


@pytest.mark.parametrize("row", ["12", [1, 2]])
def test_answers_of_a_solver_are_lists_of_texts(row):
    """A text in place of a list would be compared letter by letter."""
    with pytest.raises(ValueError, match="the solver's answers to 'a' are .*: a list of texts is needed, None for no"):
        reward_of(RDiverseConfig("m", penalty="none"), [output("a")], solver=lambda questions, step: [row])


def test_data_that_a_phase_cannot_repeat_are_one_clear_sentence(tmp_path):
    config = ChallengerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(ValueError, match="train_dataset holds the splits train, test: pass one of them"):
        PhaseTrainer("a model", None, config, DatasetDict(train=rows, test=rows))
    with pytest.raises(ValueError, match="needs a map-style Dataset"):
        PhaseTrainer("a model", None, config, rows.to_iterable_dataset())


def test_an_error_in_the_solver_is_raised():
    def broken(questions, seed):
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server"):
        reward_of(RDiverseConfig("m", beta=0.0), [output("a")], solver=broken)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"skills": None}, "needs skills, a SkillEncoder"),
        ({"measure": "question_text"}, {"skills": None}, "pass bank, a MemoryBank, or set beta=0"),
        (
            {"measure": "question", "beta": 0},
            {},
            "measure='question' with skills 'table > table': Skill",
        ),
        ({"measure": "sam", "beta": 0}, {"skills": SkillEncoder(None, Table())}, "all others need a coder"),
        ({"measure": "program_text", "beta": 0}, {"skills": SkillEncoder(None, Table())}, "all others need a coder"),
    ],
)
def test_what_a_reward_needs(config, options, message):
    with pytest.raises(ValueError, match=message):
        reward_of(RDiverseConfig("m", **config), [output("a")], **options)


def test_the_bank_is_not_written(tmp_path):
    memory = bank(tmp_path)
    before = memory.fingerprint()
    reward_of(RDiverseConfig("m"), [output("alike"), output("far")], memory=memory)
    memory.reload()
    assert memory.fingerprint() == before


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


@pytest.mark.parametrize(
    ("logs", "message"),
    [
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
    assert doctor.diagnose(dict.fromkeys(logs)) == []


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
    _, reward = reward_of(RDiverseConfig("m", penalty="r_zero"), [*map(output, words), "no form"], skills=None)
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


def test_a_bank_of_another_encoder_is_refused_before_anything_is_asked(tmp_path):
    memory = MemoryBank(tmp_path / "a", "A")
    memory.add(["q"], np.array([[1.0, 0.0]]), ["1"], iteration=1)
    for written in (memory, MemoryBank(tmp_path / "a").before(2), MemoryBank(tmp_path / "new", "A")):
        with pytest.raises(ValueError, match="has encoder='A', skills has name='table > table'"):
            ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), written)
    ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), MemoryBank(tmp_path / "none"))
    texts = RDiverseConfig("m", measure="question_text")  # which compares no vectors
    ChallengerReward(texts, solver(0.5), lambda a, b: False, None, memory)


def test_breaking_the_form_does_not_pay_with_a_heavier_r_zero_penalty():
    """Four equal questions of which all answers agree: the worst valid output."""
    outputs = [output("the same words")] * 4 + ["no form"]
    rewards, _ = reward_of(RDiverseConfig("m", penalty="r_zero", alpha=3.0), outputs, share=1.0, skills=None)
    assert rewards[4] < min(rewards[:4]) == pytest.approx(-3 * 0.8)


def test_the_time_of_a_question_is_bounded_and_counted():
    now, calls = [0.0], []

    def slow(first, second):
        calls.append((first, second))
        now[0] += 1.0
        return False

    budget = Budget(slow, seconds=10, clock=lambda: now[0])
    assert objective.self_consistency([str(i) for i in range(10)], budget) == ("0", 0.1)
    assert (now[0], len(calls), budget.cut) == (10, 10, 80)
    fresh = Budget(slow, seconds=10, clock=lambda: now[0])
    assert objective.self_consistency(["1", "2"], fresh)[1] == 0.5
    assert fresh.cut == 0


def test_each_question_has_a_budget_of_its_own(monkeypatch):
    budgets = []

    class Short(Budget):
        def __init__(self, same):
            super().__init__(same, seconds=0.0)
            budgets.append(self)

    monkeypatch.setattr("r_diverse.trainer.Budget", Short)
    figures = {}
    outputs = [output("a"), output("b"), "none"]
    reward_of(RDiverseConfig("m", penalty="none"), outputs, skills=None, log_metric=figures.__setitem__)
    assert len(budgets) == 2
    assert figures["challenger/late"] == 1


def test_score_needs_no_process_group(tmp_path):
    reward = ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), bank(tmp_path))
    parts = reward.score([Challenge("alike", "1"), Challenge("", None, "no_box")], [0.5, math.nan])
    assert parts["reward"][1] == -2.0
    assert parts["valid"].tolist() == [True, False]


# --- TRL ---


def test_what_is_overridden_in_trl():
    assert list(inspect.signature(GRPOTrainer._get_train_sampler).parameters) == ["self", "dataset"]
    parameters = ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert list(inspect.signature(RepeatSampler.__init__).parameters)[1:] == parameters
    own = {name for name, value in vars(PhaseTrainer).items() if callable(value) and hasattr(GRPOTrainer, name)}
    assert own == {"__init__", "_get_train_sampler", "_generate_and_score_completions"}
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        assert f'output["{name}"]' in source


def test_rollouts_of_a_base_model_stop_at_the_end_of_a_turn(tmp_path):
    """As Qwen3-4B-Base has it: `<|endoftext|>` is the only end that model and tokenizer declare."""
    model, tokenizer = tiny_qwen3(hidden=32)
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    config = SolverConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=1, max_completion_length=64, top_p=1.0, beta=0.0,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(4)])
    trainer = PhaseTrainer(model, reward, config, train_dataset=rows, processing_class=tokenizer)
    assert trainer.eos_token_ids == [tokenizer.eos_token_id, turn_end]
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids  # TRL only masks what comes behind an end
    trainer.use_vllm, trainer.eos_token_ids = True, [tokenizer.eos_token_id]
    trainer.vllm_generation = SimpleNamespace(generation_kwargs={"stop_token_ids": [77], "min_p": 0.1})
    trainer._stop_at_the_end_of_a_turn()
    assert set(trainer.vllm_generation.generation_kwargs.pop("stop_token_ids")) == {77, *trainer.eos_token_ids}
    assert trainer.vllm_generation.generation_kwargs == {"min_p": 0.1} and turn_end in trainer.eos_token_ids
    trainer.use_vllm = False
    trainer.train()
    assert any(ids[-1] == turn_end for ids in seen)
    assert not any(turn_end in ids[:-1] for ids in seen)


def test_the_order_of_prompts_is_trls_and_another_in_the_next_epoch(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = SolverConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=8, num_iterations=2, save_steps=8, seed=5, beta=0.0,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(12)])
    trainer = PhaseTrainer(model, lambda **columns: [], config, train_dataset=rows, processing_class=tokenizer)
    first = list(trainer._get_train_sampler())
    assert first == list(GRPOTrainer._get_train_sampler(trainer))
    trainer.state.epoch = 1.0
    second = list(trainer._get_train_sampler())
    assert first != second and sorted(first) == sorted(second)


def test_trls_own_config_will_do(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "1+1="}])
    trainer = PhaseTrainer(
        model,
        lambda completions, **columns: [0.0, 1.0, 0.0, 1.0],
        config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and not torch.equal(before, model.lm_head.weight)
    assert not any(isinstance(callback, doctor.DoctorCallback) for callback in trainer.callback_handler.callbacks)


def test_trained_weights_in_half_precision_are_warned_of_when_training_starts(tmp_path, caplog):
    """Adapters on quantized weights, which TRL rounds, are made float32 after the constructor."""
    model, tokenizer = tiny_qwen3(hidden=32)
    config = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to="none")
    trainer = PhaseTrainer(
        model,
        lambda completions, **columns: [0.0] * len(completions),
        config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]),
    )
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.bfloat16()
    advice = ("load the model in float32 (policy_dtype)", "p.data = p.data.float()")
    for count, text in enumerate(advice, 1):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == count and "in half precision" in warnings[-1] and text in warnings[-1]
        trainer.model.base_model.model.is_quantized = True  # stands for 4 bits
    for p in trainer.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert len(caplog.records) == 2


def test_the_gap_of_two_engines_leaves_out_the_nucleus():
    trainer = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert logps_gap(trainer, trainer.masked_fill(mask == 0, 0.0), mask, 0.99) == 0
    assert logps_gap(trainer, trainer - math.log(0.9), mask, 0.9) == pytest.approx(0, abs=1e-6)
    assert logps_gap(trainer, trainer - 0.2, mask, 0.9) == pytest.approx(0.2)
    assert logps_gap(trainer, trainer + torch.tensor([[0.3, math.nan], [0.0, 0.0]]), mask, 1.0) == pytest.approx(0.15)
