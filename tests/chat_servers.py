"""For tests of what asks a server: a small one that answers chat requests in OpenAI's form."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Reply = tuple[int, str, str, int] | bytes  # status, text, finish reason, number of tokens; or a body as it is


class ChatServer(http.server.ThreadingHTTPServer):
    """On a free port; `answer` makes the reply to a request, and `asked` keeps the requests."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.url = answer, [], f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.answer(request)
        self.server.asked.append(request)
        status, body = (200, answer) if isinstance(answer, bytes) else self.reply(*answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def reply(self, status: int, text: str, reason: str, tokens: int) -> tuple[int, bytes]:
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        usage = {"completion_tokens": tokens, "prompt_tokens": 1, "total_tokens": 1 + tokens}
        return status, json.dumps({**reply, "usage": usage}).encode() if status == 200 else b"{}"

    def log_message(self, *arguments):
        pass


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    with ChatServer(answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
