"""The harness: benchmarks, engines, records that survive a kill, metrics that follow from records."""

import contextlib
import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from common.answers import Verdict
from common.evaluation import (
    BENCHMARKS,
    Benchmark,
    Completion,
    Decoding,
    Prompt,
    ServerEngine,
    TransformersEngine,
    evaluate,
    load_benchmark,
    score_responses,
    scores_by_question,
    summarize,
)
from common.evaluation import __main__ as command
from common.evaluation.engines import stop_ids, turn_end_id
from common.evaluation.run import generate_samples, rescore
from common.evaluation.scoring import bbeh_row, majority, reward_scorer, score_records
from common.lora import lora_config
from common.runs import exclusive, read_jsonl
from common.tiny import tiny_qwen3, tiny_qwen3_vl
from common.verifiers import choice_reward
from r_diverse import questions as questions_of_r_diverse

ROOT = Path(__file__).resolve().parents[2]
SAMPLED = Decoding(temperature=1.0, max_new_tokens=6)


class Echo:
    """Answers a question i with i, except that every third sample is wrong; counts what it is asked."""

    name = "echo"

    def __init__(self, fail_after: int | None = None):
        self.asked, self.fail_after = [], fail_after

    def generate(self, prompts, decoding, seeds):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += [(prompt.messages[-1]["content"], seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        texts = [p.messages[-1]["content"] if seed % 3 else "no" for p, seed in zip(prompts, seeds, strict=True)]
        return [Completion(f"The answer is \\boxed{{{text}}}.", 7, "stop") for text in texts]


def numbers(count: int = 10, **fields) -> Benchmark:
    rows = [{"id": str(i), "prompt": [{"role": "user", "content": str(i)}], "answer": str(i)} for i in range(count)]
    return Benchmark(name="numbers", rows=rows, **fields)


def test_metrics_follow_from_the_records(tmp_path):
    engine = Echo()
    report = evaluate(engine, numbers(), tmp_path, samples=4, decoding=SAMPLED)
    records = read_jsonl(tmp_path / "numbers" / "scored.jsonl")
    assert len(records) == len(engine.asked) == 40
    assert len({seed for _, seed in engine.asked}) == 40  # a seed of its own for every sample
    right = [record["score"] for record in records]
    assert report["avg@k"] == pytest.approx(sum(right) / 40)
    assert report["verdicts"] == {"correct": int(sum(right)), "wrong": 40 - int(sum(right))}
    assert report["pass@k"][1] == pytest.approx(report["avg@k"])
    scores = {str(i): [record["score"] for record in records if record["id"] == str(i)] for i in range(10)}
    won = [sum(row) > 2 or (sum(row) == 2 and row[0]) for row in scores.values()]  # all wrong answers are one class
    assert report["maj@k"] == pytest.approx(sum(won) / 10)
    low, high = report["interval"]
    assert low < report["avg@k"] < high
    assert json.loads((tmp_path / "numbers.json").read_text())["avg@k"] == report["avg@k"]
    assert (report["questions"], report["samples"], report["truncated"]) == (10, 4, 0.0)


def test_another_seed_draws_other_samples(tmp_path):
    seeds = []
    for seed in (0, 1):
        engine = Echo()
        evaluate(engine, numbers(), tmp_path / str(seed), samples=4, decoding=SAMPLED, seed=seed)
        seeds.append({asked for _, asked in engine.asked})
    assert not seeds[0] & seeds[1]


def test_a_sample_has_a_seed_of_its_own_that_stays(tmp_path):
    """A resumed evaluation of an older version draws what that one would have drawn."""
    engine, benchmark = Echo(), numbers(12)
    for seed in range(12):
        path = tmp_path / f"{seed}.jsonl"
        generate_samples(engine, benchmark.rows, path, 12, SAMPLED, seed)
    assert len({seed for _, seed in engine.asked}) == 12**3  # not one for seed 1, question 11 and seed 11, question 1
    assert engine.asked[12 + 3] == ("3", zlib.crc32(b"0/3/1"))


def test_rates_of_records_by_hand():
    def record(question, score, verdict, reason, tokens):
        return {"id": question, "score": score, "verdict": verdict, "finish_reason": reason, "num_tokens": tokens}

    records = [record("a", 1.0, "correct", "stop", 4), record("a", 0.0, "no_answer", "length", 8)]
    records += [record("b", 0.0, "wrong", "stop", 2), record("b", 0.0, "unparseable", "stop", 2)]
    rates = summarize(records)
    assert (rates["parsed"], rates["truncated"], rates["mean_tokens"]) == (0.5, 0.25, 4.0)
    assert rates["pass@k"] == {1: 0.25, 2: 0.5}


def test_a_rate_that_some_records_do_not_tell_is_none():
    records = [{"id": "a", "score": 1.0, "finish_reason": "stop", "num_tokens": 4}, {"id": "b", "score": 0.0}]
    rates = summarize(records)
    assert (rates["truncated"], rates["mean_tokens"], rates["parsed"]) == (None, None, None)


def test_the_majority_is_of_answers_that_mean_the_same():
    """Two forms of one value are one class, and responses without an answer are none."""
    responses = ("\\boxed{3}", "\\boxed{1/2}", "\\boxed{0.5}", "I give up.", "I gave up.", "No idea.")
    records = [{"id": "a", "response": response} for response in responses]
    rows = {"a": {"answer": "\\frac{1}{2}"}}
    assert majority(records, rows) == 1.0
    assert majority([records[3], records[1]], rows) == 1.0  # a tie would go to the first


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    straight = evaluate(Echo(), numbers(), tmp_path / "a", samples=4, decoding=SAMPLED, batch=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Echo(fail_after=18), numbers(), tmp_path / "b", samples=4, decoding=SAMPLED, batch=6)
    again = Echo()
    resumed = evaluate(again, numbers(), tmp_path / "b", samples=4, decoding=SAMPLED, batch=6)
    assert len(again.asked) == 40 - 18
    assert resumed == straight
    assert (tmp_path / "a/numbers/samples.jsonl").read_bytes() == (tmp_path / "b/numbers/samples.jsonl").read_bytes()
    nothing = Echo()
    assert evaluate(nothing, numbers(), tmp_path / "b", samples=4, decoding=SAMPLED, batch=6) == straight
    assert nothing.asked == []


def test_batches_of_which_a_kill_left_a_part_are_completed(tmp_path, monkeypatch):
    """A batch is written at once and waited for once; kills may cut it anywhere, also one after the other."""
    rows, straight, killed, waits = numbers().rows, tmp_path / "straight.jsonl", tmp_path / "killed.jsonl", []
    monkeypatch.setattr("common.runs.os.fsync", waits.append)
    generate_samples(Echo(), rows, straight, 3, SAMPLED, batch=8)
    assert len(waits) == 4  # of 30 records
    whole = straight.read_bytes()
    for cut in (1, len(whole) // 9, len(whole) // 3, whole.index(b"\n", len(whole) // 2) + 1, len(whole) - 1):
        killed.write_bytes(whole[:cut])
        with contextlib.suppress(KeyboardInterrupt):  # none where one batch is the rest
            generate_samples(Echo(fail_after=8), rows, killed, 3, SAMPLED, batch=8)
        killed.write_bytes(killed.read_bytes()[:-20])
        generate_samples(Echo(), rows, killed, 3, SAMPLED, batch=8)
        assert killed.read_bytes() == whole


def test_what_follows_a_lost_response_comes_again_in_order(tmp_path):
    class LosesOne(Echo):
        def generate(self, prompts, decoding, seeds):
            done = super().generate(prompts, decoding, seeds)
            return [done[0], None, *done[2:]] if len(self.asked) == len(prompts) else done

    rows, straight, lost, engine = numbers(4).rows, tmp_path / "straight.jsonl", tmp_path / "lost.jsonl", LosesOne()
    generate_samples(Echo(), rows, straight, 1, SAMPLED)
    with pytest.raises(ConnectionError, match="1 of 4 requests"):
        generate_samples(engine, rows, lost, 1, SAMPLED)
    generate_samples(engine, rows, lost, 1, SAMPLED)
    assert lost.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"seed": 1}, "seed"), ({"samples": 2}, "samples"), ({"decoding": Decoding(0.5)}, "decoding")],
)
def test_records_of_another_evaluation_are_refused_and_kept(tmp_path, changes, name):
    settings = {"samples": 4, "decoding": SAMPLED}
    evaluate(Echo(), numbers(), tmp_path, **settings)
    before = (tmp_path / "numbers/samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"holds records with {name}=") as error:
        evaluate(Echo(), numbers(), tmp_path, **{**settings, **changes})
    assert "\n" not in str(error.value)
    assert (tmp_path / "numbers/samples.jsonl").read_bytes() == before


def test_another_chat_template_is_another_evaluation(tmp_path):
    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    engine = Echo()
    engine.template_options = {"enable_thinking": False}
    with pytest.raises(ValueError, match=r"holds records with chat_template_kwargs=\{\}, this evaluation has"):
        evaluate(engine, numbers(), tmp_path, decoding=SAMPLED)


def test_an_evaluation_does_not_go_on_with_another_engine(tmp_path):
    class Other(Echo):
        pass

    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    with pytest.raises(ValueError, match="holds records with engine='Echo', this evaluation has 'Other'"):
        evaluate(Other(), numbers(), tmp_path, decoding=SAMPLED)
    Other.kind = None  # of recorded answers
    evaluate(Other(), numbers(), tmp_path, decoding=SAMPLED)


def test_a_folder_that_did_not_record_engine_and_chat_template_goes_on(tmp_path):
    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    path = tmp_path / "numbers/identity.json"
    later = ("engine", "chat_template_kwargs")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in later}))
    engine = Echo()
    engine.template_options = {"enable_thinking": False}
    evaluate(engine, numbers(), tmp_path, decoding=SAMPLED)
    assert engine.asked == []


