"""A small TCP proxy before a broker, that drops, delays or resets chosen requests: the network on a bad day.

Requests of Kafka start with a length (4 bytes), a key (2 bytes) that says what is asked, and a version (2 bytes). A
rule is asked for every request of a key and answers what to do with it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

PRODUCE, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT = 0, 25, 26, 28
Rule = Callable[[int], str]  # the key of a request -> pass, drop, delay, reset before or after it was forwarded


class Proxy:
    """Listens on a port of its own; close it."""

    def __init__(self, port: int, target: int) -> None:
        self.rule: Rule = lambda key: "pass"
        self.bit: Counter[str] = Counter()
        self.delay_s = 2.0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                broker = socket.create_connection(("127.0.0.1", self._target), timeout=10)
                broker.settimeout(None)
                threading.Thread(target=self._requests, args=(client, broker), daemon=True).start()
                threading.Thread(target=_copy, args=(broker, client), daemon=True).start()

    def _requests(self, client: socket.socket, broker: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client, broker:
            while True:
                head = _exactly(client, 8)
                length, key, _ = struct.unpack(">ihh", head)
                body = head + _exactly(client, length - 4)
                what = self.rule(key)
                if what != "pass":
                    self.bit[what] += 1
                if what == "reset":
                    return
                if what == "delay":
                    time.sleep(self.delay_s)
                if what != "drop":
                    broker.sendall(body)
                if what == "reset after":
                    time.sleep(0.02)  # the broker gets it, the client never hears the answer
                    return

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _exactly(source: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = source.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source, target:
        while data := source.recv(1 << 16):
            target.sendall(data)
