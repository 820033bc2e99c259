"""Addresses of loopback that say nothing to whoever connects, as those of a network that leads nowhere, and names that have them."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest


@contextlib.contextmanager
def silent(address: str, port: int) -> Iterator[None]:
    """Nobody takes what waits at a listener there, and what waits is as much as may: the kernel drops who comes then without a word (tcp_abort_on_overflow is 0)."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.2)
            try:
                waiting.connect((address, port))
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel drops nobody where a listener takes nobody")
        yield


class Name:
    """A name that a name server knows, with these addresses in this order; all others are asked for as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, addresses: Sequence[str]) -> None:
        self._ask, self.name, self.addresses = socket.getaddrinfo, name, addresses
        if isinstance(self._ask, Name):
            self._ask = self._ask._ask
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
        if host != self.name:
            return self._ask(host, port, *arguments, **named)
        return [one for address in self.addresses for one in self._ask(address, port, type=socket.SOCK_STREAM)]