def test_a_folder_without_a_record_can_be_claimed_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Echo(fail_after=0), numbers(), tmp_path, samples=4, decoding=SAMPLED)
    lost = Echo()
    lost.generate = lambda prompts, decoding, seeds: [None] * len(prompts)
    with pytest.raises(ConnectionError, match="requests to echo failed"):
        evaluate(lost, numbers(), tmp_path, samples=3, decoding=SAMPLED)
    assert evaluate(Echo(), numbers(), tmp_path, samples=2, decoding=SAMPLED)["samples"] == 2


def test_records_of_a_killed_evaluation_are_not_scored_as_a_whole_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Echo(fail_after=10), numbers(), tmp_path, samples=4, decoding=SAMPLED, batch=10)
    with pytest.raises(ValueError, match="holds 10 of 40 responses: the same evaluation goes on there"):
        rescore(numbers(), tmp_path)
    evaluate(Echo(), numbers(), tmp_path, samples=4, decoding=SAMPLED, batch=10)
    records = tmp_path / "numbers/samples.jsonl"
    records.write_bytes(records.read_bytes()[:-1])  # killed within its last line
    with pytest.raises(ValueError, match="holds 39 of 40 responses"):
        rescore(numbers(), tmp_path)


@pytest.mark.parametrize("content", ['{"model": "ec', "[]", "5"])
def test_a_broken_identity_is_one_sentence(tmp_path, content):
    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    (tmp_path / "numbers/identity.json").write_text(content)
    for again in (
        lambda: evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED),
        lambda: rescore(numbers(), tmp_path),
    ):
        with pytest.raises(ValueError, match=r"identity.json, which says whose records these are, cannot be read"):
            again()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 2.0}, r"top_p must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
    ],
)
def test_wrong_decoding_is_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


