"""A migration worker goes on whatever answers in its hub's place: what is cut off, what is no HTTP, what is no hub."""

import argparse
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_migration.errors import TransferLost
from gpu_migration.worker import Worker

JSON = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"


class Answering:
    """A server that gives each connection the same bytes and closes it."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.answer = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(self.answer)

    def close(self) -> None:
        """No more."""
        self._socket.close()


@pytest.fixture
def answering() -> Iterator[Answering]:
    made = Answering()
    yield made
    made.close()


def whole(body: object) -> str:
    text = json.dumps(body)
    return JSON.format(len(text), text)


@pytest.mark.parametrize("answer", [
    "", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "220 mail.example ESMTP\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", whole([]), whole({"stop": []}), whole({"stop": [], "tasks": [{"task": "t"}]}),
    JSON.format(17, "<html>log in here"), "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
])
def test_what_is_no_answer_is_asked_for_again(answering: Answering, tmp_path: Path, answer: str) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("secret")
    answering.answer = answer.encode()
    worker = Worker(argparse.Namespace(hub=f"http://127.0.0.1:{answering.port}", name="w", token_file=token, ca_file=None, folder=tmp_path, bases=None, listen="127.0.0.1", advertise="", ports=(0, 0), slots=1))
    with pytest.raises(TransferLost):
        worker._once()
    answering.answer = whole({"stop": [], "tasks": []}).encode()
    worker._once()
