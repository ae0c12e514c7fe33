"""The harness: records that survive a kill and are of one evaluation, metrics that follow from records."""

import contextlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.evaluation import (
    Benchmark,
    Completion,
    Decoding,
    evaluate,
    paired_scores,
    score_responses,
    scores_by_question,
    summarize,
)
from common.evaluation.run import generate_samples, rescore
from common.evaluation.scoring import majority
from common.runs import exclusive, read_jsonl, weights_of

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
    """A resumed evaluation draws what the straight one would have drawn."""
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


def test_records_of_other_questions_are_refused_in_words_and_not_by_digests(tmp_path):
    evaluate(Echo(), numbers(3), tmp_path)
    with pytest.raises(ValueError, match="records of other questions: --data or --limit was another one"):
        evaluate(Echo(), numbers(4), tmp_path)


def test_another_chat_template_is_another_evaluation(tmp_path):
    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    engine = Echo()
    engine.template_options = {"enable_thinking": False}
    with pytest.raises(ValueError, match=r"holds records with chat_template_kwargs=\{\}, this evaluation has"):
        evaluate(engine, numbers(), tmp_path, decoding=SAMPLED)


def test_an_evaluation_does_not_go_on_with_other_ends_of_a_response(tmp_path):
    first, second = Echo(fail_after=10), Echo()
    first.stops = [5]  # of a server with --tokenizer, which the second one was not given
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, numbers(), tmp_path, samples=4, decoding=SAMPLED, batch=10)
    with pytest.raises(ValueError, match=r"holds records with stop_token_ids=\[5\], this evaluation has \[\]"):
        evaluate(second, numbers(), tmp_path, samples=4, decoding=SAMPLED, batch=10)
    assert second.asked == []


def test_an_evaluation_does_not_go_on_with_another_engine(tmp_path):
    class Other(Echo):
        pass

    evaluate(Echo(), numbers(), tmp_path, decoding=SAMPLED)
    with pytest.raises(ValueError, match="holds records with engine='Echo', this evaluation has 'Other'"):
        evaluate(Other(), numbers(), tmp_path, decoding=SAMPLED)
    Other.kind = None  # of recorded answers
    evaluate(Other(), numbers(), tmp_path, decoding=SAMPLED)


def test_an_evaluation_does_not_go_on_with_options_of_the_engine_that_change_answers(tmp_path):
    first, second = Echo(), Echo()
    first.options = {"max_model_len": 512}
    evaluate(first, numbers(), tmp_path, decoding=SAMPLED)
    with pytest.raises(ValueError, match=r"holds records with engine_options=\{'max_model_len': 512\}, this .* \{\}"):
        evaluate(second, numbers(), tmp_path, decoding=SAMPLED)
    assert second.asked == []


@pytest.mark.parametrize(
    "name",
    ["config.json", "adapter_config.json", "chat_template.jinja", "tokenizer.json", "preprocessor_config.json"],
)
def test_an_evaluation_does_not_go_on_with_another_file_of_the_model_that_changes_answers(tmp_path, name):
    engine, model = Echo(), tmp_path / "model"
    model.mkdir()
    engine.name = str(model)
    (model / name).write_text("{}")
    evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)
    (model / "trainer_state.json").write_text("of a training")
    evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)
    (model / name).write_text("{ }")
    with pytest.raises(ValueError, match="of other config, tokenizer, template or image processor, which '.*model'"):
        evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "L"])
