"""Real servers for tests: each a process of its own, which can be killed, stopped and restarted."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 180.0
STANDSTILL_SECONDS = 150.0
"""How long Prefect's server on SQLite may stand still, with room to spare.

Its connections wait up to 60 s for the lock of the database (`PRAGMA busy_timeout`), each in a
thread of its own. If Python's garbage collector then frees a cursor of such a connection in the
thread of the event loop, sqlite3_reset waits there for the same 60 s, and so does every request,
also the one that holds the lock.
"""
TERMINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
MAIN = ("-c", "from flows.cli import main; main()")
"""Arguments of Python that make it the command line."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: Callable[[], Any], seconds: float = 120.0, log: Path | None = None) -> Any:
    """What `what` returns as soon as it is true; fails with the end of a log after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, log.read_text()[-6000:] if log else "it took too long"
        time.sleep(0.2)
    return found


def fetch(url: str, document: Any = None, timeout: float = STANDSTILL_SECONDS) -> Any:
    """JSON from a server of this machine, whatever the proxy settings are.

    Prefect answers 503 while its database is locked, and wants to be asked again.
    """
    request = urllib.request.Request(url, headers={"content-type": "application/json"})
    if document is not None:
        request.data = json.dumps(document).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempts_left in reversed(range(6)):
        try:
            with opener.open(request, timeout=timeout) as response:
                text = response.read()
            break
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempts_left == 0:
                raise
            time.sleep(1.0)
    return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


class Process:
    """A process and its group, with a log."""

    def __init__(
        self,
        command: list[str],
        *,
        log: Path,
        cwd: Path,
        env: dict[str, str],
        user: str | None = None,
    ) -> None:
        self.command = command
        self.log = log
        self.cwd = cwd
        self.env = env
        self.user = user
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self.user,
            )

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def suspend(self) -> None:
        """Hang: the kernel still accepts connections, and nobody answers them."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is not None:
            return
        self.resume()
        self.signal(number)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class MlflowServer:
    """An MLflow server on a database and a port that stay the same."""

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        log = folder / "mlflow.log"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", backend or f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.process = Process(command, log=log, cwd=folder, env=environment)
        self.wait()

    def wait(self) -> None:
        wait_for(self.answers, START_SECONDS, self.process.log)

    def answers(self) -> bool:
        assert self.process.process.poll() is None, self.process.log.read_text()[-4000:]
        try:
            return bool(fetch(f"{self.uri}/health", timeout=5) == "OK")
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()

    def start(self) -> None:
        self.process.start()
        self.wait()