@pytest.mark.parametrize("samples", [0, -2])
def test_a_question_needs_a_sample(tmp_path, samples):
    with pytest.raises(ValueError, match=f"samples must be at least 1, got {samples}"):
        evaluate(Echo(), numbers(), tmp_path, samples=samples, decoding=SAMPLED)


def test_another_scorer_needs_no_new_answers(tmp_path):
    evaluate(Echo(), numbers(), tmp_path, samples=2, decoding=SAMPLED)
    samples = (tmp_path / "numbers/samples.jsonl").read_bytes()
    report = rescore(numbers(score=lambda response, row: 0.5), tmp_path)
    assert report["avg@k"] == 0.5
    assert {record["score"] for record in read_jsonl(tmp_path / "numbers/scored.jsonl")} == {0.5}
    assert (tmp_path / "numbers/samples.jsonl").read_bytes() == samples


def test_scoring_needs_records_of_the_same_questions(tmp_path):
    with pytest.raises(ValueError, match="holds no records of numbers: run the evaluation first"):
        rescore(numbers(), tmp_path)
    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    with pytest.raises(ValueError, match="holds records of other questions"):
        rescore(numbers(9), tmp_path)


def responses(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_responses_of_others_are_scored_into_the_same_table(tmp_path):
    records = [{"id": i, "response": rf"\boxed{{{i % 5}}}", "sample": 0} for i in range(10)]
    report = score_responses(numbers(), responses(tmp_path / "theirs.jsonl", records), tmp_path / "out")
    assert (report["avg@k"], report["parsed"], report["truncated"], report["mean_tokens"]) == (0.5, 1.0, None, None)
    assert json.loads((tmp_path / "out/numbers.json").read_text()) == json.loads(json.dumps(report))
    assert len(read_jsonl(tmp_path / "out/numbers/scored.jsonl")) == 10
    assert "maj@k" not in report  # of one sample
    assert rescore(numbers(), tmp_path / "out") == report
    (tmp_path / "out/numbers/samples.jsonl").unlink()  # as in folders of older versions
    with pytest.raises(ValueError, match="holds no records of numbers"):
        rescore(numbers(), tmp_path / "out")


def test_scores_are_those_of_the_same_questions_whatever_the_order_of_the_records(tmp_path):
    records = [{"id": i, "response": rf"\boxed{{{min(i, 2)}}}"} for i in range(10)]
    for name, order in (("forwards", records), ("backwards", records[::-1])):
        score_responses(numbers(), responses(tmp_path / f"{name}.jsonl", order), tmp_path / name)
        assert scores_by_question(tmp_path / name, "numbers") == [[1.0]] * 3 + [[0.0]] * 7


def test_blank_lines_and_a_last_line_without_an_end_are_read(tmp_path):
    lines = [json.dumps({"id": i, "response": rf"\boxed{{{i}}}", "num_tokens": float("nan")}) for i in range(10)]
    (tmp_path / "theirs.jsonl").write_text("\n\n".join(lines))
    assert score_responses(numbers(), tmp_path / "theirs.jsonl", tmp_path / "out")["avg@k"] == 1.0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 0}], "line 1: a record needs `id` and `response`"),
        ([{"id": 0, "response": "5", "num_tokens": "x"}], "line 1: num_tokens must be a number, got 'x'"),
        ([{"id": 0, "response": "5", "sample": 0}] * 2, "line 2: sample 0 of question 0 stands there twice"),
        ([{"id": 0, "response": "5", "sample": [0]}], r"line 1: sample must be a number, got \[0\]"),
        ([{"id": 0, "response": None}], "line 1: a record needs"),
        ([{"id": 99, "response": "5"}], "there is no question '99'"),
        ([{"id": i, "response": "5"} for i in range(9)], "there is no response to question '9'"),
    ],
)
def test_incomplete_responses_are_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        score_responses(numbers(), responses(tmp_path / "theirs.jsonl", records), tmp_path / "out")
    assert not (tmp_path / "out/numbers.json").exists()


