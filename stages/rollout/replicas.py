"""Servers that sample: one that this process starts, or one that somebody else has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from infra.launch import PARENT_PID
from stages.rollout.http_client import UNIX, HttpClient, ServerFailure, ServerRefused

_POLL_SECONDS = 0.1
_PROBE_SECONDS = 5.0
_CLOSE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
_LOG_LINES = 8
_COUNTERS = (
    "vllm:generation_tokens_total{",
    "vllm:prompt_tokens_total{",
    "vllm:iteration_tokens_total_count{",
)


class Replica(Protocol):
    """One server."""

    name: str
    client: HttpClient

    def start(self, timeout: float) -> None:
        """Start it, or wait until it is there. Raises ServerFailure."""
        ...

    def death(self) -> str | None:
        """How its process ended, or None while it may be alive."""
        ...

    def stop(self) -> None:
        """End what it is doing at once; its requests fail."""
        ...

    def close(self) -> None:
        """Let go of it for good."""
        ...


def progress(client: HttpClient, timeout: float) -> float:
    """A number that rises while the server's engine works: its count of tokens and steps."""
    lines = client.get("/metrics", timeout=timeout).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(_COUNTERS))


class LocalReplica:
    """A server that this process starts: a group of processes that die with it.

    It listens on a socket in a folder that only this user can enter, and on no port: what can load
    weights from a path is not for every user of the machine.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._folder = tempfile.TemporaryDirectory(prefix="posttrain-server-")
        self._socket = Path(self._folder.name, "socket")
        self._log = Path(self._folder.name, "log")
        self.client = HttpClient(f"{UNIX}{self._socket}")
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel ends a child with the thread that started it, so that one has to last.
        self._starter = ThreadPoolExecutor(1, f"starter of {name}")

    @property
    def pid(self) -> int | None:
        """Process id, which is its group's too; None where none runs."""
        return None if self._process is None else self._process.pid

    def start(self, timeout: float) -> None:
        """Start the server anew and wait until it answers."""
        self.stop()
        self._socket.unlink(missing_ok=True)
        self._process = self._starter.submit(self._launch).result()
        _wait_until_healthy(self, timeout)

    def death(self) -> str | None:
        """How its process ended, with the last lines that it printed."""
        process = self._process
        if process is None:
            return "it has been stopped"
        # Left unreaped, so that the id of the group stays its own until `stop`.
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        if ended.si_code == os.CLD_EXITED:
            how = f"its process ended with exit code {ended.si_status}"
        else:
            how = f"its process was killed by {signal.Signals(ended.si_status).name}"
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n  | ".join([how, *lines])

    def stop(self) -> None:
        """Kill every process of the group."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """Ask the server to end, see to it that it does, and remove its folder."""
        if self._process is not None and self.death() is None:
            self._process.terminate()
            deadline = time.monotonic() + _CLOSE_SECONDS
            while self.death() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        self.stop()
        self._starter.shutdown()
        self._folder.cleanup()

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self._command, "--uds", str(self._socket)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment, PARENT_PID: str(os.getpid())},
                start_new_session=True,
            )


class NamedReplica:
    """A server that runs already. It is not ours to kill: its requests are let go."""

    def __init__(self, url: str) -> None:
        self.name = url
        self.client = HttpClient(url)

    def start(self, timeout: float) -> None:
        """Wait until it answers; whoever runs it may be starting it again."""
        _wait_until_healthy(self, timeout)

    def death(self) -> str | None:
        """Never known."""
        return None

    def stop(self) -> None:
        """Break the connections; the server ends a request whose connection is gone."""
        self.client.abort()

    def close(self) -> None:
        """Nothing is held."""


def start_on_devices(arguments: Sequence[str], count: int) -> list[Replica]:
    """Servers of vLLM with these arguments, each on its own device where there are several."""
    command = [sys.executable, "-m", "stages.rollout.vllm_serve", *arguments]
    num_devices = torch.cuda.device_count()
    replicas: list[Replica] = []
    for index in range(count):
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1"}
        if num_devices > 1:
            # The trainer has the first.
            environment["CUDA_VISIBLE_DEVICES"] = str(1 + index % (num_devices - 1))
        replicas.append(LocalReplica(f"vLLM server {index}", command, environment))
    return replicas


def _wait_until_healthy(replica: Replica, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        if (death := replica.death()) is not None:
            raise ServerFailure(f"{replica.name} did not start: {death}")
        try:
            replica.client.get("/health", timeout=_PROBE_SECONDS)
            return
        except (ServerFailure, ServerRefused) as error:
            if time.monotonic() >= deadline:
                raise ServerFailure(
                    f"{replica.name} did not answer within {timeout:g} s ({error})"
                ) from error
        time.sleep(_POLL_SECONDS)
