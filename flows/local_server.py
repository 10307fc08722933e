"""A Prefect server for the length of one run, which never outlives it.

Prefect's own ephemeral server goes on for ever when its parent is killed, holds the parent's
standard output, and is ended by the Ctrl-C that the run still wants to report.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from infra.environment import Home
from infra.files import file_lock
from infra.launch import die_with_parent
from infra.redaction import redact, redact_process
from infra.tail import last_lines

_START_SECONDS = 180.0


def start_local_server(home: Home) -> str:
    """Start a server on the home's database, to the end of this process; its API's address.

    It is stopped when the interpreter ends, after Prefect's own threads have sent what they hold:
    without a server they would try for minutes.
    """
    # Two servers that make the tables of one new database get in each other's way.
    with file_lock(home.locks / "prefect.lock", lambda: None):
        return _start(home)


def _start(home: Home) -> str:
    log = home.prefect_home / "server.log"
    port = _free_port()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.local_server", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "POSTTRAIN_PARENT_PID": str(os.getpid())},
            start_new_session=True,
        )
    atexit.register(_stop, process)
    url = f"http://127.0.0.1:{port}/api"
    if not _answers(url, process):
        lines = "\n".join(f"  | {redact(line)}" for line in last_lines(log, 5))
        raise OSError(f"Prefect's server did not start; see {log}\n{lines}")
    return url


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + _START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            opener.open(f"{url}/health", timeout=5) as response,
        ):
            if response.status == 200:
                return True
        time.sleep(0.1)
    return False


def main() -> None:
    """The server's process: `python -m flows.local_server PORT`."""
    die_with_parent()
    redact_process()
    os.environ["PREFECT_UI_ENABLED"] = "0"
    os.environ["PREFECT__SERVER_EPHEMERAL"] = "1"
    os.environ["PREFECT__SERVER_FINAL"] = "1"
    os.environ.pop("PREFECT_API_URL", None)
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    main()