def test_several_samples_at_temperature_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 samples at temperature 0"):
        evaluate(Echo(), numbers(), tmp_path, samples=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\boxed{(A)}", "(A)", True),
        ("The answer is a.", "(A)", True),
        ("The answer is (a)", "A", True),
        ("The answer is (B)", "(A)", False),
        ("The answer is 25.0", "25", True),
        ("The answer is 25.5", "25", False),
        ("The answer is yes, no, Yes", "yes,no, yes", True),
        ("The answer is 1, 2", "[1, 2]", True),
        (r"\boxed{[1, 2]}", "1,2", True),
        ("The answer is Why?", "why", True),
        ("The answer is why", "why?", False),
        ("The answer is 'it'", "it", True),
        (r"\boxed{$x$}", "x", True),
        ("<answer>$5x</answer>", "5", False),
        (r"<answer>\text{abc</answer>", "ab", False),
        ("<answer>(bc</answer>", "b", False),
        (r"The answer is $\boxed{\text{Maybe}}$", "maybe", True),
        (r"The answer is \texttt{ab}.", "AB", True),
        (r"\boxed{\text{ab} c}", "ab", False),
        ("<answer>ab}</answer>", "ab", False),
        ("<answer>**ab**.\ncd</answer>", "ab", True),
        (r"<answer>$\text{ab}$.</answer>", " ab ", True),
    ],
)
def test_the_match_of_bbeh(response, gold, right):
    assert bbeh_row(response, {"answer": gold}) is (Verdict.CORRECT if right else Verdict.WRONG)
    assert bbeh_row("no idea", {"answer": "no idea"}) is Verdict.NO_ANSWER


def test_a_reward_function_as_a_scorer():
    score, release = reward_scorer(choice_reward), reward_scorer(choice_reward, compatible=True)
    responses = ["<answer>B</answer>", "<answer>A</answer>", "The answer is B", "no idea"]
    row = {"answer": "B"}
    assert [str(score(response, row)) for response in responses] == ["correct", "wrong", "correct", "no_answer"]
    assert [str(release(response, row)) for response in responses] == ["correct", "wrong", *["unparseable"] * 2]


def test_an_incomplete_table_is_no_result():
    record = {"sample": 0, "score": 1.0}
    with pytest.raises(ValueError, match="different numbers of samples"):
        summarize([{**record, "id": "a"}, {**record, "id": "b"}, {**record, "id": "b", "sample": 1}])


@pytest.mark.parametrize(
    ("rows", "message"), [([], "has no rows"), ([{"id": "a"}, {"id": "a"}], "rows with the same id, such as 'a'")]
)
def test_a_benchmark_with_no_or_equal_ids_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(name="x", rows=rows)


# --- the engine ----------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = tiny_qwen3(hidden=32)
    return TransformersEngine(model, tokenizer, batch_size=3)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": "?" * (1 + 3 * i % 7)}]) for i in range(count)]


def test_a_prompt_has_the_special_tokens_of_its_template_only():
    """Gemma's and Llama's tokenizers put a first token before what their templates have begun with it already."""
    model, tokenizer = tiny_qwen3(hidden=32)
    plain = TransformersEngine(model, tokenizer).generate(prompts(3), Decoding(max_new_tokens=4), range(3))
    first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    assert tokenizer("?")["input_ids"][0] == first[1]
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(prompts(3), Decoding(max_new_tokens=4), range(3)) == plain


@pytest.mark.parametrize(("declared", "ends"), [(None, [5]), (7, [5, 7]), ([9, 7], [5, 7, 9])])
def test_every_declared_end_ends_a_response(declared, ends):
    assert stop_ids(declared, SimpleNamespace(eos_token_id=5)) == ends
    assert stop_ids(declared, SimpleNamespace(eos_token_id=None)) == ends[1:]


def test_a_tokenizer_without_a_pad_token_pads_with_its_end():
    model, tokenizer = tiny_qwen3(hidden=32)
    plain = TransformersEngine(model, tokenizer).generate(prompts(3), Decoding(max_new_tokens=4), range(3))
    tokenizer.pad_token = None
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(prompts(3), Decoding(max_new_tokens=4), range(3)) == plain


def test_a_repetition_penalty_that_a_model_declares_is_left_out():
    model, tokenizer = tiny_qwen3(hidden=32)
    plain = TransformersEngine(model, tokenizer).generate(prompts(3), Decoding(max_new_tokens=30), range(3))
    model.generation_config.repetition_penalty = 5.0
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(prompts(3), Decoding(max_new_tokens=30), range(3)) == plain


def test_two_adapters_of_one_base_are_two_models(tmp_path, capsys):
    model, tokenizer = tiny_qwen3(hidden=32)
    for folder in (tmp_path / "base", *(tmp_path / name / "model" for name in ("a", "b"))):
        saved = model if folder.name == "base" else peft.get_peft_model(copy.deepcopy(model), lora_config(2))
        if folder.name != "base":
            saved.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "1+1?", "answer": "#### 2"}] * 1319
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--benchmark", "gsm8k", "--data", str(data), "--limit", "1", "--max_new_tokens", "2"]
    words += ["--out", str(tmp_path / "out")]
    assert command.main(["--model", str(tmp_path / "a/model"), *words]) == 0
    assert command.main(["--model", str(tmp_path / "b/model"), *words]) == 2
    assert "holds records with model=" in capsys.readouterr().err


