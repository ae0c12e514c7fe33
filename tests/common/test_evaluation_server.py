"""The engine that asks a server: its requests, refusals, lost requests, images."""

import json
import threading

import chat_servers
import pytest

from common.evaluation import Benchmark, Completion, Decoding, Prompt, ServerEngine, evaluate
from common.evaluation.run import generate_samples
from common.runs import read_jsonl


def server_engine(server, **options) -> ServerEngine:
    pytest.importorskip("openai")
    return ServerEngine(server.url, "m", workers=4, retries=0, **options)


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


def test_an_aborted_response_is_a_lost_request():
    def answer(request):
        return 200, "half", "abort" if request["messages"][-1]["content"] == "b" else "stop", 1

    with chat_servers.chat_server(answer) as server:
        done = server_engine(server).generate(asked("a", "b"), Decoding(), [1, 2])
    assert done == [Completion("half", 1, "stop"), None]


@pytest.mark.parametrize(("reason", "tokens", "times"), [("length", 7, 1), ("length", 8, 0), ("stop", 7, 0)])
def test_a_server_that_cuts_what_was_asked_for_is_told_once(capsys, reason, tokens, times):
    with chat_servers.chat_server(lambda _: (200, "half", reason, tokens)) as server:
        engine = server_engine(server)
        for _ in range(2):
            engine.generate(asked("a", "b"), Decoding(max_new_tokens=8), [1, 2])
    assert capsys.readouterr().err.count("m: 2 responses were cut short of 8 tokens by the server at http") == times


USAGE = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
OTHER_FORMS = [
    {}, [], "text", {"choices": []}, {"choices": None}, {"choices": [{}]},
    {"choices": [{"message": {"content": "a"}}]},
    {"choices": [{"message": {"content": ["a"]}}], "usage": USAGE},
]  # fmt: skip


@pytest.mark.parametrize("body", [*(json.dumps(form).encode() for form in OTHER_FORMS), b"<html>"])
def test_a_reply_of_another_form_is_a_lost_request(body):
    def answer(request):
        return body if request["messages"][-1]["content"] == "b" else (200, "a", "stop", 1)

    with chat_servers.chat_server(answer) as server:
        done = server_engine(server).generate(asked("a", "b"), Decoding(), [1, 2])
    assert done == [Completion("a", 1, "stop"), None]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_busy_server_is_asked_again_as_often_as_allowed(retries):
    with (
        chat_servers.chat_server(lambda request: (503, "", "stop", 1)) as server,
        pytest.raises(ConnectionError, match="no request of 1"),
    ):
        ServerEngine(server.url, "m", retries=retries).generate(asked("a"), Decoding(), [1])
    assert len(server.asked) == 1 + retries


def test_requests_go_out_together_and_have_a_limit_of_time():
    together, over = threading.Barrier(4), threading.Event()

    def answer(request):
        late = request["messages"][-1]["content"] == "late"
        over.wait(60) if late else together.wait(60)
        return 200, "a", "stop", 1

    with chat_servers.chat_server(answer) as server:
        engine = ServerEngine(server.url, "m", workers=4, retries=0)
        assert all(engine.generate(asked(*"abcd"), Decoding(), range(4)))
        with pytest.raises(ConnectionError, match="no request of 1"):
            ServerEngine(server.url, "m", timeout=0.2, retries=0).generate(asked("late"), Decoding(), [1])
        over.set()


def test_a_server_gets_images_as_data(chat_server):
    from PIL import Image

    prompt = Prompt([{"role": "user", "content": "What?"}], [Image.new("RGB", (4, 4))])
    server_engine(chat_server).generate([prompt], Decoding(), [1])
    image, text = chat_server.asked[0]["messages"][-1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "What?"}


@pytest.mark.parametrize("address", ["http://localhost:80OO/v1", "localhost:8000/v1", "http:/localhost:8000/v1"])
def test_a_mistyped_address_of_a_server_is_one_sentence(address):
    with pytest.raises(ValueError, match=f"server '{address}' is no address.*: write http://HOST:PORT/v1"):
        ServerEngine(address, "m")