class PrefectServer:
    """A Prefect server on a database and a port that stay the same."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        from infra.environment import Home, quiet_environment

        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.log = folder / "prefect.log"
        home = Home.resolve(str(folder / "server"))
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")},
            **quiet_environment(home),
            # Tests wait for these; the defaults are 30 s each.
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "4",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        }
        if database is not None:
            environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        command = [
            *(sys.executable, "-m", "prefect", "server", "start", "--no-ui"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        self.process = Process(command, log=self.log, cwd=folder, env=environment)
        self.wait()

    def wait(self) -> None:
        wait_for(self.answers, START_SECONDS, self.log)

    def answers(self) -> bool:
        assert self.process.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return isinstance(self.ask("flow_runs/filter"), list)
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()

    def start(self) -> None:
        self.process.start()
        self.wait()

    def revive(self, patience: float = STANDSTILL_SECONDS) -> None:
        """Start again if it gives no answer for `patience` seconds.

        Before 3.8.6, Prefect on SQLite can stop for good when an automation is written
        (PrefectHQ/prefect#23055), and every test after that would wait for it.
        """
        try:
            fetch(f"{self.url}/health", timeout=patience)
        except OSError as error:
            warnings.warn(f"Prefect's server is started again: {error}", stacklevel=2)
            self.kill()
            self.start()

    def ask(self, path: str, **query: Any) -> Any:
        return fetch(f"{self.url}/{path}", query)

    def read(self, path: str) -> Any:
        return fetch(f"{self.url}/{path}")

    def environment(self, home: Any, *path: Path) -> dict[str, str]:
        """The environment of a command or worker that uses this server."""
        from infra.environment import quiet_environment

        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")},
            **quiet_environment(home),
            "PREFECT_API_URL": self.url,
            "PYTHONPATH": os.pathsep.join(str(one) for one in (REPOSITORY, *path)),
            "OMP_NUM_THREADS": "1",
        }

    def deployment(self, name: str) -> Any:
        return self.read(f"deployments/name/posttrain/{name}")

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        """The runs of a deployment that are due, in the order in which they are."""
        found: list[dict[str, Any]] = self.ask(
            "flow_runs/filter",
            deployments={"name": {"any_": [deployment]}},
            sort="EXPECTED_START_TIME_ASC",
        )
        return found

    def start_run(self, deployment: str) -> str:
        """Start a run by hand, as its button does; the run's id."""
        made = self.ask(f"deployments/{self.deployment(deployment)['id']}/create_flow_run")
        identifier: str = made["id"]
        return identifier

    def run(self, identifier: str) -> dict[str, Any]:
        found: dict[str, Any] = self.read(f"flow_runs/{identifier}")
        return found

    def states(self, run: str) -> list[str]:
        """Names of the states that a run has gone through."""
        found = self.read(f"flow_run_states/?flow_run_id={run}")
        return [str(one["name"]) for one in sorted(found, key=lambda one: one["timestamp"])]

    def wait_until_ended(self, run: str, seconds: float, log: Path) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            found = self.run(run)
            return found if found["state_type"] in TERMINAL else None

        found: dict[str, Any] = wait_for(ended, seconds, log)
        return found


@contextmanager
def worker(pool: str, *, cwd: Path, env: dict[str, str]) -> Iterator[Process]:
    """A process worker of a pool; its runs start in `cwd`."""
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    process = Process([sys.executable, *command], log=cwd / "worker.log", cwd=cwd, env=env)
    try:
        yield process
    finally:
        process.end()


def command(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `posttrain` with some arguments to its end."""
    return subprocess.run(
        [sys.executable, *MAIN, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )


class Postgres:
    """A PostgreSQL server of Debian's packages, in a folder of its own, by an ordinary user."""

    def __init__(self, folder: Path) -> None:
        programs = postgres_programs()
        assert programs is not None
        self.port = free_port()
        self.user = _unprivileged_user()
        self.folder = folder
        data = folder / "data"
        data.mkdir()
        if self.user is not None:
            shutil.chown(folder, self.user)
            shutil.chown(data, self.user)
            for parent in folder.parents:  # pytest's folders are the user's own
                if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                    parent.chmod(parent.stat().st_mode | 0o011)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
        subprocess.run(
            [
                *(str(programs / "initdb"), "--pgdata", str(data), "--username", "posttrain"),
                *("--auth", "trust", "--encoding", "UTF8", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            env=environment,
            user=self.user,
        )
        command = [
            *(str(programs / "postgres"), "-D", str(data), "-p", str(self.port)),
            *("-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off"),
        ]
        self.process = Process(
            command, log=folder / "postgres.log", cwd=folder, env=environment, user=self.user
        )
        self.programs = programs
        wait_for(lambda: self._create("prefect"), 60, self.process.log)
        self._create("mlflow")

    def url(self, driver: str, database: str) -> str:
        return f"postgresql+{driver}://posttrain@127.0.0.1:{self.port}/{database}"

    def _create(self, database: str) -> bool:
        done = subprocess.run(
            [
                *(str(self.programs / "createdb"), "-h", "127.0.0.1", "-p", str(self.port)),
                *("-U", "posttrain", database),
            ],
            capture_output=True,
        )
        return done.returncode == 0

    def end(self) -> None:
        self.process.end(signal.SIGINT)  # "fast": without waiting for its clients


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres, on the path or where Debian puts them."""
    found = shutil.which("initdb")
    if found is not None and (Path(found).parent / "createdb").exists():
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def _unprivileged_user() -> str | None:
    """initdb refuses root; anybody else is good enough as they are."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