def test_an_evaluation_that_another_process_is_at_is_refused(tmp_path, engine):
    benchmark = Benchmark("b", [{"id": "0", "prompt": prompts(1)[0].messages, "answer": "1"}], lambda *_: 1.0)
    with exclusive(tmp_path / "b"), pytest.raises(ValueError, match="in use by another process"):
        evaluate(engine, benchmark, tmp_path)
    assert not (tmp_path / "b" / "samples.jsonl").exists()


def test_a_mistyped_address_of_a_server_is_one_sentence():
    with pytest.raises(ValueError, match="server 'http://localhost:80OO/v1' is no address"):
        ServerEngine("http://localhost:80OO/v1", "m")


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_vl])
def test_a_closed_engine_holds_no_model(make):
    model, processor = make(hidden=32)
    engine, held = TransformersEngine(model, processor), weakref.ref(next(model.model.parameters()))
    del model
    engine.close()
    gc.collect()
    assert held() is None


def test_greedy_answers_do_not_depend_on_the_batch(engine):
    together = engine.generate(prompts(7), Decoding(max_new_tokens=5), [0] * 7)
    for prompt, completion in zip(prompts(7), together, strict=True):
        assert engine.generate([prompt], Decoding(max_new_tokens=5), [0]) == [completion]


def test_sampling_is_seeded_and_leaves_the_global_state(engine):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = engine.generate(prompts(5), SAMPLED, range(5))
    assert torch.equal(torch.rand(2), expected)
    assert engine.generate(prompts(5), SAMPLED, range(5)) == first
    assert engine.generate(prompts(5), SAMPLED, range(9, 14)) != first


def test_length_and_truncation(engine):
    (completion,) = engine.generate(prompts(1), Decoding(max_new_tokens=3), [0])
    assert (completion.num_tokens, completion.finish_reason) == (3, "length")


def test_the_end_of_a_turn_stops_a_base_model_too(monkeypatch):
    """As Qwen3-4B-Base has it: `<|endoftext|>` is the only end that is declared, its template has another."""
    model, tokenizer = tiny_qwen3()
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert turn_end_id(tokenizer) == turn_end
    base = TransformersEngine(model, tokenizer)
    assert base.stops == sorted({tokenizer.eos_token_id, turn_end})
    text = r"So \boxed{5}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\boxed{4}"
    completion = base._completion(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert completion.text == r"So \boxed{5}" and completion.finish_reason == "stop"


def test_a_template_that_reads_content_as_parts_has_an_end_of_turn_too():
    tokenizer = tiny_qwen3()[1]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


# None, one that shows the question only, one that wants three turns, one without text, one that cannot be rendered
NO_END = [
    None, "{{ messages[0]['content'] }}<|im_end|>", "{{ raise_exception('three turns') }}", "<|im_start|><|im_end|>",
    "{{ messages[0]['content'] + 1 }}",
]  # fmt: skip


@pytest.mark.parametrize("template", NO_END)
def test_a_template_without_an_end_of_turn_adds_none(template):
    tokenizer = tiny_qwen3()[1]
    tokenizer.chat_template = template
    assert turn_end_id(tokenizer) is None
    assert questions_of_r_diverse.turn_end_id(tokenizer) is None


def test_the_chat_template_gets_its_options(engine):
    model, tokenizer = engine.model, engine.tokenizer
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{{ 'off' if enable_thinking is false else 'on' }}"
    try:
        plain = TransformersEngine(model, tokenizer)
        off = TransformersEngine(model, tokenizer, chat_template_kwargs={"enable_thinking": False})
        assert [e._render(prompts(1)[0]) for e in (plain, off)] == ["on", "off"]
    finally:
        tokenizer.chat_template = kept


def test_vllm_without_its_package_names_the_extra():
    from common.evaluation import VLLMEngine

    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"post-training-reference\[vllm\]"):
            VLLMEngine("x")


# --- the registered benchmarks and the command ----------------------------------------------------------------


MATH = ["math500", "gsm8k", "minerva_math", "olympiadbench", "amc23", "aime24", "aime25"]
SRPO = {
    "sciknoweval_biology": "sciknoweval/biology/test.json",
    "sciknoweval_chemistry": "sciknoweval/chemistry/test.json",
    "sciknoweval_materials": "sciknoweval/material/test.json",
    "sciknoweval_physics": "sciknoweval/physics/test.json",
    "tooluse": "tooluse/test.json",
}


@pytest.mark.parametrize(
    ("names", "samples", "decoding"),
    [
        (("math500", "gsm8k", "minerva_math", "olympiadbench"), 1, Decoding(0.0, 1.0, 4096)),
        (("amc23", "aime24", "aime25"), 32, Decoding(1.0, 0.95, 4096)),
        (("mmlu_pro", "supergpqa", "bbeh"), 1, Decoding(0.0, 1.0, 8192)),
        (SRPO, 16, Decoding(0.6, 0.95, 8192)),
    ],
)
def test_samples_and_decoding_of_the_papers(names, samples, decoding):
    assert [(BENCHMARKS[name].samples, BENCHMARKS[name].decoding) for name in names] == [(samples, decoding)] * len(
        names
    )


