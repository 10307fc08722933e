"""JSON over HTTP to one server, on a port or on a socket in the file system."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

UNIX = "unix:"
"""Before the path of a socket in the file system."""


class ServerFailure(Exception):
    """A server that did not answer, or answered that it could not: dead, hung or overloaded."""


class ServerRefused(RuntimeError):
    """A server that understood a request and will not do it; another attempt would not help."""


class HttpClient:
    """Requests to one server, from any number of threads; each has a connection of its own.

    `address` is `http://host:port`, or `unix:` and a path.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._open: dict[object, HTTPConnection] = {}
        self._lock = threading.Lock()

    def post(self, path: str, body: object, *, timeout: float, key: object = None) -> Any:
        """The answer to a JSON body. `key` names the request for `abort`.

        Raises ServerFailure where there is no answer within `timeout` seconds of silence, or one
        that blames the server; ServerRefused where it blames the request.
        """
        data = json.dumps(body).encode()
        return json.loads(self._request("POST", path, data, timeout, key) or b"null")

    def get(self, path: str, *, timeout: float) -> str:
        """The text at a path; raises as `post` does."""
        return self._request("GET", path, None, timeout, None).decode()

    def abort(self, key: object = None) -> None:
        """Break the connection of the request of this key, or those of all: they fail at once."""
        with self._lock:
            keys = list(self._open) if key is None else [key]
            found = [self._open[one] for one in keys if one in self._open]
        for connection in found:
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):  # closed meanwhile
                    sock.shutdown(socket.SHUT_RDWR)

    def _request(
        self, method: str, path: str, data: bytes | None, timeout: float, key: object
    ) -> bytes:
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            with self._connection(timeout, object() if key is None else key) as connection:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                body = response.read()
        except (OSError, HTTPException) as error:
            raise ServerFailure(f"{path}: {type(error).__name__}: {error}") from error
        if response.status >= 500:
            raise ServerFailure(f"{path}: {response.status} {_message(body)}")
        if response.status >= 400:
            raise ServerRefused(f"{self.address}{path}: {response.status} {_message(body)}")
        return body

    @contextlib.contextmanager
    def _connection(self, timeout: float, key: object) -> Iterator[HTTPConnection]:
        connection = _connect(self.address, timeout)
        with self._lock:
            self._open[key] = connection
        try:
            yield connection
        finally:
            with self._lock:
                del self._open[key]
            connection.close()


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        self.sock = sock
        sock.connect(self._path)


def _connect(address: str, timeout: float) -> HTTPConnection:
    if address.startswith(UNIX):
        return _UnixConnection(address.removeprefix(UNIX), timeout)
    parts = urlsplit(address)
    assert parts.scheme == "http" and parts.hostname is not None, address
    return HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def _message(body: bytes) -> str:
    """What an answer says went wrong: vLLM's own message, or its beginning."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])[:500]
    return text[:500]
