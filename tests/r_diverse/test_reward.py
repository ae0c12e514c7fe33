"""The Challenger's reward over a whole batch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from r_diverse_rewards import Table, bank, output, reward_of, skills, solver

from r_diverse import ChallengerReward, MemoryBank, RDiverseConfig, SkillEncoder, objective, votes
from r_diverse.questions import FAILURES, Challenge

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
    config = RDiverseConfig("m", gamma=0.3, tau_max=0.1, tau_mean=0.2, distance_threshold=0.3, bleu_threshold=1)
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
    config = RDiverseConfig("m", measure="question_text", bleu_threshold=threshold, distance_threshold=0.01)
    parts = reward_of(config, outputs, memory=memory)[1].last_batch
    assert parts["repetition"].tolist() == pytest.approx([cluster / 4, cluster / 4, 0, 0])
    assert (parts["p_max"][0], parts["p_mean"][0]) == pytest.approx((1, 0.5))
    config = RDiverseConfig("m", penalty="r_zero", bleu_threshold=threshold, distance_threshold=0.01)
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
    shares = {name: figures[f"challenger/failure/{name}"] for name in FAILURES}
    # TRL logs the mean over the batches that have a figure: one that is left out where it is 0 would seem higher
    assert shares == pytest.approx({**dict.fromkeys(FAILURES, 0), "no_question": 2 / 3, "empty_question": 1 / 3})
    assert "challenger/encoded" not in figures  # a share of nothing


def test_equal_questions_are_asked_once_and_by_step():
    class State:
        global_step = 7

    asked = solver(0.5)
    reward_of(
        RDiverseConfig("m", beta=0.0), [output("b"), output("a"), output("b")], solver=asked, trainer_state=State()
    )
    assert asked.calls == [(["a", "b"], 7)]


@pytest.mark.parametrize(("outputs", "clusters"), [(["a", "far"], 2), (["a", "b"], 1), (["a"], None), ([], None)])
def test_clusters_are_logged_of_several_questions_only(outputs, clusters):
    figures, written = {}, [*map(output, outputs), "no form"]
    reward_of(RDiverseConfig("m", beta=0.0), written, log_metric=figures.__setitem__)
    assert figures.get("challenger/clusters") == clusters
    assert figures.get("challenger/largest_cluster") == (1 / clusters if clusters else None)
    assert ("challenger/median_cosine" in figures) == (clusters is not None)


def test_conversational_completions():
    outputs = [[{"role": "assistant", "content": text} for text in ("A call of a tool.", output("a"))]]
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


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([["1"] * 10], "the solver gave 1 rows of answers to 2 questions"),
        (None, "the solver gave None: a list is needed, with m answers to each question"),
        ({"a": ["1"], "b": ["1"]}, "the solver gave {'a': .*: a list is needed"),
        ("ab", "the solver gave 'ab': a list is needed"),
        ([["1"] * 3, ["1"] * 2], "the solver gave 2 answers to 'b' and 3 to 'a': the same number is needed"),
    ],
)
def test_what_a_solver_may_not_give_is_one_clear_sentence(answers, message):
    with pytest.raises(ValueError, match=message):
        reward_of(RDiverseConfig("m", penalty="none"), [output("a"), output("b")], solver=lambda q, step: answers)


@pytest.mark.parametrize("row", ["12", [1, 2], [], 5, [["1"], ["2"]]])
def test_answers_of_a_solver_are_lists_of_texts(row):
    """A text in place of a list would be compared letter by letter."""
    with pytest.raises(ValueError, match="the solver's answers to 'a' are .*: a list of texts is needed, None for no"):
        reward_of(RDiverseConfig("m", penalty="none"), [output("a")], solver=lambda questions, step: [row])


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


def test_a_bank_of_another_encoder_is_refused_before_anything_is_asked(tmp_path):
    memory = MemoryBank(tmp_path / "a", "A")
    memory.add(["q"], np.array([[1.0, 0.0]]), ["1"], iteration=1)
    for written in (memory, MemoryBank(tmp_path / "a").before(2), MemoryBank(tmp_path / "new", "A")):
        with pytest.raises(ValueError, match="has encoder='A', skills has name='table > table'"):
            ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), written)
    questions, encoder = RDiverseConfig("m", measure="question"), SkillEncoder(None, Table())
    with pytest.raises(ValueError, match="has encoder='A', skills has name='question text > table'"):
        ChallengerReward(questions, solver(0.5), lambda a, b: False, encoder, memory)
    ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), MemoryBank(tmp_path / "none"))
    texts = RDiverseConfig("m", measure="question_text")  # which compares no vectors
    ChallengerReward(texts, solver(0.5), lambda a, b: False, None, memory)


def test_breaking_the_form_does_not_pay_with_a_heavier_r_zero_penalty():
    """Four equal questions of which all answers agree: the worst valid output."""
    outputs = [output("the same words")] * 4 + ["no form"]
    rewards, _ = reward_of(RDiverseConfig("m", penalty="r_zero", alpha=3.0), outputs, share=1.0, skills=None)
    assert rewards[4] < min(rewards[:4]) == pytest.approx(-3 * 0.8)


def test_the_time_of_a_question_is_bounded_and_told(monkeypatch):
    now, calls = [0.0], []

    def slow(first, second):
        calls.append((first, second))
        now[0] += 1.0
        return False

    monkeypatch.setattr(votes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    answers = [str(i) for i in range(10)]
    assert votes.timed_vote(answers, slow) == (answers, "0", 0.1, True)
    assert (now[0], len(calls)) == (10, 10)
    assert votes.timed_vote(["1", "2"], slow)[1:] == ("1", 0.5, False)  # with a time of its own


def test_late_questions_are_counted(monkeypatch):
    def late() -> float:
        figures, outputs = {}, [output("a"), output("b"), "none"]
        reward_of(RDiverseConfig("m", penalty="none"), outputs, skills=None, log_metric=figures.__setitem__)
        return figures["challenger/late"]

    assert late() == 0
    monkeypatch.setattr(votes, "QUESTION_SECONDS", 0.0)
    assert late() == 1
    monkeypatch.setattr("r_diverse.reward.gather_object", lambda rows: rows * 2)  # another process with the same
    assert late() == 1


def test_score_needs_no_process_group(tmp_path):
    reward = ChallengerReward(RDiverseConfig("m"), solver(0.5), lambda a, b: False, skills(), bank(tmp_path))
    parts = reward.score([Challenge("alike", "1"), Challenge("", None, "no_box")], [0.5, math.nan])
    assert parts["reward"][1] == -2.0
    assert parts["valid"].tolist() == [True, False]