BOX = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Which?\n\nA. x\nB. y\n\nPlease reason step by step, and put the letter of the right option within \\boxed{}."


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        ("math500", {"problem": "1+1?", "answer": 2.0}, [BOX, "1+1?"], "2"),
        ("gsm8k", {"question": "1+1?", "answer": "1+1.\n#### 1,234"}, [BOX, "1+1?"], "1234"),
        ("minerva_math", {"question": "1+1?", "solution": "So \\boxed{2}."}, [BOX, "1+1?"], "2"),
        ("olympiadbench", {"question": "1+1?", "final_answer": ["2"]}, [BOX, "1+1?"], "2"),
        ("mmlu_pro", {"question": "Which?", "options": ["x", "y"], "answer": "B"}, [LETTER], "B"),
        (
            "supergpqa",
            {"question": "Which?", "options": ["x", "y"], "answer": "y", "answer_letter": "B"},
            [LETTER],
            "B",
        ),
        ("bbeh", {"question": "Why?", "answer": "so"}, [f"Why?\n\n{BOX}"], "so"),
        ("tooluse", {"system": None, "prompt": "Call.", "answer": "{}"}, ["Call."], "{}"),
        ("tooluse", {"system": "Tools", "prompt": "Call.", "answer": "{}"}, ["Tools", "Call."], "{}"),
    ],
)
def test_a_row_becomes_a_question(name, row, prompt, answer):
    messages = BENCHMARKS[name].prompt(row)
    assert [message["role"] for message in messages] == ["system", "user"][-len(prompt) :]
    assert [message["content"] for message in messages] == prompt
    assert BENCHMARKS[name].answer(row) == answer


@pytest.mark.parametrize("name", MATH)
def test_the_math_files_have_the_registered_rows(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / "math" / f"{name}.jsonl"))
    assert len(benchmark.rows) in (BENCHMARKS[name].rows, *BENCHMARKS[name].also)
    assert all(row["answer"] for row in benchmark.rows)
    assert benchmark.samples == 1 or benchmark.decoding.temperature > 0
    assert "\\boxed{}" in benchmark.rows[0]["prompt"][0]["content"]


@pytest.mark.parametrize("name", SRPO)
def test_the_srpo_files_have_the_registered_rows_and_score_their_gold(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / SRPO[name]))
    assert len(benchmark.rows) in (BENCHMARKS[name].rows, *BENCHMARKS[name].also)
    assert (benchmark.samples, benchmark.decoding.temperature, benchmark.decoding.top_p) == (16, 0.6, 0.95)
    if name != "tooluse":
        rows = benchmark.rows
        verdicts = [benchmark.score(f"<answer>{row['answer']}</answer>", row) for row in rows]
        assert verdicts == [Verdict.CORRECT] * len(rows)


# Rows whose own gold answer in a box is not graded as correct: none of these files' answers may be lost unseen.
@pytest.mark.parametrize("name", MATH)
def test_gold_answers_in_a_box_are_correct(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / "math" / f"{name}.jsonl"))
    records = [{"id": r["id"], "response": f"So it is \\boxed{{{r['answer']}}}."} for r in benchmark.rows]
    scored = score_records(benchmark, records, {row["id"]: row for row in benchmark.rows})
    assert {r["id"]: r["verdict"] for r in scored if r["verdict"] != Verdict.CORRECT} == {}


def model_folder(path: Path) -> str:
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def questions(path: Path, count: int = 30) -> str:
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": i}) + "\n" for i in range(count)))
    return str(path)


def arguments(tmp_path: Path, out: str, *more: str) -> list[str]:
    data = questions(tmp_path / "aime24.jsonl")
    shared = [
        "--model",
        str(tmp_path / "model"),
        "--benchmark",
        "aime24",
        "--data",
        data,
        "--out",
        str(tmp_path / out),
    ]
    return [*shared, "--samples", "3", "--max_new_tokens", "8", "--batch_size", "10", *more]