def test_every_engine_is_shown_the_same_pixels(tmp_path, mode):
    """Black on transparent black: with alpha dropped all of it is black; vLLM would put white behind it."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    shown = []

    class Looking(Echo):
        def generate(self, prompts, decoding, seeds):
            shown.extend(prompt.images[0] for prompt in prompts)
            return super().generate(prompts, decoding, seeds)

    rows = [{**row, "images": [image]} for row in numbers(1).rows]
    evaluate(Looking(), Benchmark("pictures", rows), tmp_path, decoding=SAMPLED)
    assert [(picture.mode, picture.getextrema()) for picture in shown] == [("RGB", ((0, 0),) * 3)]


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    """Converted to RGB, all of it but the darkest 255 of 65,536 values would be white."""
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "deep.png")
    rows = [{**row, "images": [{"path": str(tmp_path / "deep.png"), "bytes": None}]} for row in numbers(1).rows]
    with pytest.raises(ValueError, match="question 0 has an image of mode I;16 and values up to 65280.* 8 bits"):
        evaluate(Echo(), Benchmark("pictures", rows), tmp_path, decoding=SAMPLED)
    rows = [{**row, "images": [Image.new("I;16B", (4, 4), 300)]} for row in numbers(1).rows]  # a TIFF may be so
    with pytest.raises(ValueError, match="image of mode I;16B and values up to 300"):
        evaluate(Echo(), Benchmark("pictures", rows), tmp_path, decoding=SAMPLED)
    rows = [{**row, "images": [Image.new("F", (4, 4), 0.5)]} for row in numbers(1).rows]
    with pytest.raises(ValueError, match="mode F and values up to 0.5, of which all below 1 would turn black"):
        evaluate(Echo(), Benchmark("pictures", rows), tmp_path, decoding=SAMPLED)


def test_an_evaluation_does_not_go_on_with_other_weights_at_the_same_path(tmp_path):
    model, rng = tmp_path / "model", np.random.default_rng(0)
    model.mkdir()

    def engine():
        found = Echo()
        found.name = str(model)
        return found

    file = model / "model.safetensors"
    weights = rng.bytes(9_000_000)  # more than is read
    file.write_bytes(weights)
    evaluate(engine(), numbers(), tmp_path / "out", decoding=SAMPLED)
    (model / "self_teacher").mkdir()
    for name in ("optimizer.pt", "self_teacher/average.safetensors"):
        (model / name).write_text("is deleted when a run goes on")
    file.unlink()
    file.write_bytes(weights)  # a copy of them is the same model
    again = engine()
    evaluate(again, numbers(), tmp_path / "out", decoding=SAMPLED)
    assert again.asked == []
    for other in (weights[:5_000_000] + rng.bytes(4_000_000), weights + b"x"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=r"holds records of other weights, which '.*model' held then: choose"):
            evaluate(engine(), numbers(), tmp_path / "out", decoding=SAMPLED)
    identity = tmp_path / "out/numbers/identity.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "weights": None}))  # not known then
    evaluate(engine(), numbers(), tmp_path / "out", decoding=SAMPLED)


def test_an_evaluation_does_not_go_on_with_other_weights_below_an_adapter(tmp_path):
    adapter, base, engine = tmp_path / "adapter", tmp_path / "base", Echo()
    for folder, file in ((adapter, "adapter_model.safetensors"), (base, "model.safetensors")):
        folder.mkdir()
        (folder / file).write_bytes(b"first")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    engine.name = str(adapter)
    evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)
    evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)
    (base / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="records of other weights of the adapter's base, which '.*adapter' held"):
        evaluate(engine, numbers(), tmp_path / "out", decoding=SAMPLED)
    (adapter / "adapter_model.safetensors").unlink()  # as of an evaluated checkpoint: it has no weights at all
    assert weights_of(weights=str(adapter)) == {}


@pytest.mark.parametrize("as_file", [True, False])
def test_an_evaluation_does_not_go_on_with_other_images(tmp_path, as_file):
    def pictures(value: int) -> Benchmark:
        image, path = Image.new("RGB", (4, 4), (value,) * 3), tmp_path / "picture.png"
        image.save(path)
        shown = {"path": str(path), "bytes": None} if as_file else image
        return Benchmark("pictures", [{**row, "images": [shown]} for row in numbers(2).rows])

    for value in (9, 9):
        evaluate(Echo(), pictures(value), tmp_path, decoding=SAMPLED)
    with pytest.raises(ValueError, match="holds records of other questions"):
        evaluate(Echo(), pictures(8), tmp_path, decoding=SAMPLED)


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
    (tmp_path / "out/numbers/samples.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no records of numbers"):
        rescore(numbers(), tmp_path / "out")


def test_scores_are_those_of_the_same_questions_whatever_the_order_of_the_records(tmp_path):
    records = [{"id": i, "response": rf"\boxed{{{min(i, 2)}}}"} for i in range(10)]
    for name, order in (("forwards", records), ("backwards", records[::-1])):
        score_responses(numbers(), responses(tmp_path / f"{name}.jsonl", order), tmp_path / name)
        assert scores_by_question(tmp_path / name, "numbers") == [[1.0]] * 3 + [[0.0]] * 7


def test_pairs_are_of_the_same_questions(tmp_path):
    rows = [{**row, "prompt": [{"role": "user", "content": "?"}]} for row in numbers().rows]
    kinds = {"a": numbers(), "b": numbers(), "part": numbers(9), "reworded": Benchmark(name="numbers", rows=rows)}
    for name, benchmark in kinds.items():
        evaluate(Echo(), benchmark, tmp_path / name, decoding=SAMPLED)
    scores = scores_by_question(tmp_path / "a", "numbers")
    assert paired_scores(tmp_path / "a", tmp_path / "b", "numbers") == (scores, scores)
    for name in ("part", "reworded"):
        with pytest.raises(ValueError, match=f"a and .*{name} hold evaluations of numbers on other questions"):
            paired_scores(tmp_path / "a", tmp_path / name, "numbers")


def test_responses_without_a_sample_are_numbered_in_their_order(tmp_path):
    unknown = ({}, {"sample": None}, {"sample": float("nan")})
    records = [{"id": i, "response": rf"\boxed{{{k}}}", **unknown[k]} for i in range(10) for k in range(3)]
    score_responses(numbers(), responses(tmp_path / "theirs.jsonl", records), tmp_path / "out")
    scored = read_jsonl(tmp_path / "out/numbers/scored.jsonl")
    assert [(record["id"], record["sample"]) for record in scored] == [
        (str(i), k) for i in range(10) for k in range(3)
    ]


def test_blank_lines_and_a_last_line_without_an_end_are_read(tmp_path):
    lines = [json.dumps({"id": i, "response": rf"\boxed{{{i}}}", "num_tokens": float("nan")}) for i in range(10)]
    (tmp_path / "theirs.jsonl").write_text("\n\n".join(lines))
    report = score_responses(numbers(), tmp_path / "theirs.jsonl", tmp_path / "out")
    assert (report["avg@k"], report["mean_tokens"]) == (1.0, None)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 0}], "line 1: a record needs `id` and `response`"),
        ([{"id": 0, "response": "5", "num_tokens": "x"}], "line 1: num_tokens must be a number, got 'x'"),
        ([{"id": 0, "response": "5", "sample": 0}] * 2, "line 2: sample 0 of question 0 stands there twice"),
        ([{"id": 0, "response": "5"}, {"id": 0, "response": "5", "sample": 0}], "line 2: sample 0 of question 0"),
        ([{"id": 0, "response": "5", "sample": [0]}], r"line 1: sample must be a number, got \[0\]"),
        ([{"id": 0, "response": "5", "finish_reason": "eos"}], 'finish_reason must be "stop" or "length", got'),
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


def test_an_incomplete_table_is_no_result():
    record = {"sample": 0, "score": 1.0}
    with pytest.raises(ValueError, match="different numbers of samples"):
        summarize([{**record, "id": "a"}, {**record, "id": "b"}, {**record, "id": "b", "sample": 1}])


def test_an_evaluation_that_another_process_is_at_is_refused(tmp_path):
    engine = Echo()
    with exclusive(tmp_path / "numbers"), pytest.raises(ValueError, match="in use by another process"):
        evaluate(engine, numbers(), tmp_path, decoding=SAMPLED)
    assert engine.asked == []
    assert not (tmp_path / "numbers" / "samples.jsonl").exists()
