"""Fixtures of the tests of `common`."""

import itertools
from collections.abc import Iterator

import chat_servers
import pytest

from common.answers import same_answer

_fresh = itertools.count(1000)


@pytest.fixture(scope="module")
def ready_worker() -> None:
    """One worker process of `common.answers` has started, before tests that measure time."""
    i = next(_fresh)  # else a memo may answer
    assert same_answer(rf"\frac{{x^2}}{{2}}+{i}", rf"\int_{{0}}^{{x}} t dt+{i}", timeout=60)


@pytest.fixture
def chat_server() -> Iterator[chat_servers.ChatServer]:
    """Answers with the last message, and with the seed as its number of tokens; two messages give an error."""

    def answer(request: dict) -> chat_servers.Reply:
        content = request["messages"][-1]["content"]
        status = {"fail": 500, "too long": 400}.get(str(content), 200)
        return status, f"<{content}>", "length", request["seed"]

    with chat_servers.chat_server(answer) as server:
        yield server