def test_several_samples_of_a_greedy_benchmark_are_drawn(tmp_path, capsys, monkeypatch):
    """Without --temperature, and without --out: the command as one first types it."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    rows = "".join(json.dumps({"problem": f"{i}?", "answer": str(i)}) + "\n" for i in range(272))
    (tmp_path / "minerva.jsonl").write_text(rows)
    words = ["--model", "model", "--benchmark", "minerva_math", "--data", "minerva.jsonl", "--limit", "4"]
    assert command.main([*words, "--samples", "2", "--max_new_tokens", "4"]) == 0
    assert "2 samples are drawn with {'temperature': 0.6, 'top_p': 0.95}" in capsys.readouterr().err
    identity = json.loads((tmp_path / "runs/evaluation/model/minerva_math/identity.json").read_text())
    assert (identity["decoding"]["temperature"], identity["samples"]) == (0.6, 2)
    assert len(read_jsonl(tmp_path / "runs/evaluation/model/minerva_math/samples.jsonl")) == 4 * 2
    for more in (["--samples", "1"], ["--samples", "2", "--temperature", "0.3"]):
        assert command.main([*words, *more, "--max_new_tokens", "4", "--out", more[-1]]) == 0
        assert "are drawn with" not in capsys.readouterr().err
    greedy, chosen = (json.loads(Path(f"{out}/minerva_math/identity.json").read_text()) for out in ("1", "0.3"))
    assert (greedy["decoding"]["temperature"], chosen["decoding"]["temperature"]) == (0.0, 0.3)


def test_the_command_prints_value_interval_and_rates(tmp_path, capsys):
    model_folder(tmp_path / "model")
    assert command.main(arguments(tmp_path, "out")) == 0
    printed = capsys.readouterr().out.splitlines()[-1]  # an accelerator's library may have a line of its own
    assert printed.startswith("avg@3 = 0.")
    assert "maj@3 = 0." in printed
    assert "over 30 questions" in printed
    assert "truncated" in printed
    assert "no_answer" in printed
    assert command.main(arguments(tmp_path, "out", "--rescore")) == 0
    assert capsys.readouterr().out.splitlines() == [printed]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "math5000"], "unknown benchmark"),
        (["--model", "/nowhere"], "no such folder"),
        (["--data", "/nowhere.jsonl"], "cannot read /nowhere.jsonl"),
        (["--temperature", "0"], "3 samples at temperature 0"),
        (["--temperature", "nan"], "temperature must be at least 0 and finite"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--tokenizer", "x"], "tokenizer 'x' is for a --server"),
        (["--server", "http://127.0.0.1:9/v1", "--tokenizer", "/nowhere"], "there is no such folder"),
        (["--chat_template_kwargs", '{"tokenize": false}'], "chat_template_kwargs must leave out tokenize"),
        (["--benchmark", "math500"], "30 rows where 500 are expected"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, more, message):
    model_folder(tmp_path / "model")
    assert command.main(arguments(tmp_path, "out", *more)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_killed_evaluation_ends_with_the_same_records(tmp_path):
    model_folder(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "common.evaluation"]
    assert command.main(arguments(tmp_path, "straight")) == 0
    process = subprocess.Popen([*run, *arguments(tmp_path, "killed")], env=environment, stderr=subprocess.DEVNULL)
    records = tmp_path / "killed/aime24/samples.jsonl"
    while process.poll() is None and not records.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command.main(arguments(tmp_path, "killed")) == 0
    assert records.read_bytes() == (tmp_path / "straight/aime24/samples.jsonl").read_bytes()


# --- a server ----------------------------------------------------------------


@pytest.fixture
def chat_server():
    """Answers chat requests with the last message and what was asked for; "fail" gives an error."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = asked["messages"][-1]["content"]
            status = {"fail": 500, "too long": 400}.get(str(content), 200)
            choice = {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": f"<{content}>"},
            }
            usage = {"completion_tokens": asked["seed"], "prompt_tokens": 1, "total_tokens": 1}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            body = json.dumps({**reply, "usage": usage}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body if status == 200 else b"{}")
            server.asked.append(asked)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def server_engine(server, **options) -> ServerEngine:
    pytest.importorskip("openai")
    return ServerEngine(f"http://127.0.0.1:{server.server_port}/v1", "m", workers=4, retries=0, **options)


