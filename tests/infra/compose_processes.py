"""Runs the services of compose.yaml as processes of this machine, where no container engine is.

Commands, variables, health checks, mounts and the order of starting are read from the file. What a
container would have of its own is given to each process: names of hosts become 127.0.0.1, ports
become free ones, and folders of the container become folders below one of the test's. Two images
are stood in for: PostgreSQL is Debian's, set up as the image's entry point does it, and the object
store is moto's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from dockerfile_parse import DockerfileParser

from tests.infra.deployment_files import DEPLOYMENT, REPOSITORY, compose

_PORT = re.compile(r"(?:127\.0\.0\.1:|--port=)(\d+)")
_ENDING_SECONDS = 30.0


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest of Debian's."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    return found[-1] if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComposeProcesses:
    """The services of the compose file, each one process group."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.services: dict[str, dict[str, Any]] = compose(variables)["services"]
        self.container_ports = {
            name: found[1]
            for name, service in self.services.items()
            if (found := _PORT.search(" ".join(service.get("healthcheck", {}).get("test", []))))
        }
        self.ports = {name: free_port() for name in self.container_ports}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.mounts = {name: self._mounts(service) for name, service in self.services.items()}

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text(errors="replace")

    def environment(self, service: str) -> dict[str, str]:
        """The variables of a service, and what every image has of its own."""
        programs = [str(Path(sys.executable).parent), str(postgres_programs()), "/usr/bin", "/bin"]
        given = self.services[service].get("environment", {})
        return {
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": str(REPOSITORY),
            **{
                name: "127.0.0.1" if name.endswith("_HOST") else self.here(service, value)
                for name, value in given.items()
            },
        }

    def command(self, service: str) -> list[str]:
        """Entry point and arguments."""
        given = self.services[service]
        entrypoint = given.get("entrypoint")
        if entrypoint is None and given["build"]["target"] == "posttrain":
            entrypoint = self._image_entrypoint()
        return [self.here(service, one) for one in [*(entrypoint or []), *given["command"]]]

    def here(self, service: str, text: str) -> str:
        """A value from the compose file as it has to be on this machine."""
        own = self.container_ports.get(service)
        for name, port in self.container_ports.items():
            text = re.sub(rf"\b{name}:{port}\b", f"127.0.0.1:{self.ports[name]}", text)
            if text == port and name in (service, "postgres"):
                text = str(self.ports[name])
        if own:
            text = re.sub(rf"(?<=127\.0\.0\.1:){own}\b", str(self.ports[service]), text)
            text = re.sub(rf"^--port={own}$", f"--port={self.ports[service]}", text)
        text = text.replace("--host=0.0.0.0", "--host=127.0.0.1")
        for there, place in sorted(self.mounts[service].items(), reverse=True):
            text = re.sub(rf"(?<![\w.]){re.escape(there)}(?![\w.-])", str(place), text)
        return text

    def healthy(self, service: str) -> bool:
        """What the health check of a service says, run as it is written."""
        check = self.services[service]["healthcheck"]
        assert check["test"][0] == "CMD"
        done = subprocess.run(
            [self.here(service, one) for one in check["test"][1:]],
            env=self.environment(service),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        return done.returncode == 0

    def start(self, service: str) -> None:
        """Start a service once what it depends on is as the file wants it."""
        for other, condition in self.services[service].get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                self.wait_until_healthy(other)
            else:
                assert condition["condition"] == "service_completed_successfully"
                assert self.processes[other].wait(timeout=120) == 0, self.log(other)
        match service:
            case "postgres":
                self._start_postgres()
            case "object-store":
                self._start_moto()
            case _:
                folder = self.here(service, self.services[service].get("working_dir", "/tmp"))
                self._spawn(service, self.command(service), self.environment(service), folder)

    def wait_until_healthy(self, service: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy(service):
            assert self.processes[service].poll() is None, self.log(service)
            assert time.monotonic() < deadline, self.log(service)
            time.sleep(0.5)

    def processes_of(self, service: str) -> list[psutil.Process]:
        parent = psutil.Process(self.processes[service].pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self, service: str) -> None:
        """SIGTERM as an engine sends it, or SIGINT for PostgreSQL (its image says so)."""
        process = self.processes[service]
        family = self.processes_of(service) if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT if service == "postgres" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_ENDING_SECONDS)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def stop_all(self) -> None:
        for service in reversed(self.processes):
            self.stop(service)

    def _mounts(self, service: dict[str, Any]) -> dict[str, Path]:
        """Where the container's folders are on this machine."""
        found = {"/tmp": self.folder / "tmp"}
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source, _, target = volume.partition(":")
                found[target] = self.folder / "volumes" / source
            elif volume["type"] == "volume":
                found[volume["target"]] = self.folder / "volumes" / volume["source"]
            else:
                found[volume["target"]] = (DEPLOYMENT / volume["source"]).resolve()
        for place in found.values():
            if self.folder in place.parents:
                place.mkdir(parents=True, exist_ok=True)
        return found

    def _image_entrypoint(self) -> list[str]:
        lines = DockerfileParser(path=str(DEPLOYMENT / "Dockerfile")).structure
        (entry,) = (one["value"] for one in lines if one["instruction"] == "ENTRYPOINT")
        return [str(one) for one in json.loads(entry)]

    def _spawn(
        self,
        service: str,
        command: list[str],
        environment: dict[str, str],
        folder: str,
        user: str | None = None,
    ) -> None:
        with (self.folder / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=user,
            )

    def _start_postgres(self) -> None:
        """As the entry point of the image: initdb, the scripts over a socket, then the server."""
        service, programs = "postgres", postgres_programs()
        assert programs
        environment = self.environment(service)
        database = next(one for there, one in self.mounts[service].items() if "data" in there)
        scripts = [one for there, one in self.mounts[service].items() if "initdb.d" in there]
        user = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("nobody").pw_name
            for place in (database, self.folder / "tmp"):
                shutil.chown(place, user)
        password = self.folder / "tmp" / "postgres-password"
        password.write_text(environment["POSTGRES_PASSWORD"])
        password.chmod(0o644)

        def run(*command: str | Path, **more: str) -> None:
            done = subprocess.run(
                command,
                env={**environment, "PGHOST": str(self.folder / "tmp"), **more},
                capture_output=True,
                text=True,
                user=user,
                cwd="/",
            )
            assert done.returncode == 0, done.stdout + done.stderr

        options = f"-k {self.folder / 'tmp'} -p {self.ports[service]}"
        run(
            *(programs / "initdb", "--pgdata", database, f"--pwfile={password}"),
            *("--username", environment["POSTGRES_USER"], "--auth-local=trust"),
            *environment["POSTGRES_INITDB_ARGS"].split(),
        )
        control = (programs / "pg_ctl", "--pgdata", database, "--wait", "--silent")
        log = f"--log={self.folder / 'tmp' / 'setup.log'}"
        run(*control, log, f"--options={options} -c listen_addresses=''", "start")
        try:
            # By the socket the server is there, and the check must not take it for ready.
            assert not self.healthy(service)
            for script in scripts:
                run("/bin/sh", script, PGPORT=str(self.ports[service]))
        finally:
            run(*control, "stop")
        server = [str(programs / "postgres"), "-D", str(database), *options.split()]
        self._spawn(service, server, environment, "/", user)

    def _start_moto(self) -> None:
        service = "object-store"
        port = str(self.ports[service])
        server = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", port]
        self._spawn(service, server, self.environment(service), str(self.folder))
        # moto has no page for a health check: a public bucket of that name answers in its place.
        deadline = time.monotonic() + 60
        request = urllib.request.Request(f"{self.url(service)}/healthz", method="PUT")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            with contextlib.suppress(OSError), opener.open(request, timeout=5):
                return
            assert time.monotonic() < deadline, self.log(service)
            time.sleep(0.3)
