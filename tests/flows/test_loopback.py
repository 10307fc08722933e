"""Nothing that posttrain starts listens to the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Starts the server as a run does, and tells which of its own sockets listen, and where.
SCRIPT = """
import json, os, sys
import psutil
from pathlib import Path
from infra.environment import Home, quiet_environment
home = Home.resolve(sys.argv[1])
os.environ.update(quiet_environment(home))
from flows.local_server import start_local_server
start_local_server(home)
import prefect.settings as settings
inodes = set()
for process in psutil.Process().children(recursive=True):
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(link))
        except OSError:
            pass
listening = []
for table in ("tcp", "tcp6", "udp", "udp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[9]}]" in inodes and (fields[3] == "0A" or table.startswith("udp")):
            listening.append(fields[1].partition(":")[0])
print(json.dumps([listening, settings.PREFECT_SERVER_API_HOST.value(),
                  settings.PREFECT_RUNNER_SERVER_ENABLE.value()]))
"""


def address(hexadecimal: str) -> str:
    """An address as the kernel prints it: words of 32 bits in the machine's order."""
    words = [hexadecimal[at : at + 8] for at in range(0, len(hexadecimal), 8)]
    raw = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ip_address(raw))


def test_the_kernels_addresses_are_read_rightly() -> None:
    assert address("0100007F") == "127.0.0.1"
    assert address("00000000") == "0.0.0.0"
    assert address("00000000000000000000000001000000") == "::1"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_local_server_listens_on_loopback_only(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    listening, server_host, runner_serves = json.loads(done.stdout.splitlines()[-1])
    assert listening, "the server does not listen at all"
    assert all(ip_address(address(one)).is_loopback for one in listening)
    # What `posttrain serve` and the printed `prefect server start` go by.
    assert server_host == "127.0.0.1"
    assert runner_serves is False