def asked(*contents: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": content}]) for content in contents]


def test_a_server_is_asked_once_a_prompt_with_its_seed(chat_server):
    engine = server_engine(chat_server, chat_template_kwargs={"enable_thinking": False})
    done = engine.generate(asked("a", "b", "c"), Decoding(0.7, 0.9, 11, 40), [5, 6, 7])
    assert done == [Completion("<a>", 5, "length"), Completion("<b>", 6, "length"), Completion("<c>", 7, "length")]
    request = chat_server.asked[0]
    assert "stop_token_ids" not in request  # other servers than vLLM's do not know it
    assert (request["temperature"], request["top_p"], request["max_tokens"], request["top_k"]) == (0.7, 0.9, 11, 40)
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert (request["repetition_penalty"], request["min_p"]) == (1.0, 0.0)
    assert (request["presence_penalty"], request["frequency_penalty"]) == (0.0, 0.0)
    server_engine(chat_server, stop_token_ids=[2]).generate(asked("d"), Decoding(), [1])
    assert chat_server.asked[-1]["stop_token_ids"] == [2]
    assert chat_server.asked[-1]["top_k"] == -1  # off: 0 is refused by older servers


def test_the_command_gives_its_options_to_the_engine(tmp_path, monkeypatch, capsys):
    asked = []

    def load_engine(*given, **options):
        asked.append((given, options))
        raise ValueError("no GPU")

    monkeypatch.setattr("common.evaluation.load_engine", load_engine)
    words = ["--engine", "vllm", "--seed", "7", "--chat_template_kwargs", '{"a": 1}', "--batch_size", "3"]
    words += ["--engine_options", '{"max_model_len": 99}']
    assert command.main(arguments(tmp_path, "out", *words)) == 2
    assert "no GPU" in capsys.readouterr().err
    ((given, options),) = asked
    assert given == ("vllm", str(tmp_path / "model"), 3)
    assert (options["chat_template_kwargs"], options["options"]) == ({"a": 1}, {"seed": 7, "max_model_len": 99})


def test_a_server_hears_of_the_end_of_a_turn(chat_server, tmp_path, capsys):
    pytest.importorskip("openai")
    model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    server = ["--server", f"http://127.0.0.1:{chat_server.server_port}/v1"]
    named = [*server, "--tokenizer", str(tmp_path / "model"), "--limit", "5"]
    named += ["--chat_template_kwargs", '{"enable_thinking": false}']
    assert command.main(arguments(tmp_path, "out", *named)) == 0
    assert all(asked["stop_token_ids"] == [turn_end_id(tokenizer)] for asked in chat_server.asked)
    assert {(asked["max_tokens"], *asked["chat_template_kwargs"].items()) for asked in chat_server.asked} == {
        (8, ("enable_thinking", False))
    }
    seeds = {asked["seed"] for asked in chat_server.asked}
    assert command.main(arguments(tmp_path, "seed 1", *named, "--seed", "1")) == 0
    assert len(seeds) == 15 and seeds.isdisjoint(asked["seed"] for asked in chat_server.asked[15:])
    model_folder(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert command.main(arguments(tmp_path, "other", *server, "--tokenizer", str(tmp_path / "plain"))) == 2
    assert "no chat template that closes a turn" in capsys.readouterr().err


def test_a_prompt_that_a_server_refuses(chat_server, tmp_path):
    engine = server_engine(chat_server)
    done = engine.generate(asked("a", "too long", "c"), Decoding(), [1, 2, 3])
    assert [c.finish_reason for c in done] == ["length", "refused", "length"]
    assert {c.finish_reason for c in engine.generate(asked("too long", "too long"), Decoding(), [1, 2])} == {"refused"}
    other = Prompt([{"role": "system", "content": "x"}, *asked("too long")[0].messages])
    with pytest.raises(ConnectionError, match="no request of 2"):  # not the prompt alone can be the reason
        engine.generate([*asked("too long"), other], Decoding(), [1, 2])
    rows = [{"id": str(i), "prompt": p.messages, "answer": "1"} for i, p in enumerate(asked("a", "too long", "c"))]
    with pytest.raises(ValueError, match="m refuses 1 of 3 prompts: serve it with a longer context"):
        evaluate(engine, Benchmark("refused", rows), tmp_path)
    generate_samples(engine, rows, tmp_path / "kept.jsonl", 1, Decoding(), keep_refused=True)
    assert [r["response"] for r in read_jsonl(tmp_path / "kept.jsonl")] == ["<a>", "", "<c>"]


def test_a_lost_request_is_none_and_a_lost_server_an_error(chat_server, tmp_path):
    engine = server_engine(chat_server)
    done = engine.generate(asked("a", "fail", "c"), Decoding(), [1, 2, 3])
    assert [c and c.text for c in done] == ["<a>", None, "<c>"]
    with pytest.raises(ConnectionError, match="no request of 2 to m at http"):
        engine.generate(asked("fail", "fail"), Decoding(), [1, 2])
    rows = [{"id": str(i), "prompt": p.messages, "answer": "1"} for i, p in enumerate(asked("a", "fail"))]
    with pytest.raises(ConnectionError, match="1 of 2 requests to m failed"):
        evaluate(engine, Benchmark("lost", rows), tmp_path)
    assert [r["id"] for r in read_jsonl(tmp_path / "lost/samples.jsonl")] == ["0"]  # in order, up to the lost one


def test_a_server_gets_images_as_data(chat_server):
    from PIL import Image

    prompt = Prompt([{"role": "user", "content": "What?"}], [Image.new("RGB", (4, 4))])
    server_engine(chat_server).generate([prompt], Decoding(), [1])
    image, text = chat_server.asked[0]["messages"][-1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "What?"}


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_question_without_an_answer_is_refused(tmp_path, missing):
    """As text it would be "None" or "nan", which a response can give."""
    answers = [*map(float, range(29)), missing]
    Dataset.from_dict({"problem": ["1+1?"] * 30, "answer": answers}).to_parquet(tmp_path / "aime25.parquet")
    with pytest.raises(ValueError, match="aime25: row 29 has no answer: take a copy that has all of them"):
        load_benchmark("aime25", tmp_path)


@pytest.mark.parametrize(("rows", "known"), [(674, True), (675, True), (673, False)])
def test_both_copies_of_olympiadbench_are_whole(tmp_path, rows, known):
    lines = [{"question": f"{i}?", "final_answer": [str(i)]} for i in range(rows)]
    (tmp_path / "olympiadbench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if known:
        assert len(load_benchmark("olympiadbench", tmp_path).rows) == rows
    else:
        with pytest.raises(ValueError, match="673 rows where 674 are expected"):
            load_benchmark("olympiadbench", tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "row"),
    [
        ("gsm8k", 1319, {"question": "1+1?", "answer": 2}),
        ("olympiadbench", 674, {"question": "1+1?", "final_answer": []}),
    ],
)
def test_a_column_of_another_kind_is_one_sentence(tmp_path, name, rows, row):
    (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * rows)
    with pytest.raises(ValueError, match=f"{name}: row 0 is not as in .*: take a copy") as error:
        load_benchmark(name, tmp_path)
    assert "\n" not in str(error.value)
