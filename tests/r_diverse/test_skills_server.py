"""A real HTTP server as coder: its programs, refused and failed requests."""

import http.server
import itertools
import json
import threading

import pytest
from r_diverse_coders import ADD, HOSTILE, HashEncoder, Recorder, entries

from r_diverse import engines
from r_diverse.engines import Generation
from r_diverse.skills import ModelCoder, Program, SkillEncoder


class Handler(http.server.BaseHTTPRequestHandler):
    """Completions of OpenAI's form, from `server.engine`; `server.trouble` answers some requests otherwise."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        status, reply = self.server.trouble(body) or (200, None)
        if reply is None:
            with self.server.lock:
                (answer,) = self.server.engine.generate([body["prompt"]], body["max_tokens"], body["stop"][0])
            choice = {"index": 0, "text": answer.text, "finish_reason": "stop" if answer.finished else "length"}
            reply = {"id": "x", "object": "text_completion", "created": 0, "model": "taught", "choices": [choice]}
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(taught, monkeypatch):
    pytest.importorskip("openai", reason="needs the extra skills (openai)")
    monkeypatch.setenv("OPENAI_API_KEY", "secret of another service")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.engine, server.seen, server.lock, server.trouble = taught, [], threading.Lock(), lambda body: None
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_writes_the_same_programs(server, taught, tokenizer):
    coder = ModelCoder(engines.ServedCoderEngine(server.url, "taught"), tokenizer, max_new_tokens=18)
    local = ModelCoder(taught, tokenizer, max_new_tokens=18)
    questions = ["What is 3 + 4?", "5 + 6?", HOSTILE["end of turn"]]
    assert coder.write(questions) == local.write(questions)
    assert coder.name == local.name  # so they share a cache
    assert [body["max_tokens"] for _, _, body in server.seen] == [18] * 3 + [36] * 3
    path, key, body = server.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/completions", "Bearer EMPTY", "taught", 0.0)
    penalties = [body[f"{name}_penalty"] for name in ("repetition", "presence", "frequency")]
    assert penalties == [1.0, 0.0, 0.0]  # what is left out is the model's own value
    assert "secret" not in str(server.seen)
    assert ModelCoder(coder.engine, tokenizer, max_new_tokens=3).write(["5 + 6?"]) == [Program(None, "truncated")]


def test_requests_go_out_together_up_to_workers(server, tokenizer):
    """Each of the four is answered when all of them have come."""
    together = threading.Barrier(4)
    server.trouble = lambda body: together.wait(timeout=60) and None
    engine = engines.ServedCoderEngine(server.url, "taught", workers=4, retries=0)
    assert len(engine.generate([[1], [2], [3], [4]], 1, "x")) == 4
    assert not together.broken


def test_a_request_has_a_limit_of_time(server, tokenizer):
    over = threading.Event()
    server.trouble = lambda body: over.wait(60) and None
    engine = engines.ServedCoderEngine(server.url, "taught", timeout=0.2, retries=0)
    try:
        with pytest.raises(ConnectionError, match="no request of 1 was answered by taught"):
            engine.generate([[1]], 1, "x")
    finally:
        over.set()


def test_one_failed_request_costs_one_question_and_is_not_cached(server, tokenizer, tmp_path, caplog):
    bad = set(tokenizer(" cats", add_special_tokens=False)["input_ids"])
    server.trouble = lambda body: (500, {"error": "down"}) if bad <= set(body["prompt"]) else None
    questions = ["What is 3 + 4?", "How many cats are 5 + 6 cats?"]
    coder = ModelCoder(engines.ServedCoderEngine(server.url, "taught", retries=0), tokenizer, max_new_tokens=40)
    skill = SkillEncoder(coder, HashEncoder(), cache=tmp_path)
    assert skill.programs(questions) == [Program(ADD), Program(None, "engine")]
    assert "1 of 2 requests" in caplog.text
    assert len(server.seen) == 2  # `retries` is 0
    server.trouble = lambda body: None
    server.seen.clear()
    assert [p.ok for p in skill.programs(questions)] == [True, True]
    assert len(server.seen) == 1


def test_a_busy_server_is_asked_again(server, tokenizer):
    turns = itertools.count()
    server.trouble = lambda body: (503, {"error": "busy"}) if next(turns) == 0 else None
    engine = engines.ServedCoderEngine(server.url, "taught", retries=1)
    assert ModelCoder(engine, tokenizer, max_new_tokens=40).write(["1 + 1"]) == [Program(ADD)]
    assert len(server.seen) == 2


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{}]}, [], "text", None, b"<html>"])
def test_a_reply_of_another_form_is_a_failed_request(server, tokenizer, reply):
    server.trouble = lambda body: (200, {"choices": None} if reply is None else reply)
    engine = engines.ServedCoderEngine(server.url, "taught", retries=0)
    assert ModelCoder(engine, tokenizer).write(["3 + 4"]) == [Program(None, "engine")]


def test_only_a_stop_ends_a_program_and_an_aborted_one_is_a_failed_request(server):
    def reply(body):
        reason = ("stop", "length", "repetition", "abort")[body["prompt"][0]]  # as vLLM names them
        return 200, {"choices": [{"index": 0, "text": "a", "finish_reason": reason}]}

    server.trouble = reply
    done = engines.ServedCoderEngine(server.url, "taught", retries=0).generate([[0], [1], [2], [3]], 1, "x")
    assert done == [Generation("a", True), Generation("a", False), Generation("a", False), None]


def test_requests_that_all_failed_for_several_reasons_may_be_bad_luck(server, tokenizer):
    """One of them did reach the model."""
    server.trouble = lambda body: ({1: 404, 2: 500, 3: 400}[body["prompt"][0]], {"error": "no"})
    engine = engines.ServedCoderEngine(server.url, "taught", retries=0)
    lost, refused = None, Generation("", False, refused=True)
    assert engine.generate([[1], [2], [3]], 1, "x") == [lost, lost, refused]
    assert engine.generate([], 1, "x") == []
    answer = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}
    server.trouble = lambda body: (404, {"error": "no"}) if body["prompt"] == [1] else (200, answer)
    assert engine.generate([[1], [2]], 1, "x") == [lost, Generation("a", True)]  # as of one that restarts


def test_a_server_that_is_not_there_is_an_error(server, tokenizer):
    coder = ModelCoder(engines.ServedCoderEngine("http://127.0.0.1:9/v1", "taught", retries=0), tokenizer)
    with pytest.raises(ConnectionError, match="no request of 2 was answered by taught at http://127.0.0.1:9/v1"):
        coder.write(["1 + 2", "3 + 4"])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_does_not_serve_the_model_to_this_key_is_an_error(server, tokenizer, status):
    server.trouble = lambda body: (status, {"error": "no"})
    coder = ModelCoder(engines.ServedCoderEngine(server.url, "taught", retries=0), tokenizer)
    with pytest.raises(ConnectionError, match="serves this model .* and accepts the key"):
        coder.write(["1 + 2"])


def test_a_question_that_a_server_refuses_has_a_failure_of_its_own(server, tokenizer, tmp_path):
    bad = set(tokenizer(" cats", add_special_tokens=False)["input_ids"])
    server.trouble = lambda body: (400, {"error": "too long"}) if bad <= set(body["prompt"]) else None
    engine = engines.ServedCoderEngine(server.url, "taught", retries=0)
    skill = SkillEncoder(ModelCoder(engine, tokenizer, max_new_tokens=40), HashEncoder(), cache=tmp_path)
    cats = [f"How many cats are 5 + {n} cats?" for n in (6, 7, 8)]
    refused = Program(None, "refused")
    assert skill.programs(["What is 3 + 4?", cats[0]]) == [Program(ADD), refused]
    assert len(server.seen) == 2  # a longer answer would be refused as well
    assert skill.programs(cats) == [refused] * 3  # all of this call, by a server that has answered another
    server.seen.clear()
    assert skill.programs(cats) == [refused] * 3 and not server.seen
    with pytest.raises(ConnectionError, match="with a context that is long enough"):  # it may have none for so many
        engine.generate([list(bad)] * 2, 4096, "")
    with pytest.raises(ConnectionError, match="with a context that is long enough"):
        ModelCoder(engines.ServedCoderEngine(server.url, "taught", retries=0), tokenizer).write(cats)
    alone = ModelCoder(engines.ServedCoderEngine(server.url, "taught", retries=0), tokenizer)
    assert alone.write(cats[:1]) == [refused]  # the prompt may be the reason


def test_a_server_that_ends_between_two_tries_costs_no_program_of_the_first(taught, tokenizer, tmp_path, caplog):
    class Ending(Recorder):
        def generate(self, prompts, max_new_tokens, stop):
            if self.calls:
                raise ConnectionError("no request was answered")
            answers = super().generate(prompts, max_new_tokens, stop)
            return [answers[0], Generation("no program", True)]

    coder = ModelCoder(Ending(taught), tokenizer, max_new_tokens=40)
    skill = SkillEncoder(coder, HashEncoder(), cache=tmp_path)
    assert skill.programs(["5 + 6?", "What is 3 + 4?"]) == [Program(ADD), Program(None, "engine")]
    assert "no request was answered" in caplog.text
    assert len(entries(tmp_path)) == 1


def test_a_server_has_one_name_for_requests_and_one_for_caches():
    pytest.importorskip("openai")
    engine = engines.ServedCoderEngine("http://127.0.0.1:9/v1", "coder", name="coder abc123")
    assert (engine.model, engine.name) == ("coder", "coder abc123")
    assert engines.ServedCoderEngine("http://127.0.0.1:9/v1", "coder").name == "coder"
