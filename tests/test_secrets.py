"""Secrets planted in the environment and in an address, errors that print them: none gets out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DATABASE_PASSWORD")

# The user's own module: says all it knows, in every way there is, and then fails as it is told.
LEAKY = """
import logging, os, sys
from stages.tasks import arithmetic

NAMES = {names!r}
said = []


def leak():
    text = " ".join(os.environ[name] for name in NAMES)
    if not said:
        said.append(text)
        print("printed", text)
        sys.stderr.write(f"written {{text}}\\n")
        logging.getLogger("user").warning("logged %s", text)
        os.system("true")
    mode = os.environ["LEAK"]
    if mode == "value":
        raise ValueError(text)
    if mode == "bug":
        raise RuntimeError(text) from KeyError(text)
    if mode == "disk":
        raise OSError(5, text, text)
    if mode == "die":
        sys.stdout.flush()
        os._exit(3)


def problems(**arguments):
    leak()
    return arithmetic.problems(**arguments)


def verify(completion, answer):
    leak()
    return arithmetic.verify(completion, answer)
"""


class House:
    """A home, an MLflow server that wants a password, and secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.secrets = {name: f"S3cr3t-{name}-{uuid.uuid4().hex}" for name in VARIABLES}
        password = f"p@ss/{uuid.uuid4().hex}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        uri = f"http://somebody:{quote(password, safe='')}@127.0.0.1:{self.port}"
        self.secrets["MLFLOW_TRACKING_URI"] = uri
        self.needles = [*self.secrets.values(), password, quote(password, safe="")]
        (folder / "leaky.py").write_text(LEAKY.format(names=tuple(self.secrets)))
        recipe = yaml.safe_load(RECIPE.read_text())
        recipe["gate"] = {}  # it judges the reward models, which are left out below
        recipe["data"]["evaluation"]["generator"] = "leaky:problems"
        recipe["reward"]["verifier"]["function"] = "leaky:verify"
        recipe["sft"]["num_epochs"] = 1.0
        for section in (recipe, recipe["reward"]):
            for name in ("reward_model", "process_reward_model", "process"):
                section.pop(name, None)
        recipe["rl"]["online"]["num_steps"] = 1
        recipe["compute"]["retries"] = 1
        recipe["compute"]["registry_timeout"] = 5.0
        (folder / "leaky.yaml").write_text(yaml.safe_dump(recipe))
        self.outputs: list[str] = []
        self.server: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        log = (self.folder / "mlflow.log").open("ab")
        self.server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            env={
                **os.environ,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            assert self.server.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)

    def stop_server(self) -> None:
        if self.server is not None:
            os.killpg(self.server.pid, 9)
            self.server.wait()
            self.server = None

    def command(self, *words: str, leak: str = "") -> tuple[int, str]:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "posttrain"), *words, "--home", str(self.home)],
            cwd=self.folder,
            env={**os.environ, **self.secrets, "LEAK": leak, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        self.outputs.append(done.stdout + done.stderr)
        return done.returncode, done.stdout + done.stderr

    def places_with_secrets(self) -> list[str]:
        found = [
            f"{path}: {needle[:12]}"
            for path in self.folder.rglob("*")
            if path.is_file()
            for needle in self.needles
            if needle.encode() in path.read_bytes()
        ]
        for number, output in enumerate(self.outputs):
            found += [f"output {number}: {needle}" for needle in self.needles if needle in output]
        return found


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("secrets"))
    yield house
    house.stop_server()


def test_no_secret_gets_out(house: House) -> None:
    code, output = house.command("run", "leaky.yaml")
    assert code == 1 and "MLflow at http://127.0.0.1" in output, output
    house.start_server()
    for seed, (leak, expected, message) in enumerate(
        (
            ("value", 2, "ValueError: *** *** *** ***"),
            ("bug", 1, "RuntimeError: *** *** *** ***"),
            ("disk", 1, "*** *** *** ***"),
            ("die", 1, "logged *** *** *** ***"),
        )
    ):
        # Other records each time: what is done is reused, and says nothing.
        other = ("--set", f"data.evaluation.arguments.seed={100 + seed}")
        code, output = house.command("run", "leaky.yaml", *other, leak=leak)
        assert code == expected, output
        assert message in output
        assert leak == "die" or "***" in house.command("show", "latest")[1]
    code, output = house.command("run", "leaky.yaml", "--json")
    assert code == 0, output
    for words in (
        ("runs", "--json"),
        ("lineage", "tiny/1"),
        ("promote", "tiny", "1", "--reason", f"because {house.secrets['HF_TOKEN']}"),
        ("models", "--json"),
    ):
        code, output = house.command(*words)
        assert code == 0, output
    logs = list(house.home.glob("store/work/*/stage.log"))
    assert any("printed *** ***" in log.read_text() for log in logs)
    assert house.places_with_secrets() == []
    # The search itself finds what is there.
    (house.home / "planted").write_text(house.secrets["HF_TOKEN"])
    assert len(house.places_with_secrets()) == 1


def test_a_secret_in_a_recipe_is_refused(house: House) -> None:
    secret = house.secrets["WANDB_API_KEY"]
    for value, what in (
        (secret, "the value of WANDB_API_KEY"),
        ("postgresql://me:pw@host/x", "an address with a password"),
    ):
        code, output = house.command(
            "run", "leaky.yaml", "--dry-run", "--set", f"data.evaluation.arguments.key={value}"
        )
        assert code == 2
        assert f"--set: data.evaluation.arguments.key holds {what}" in output
        assert value not in output
