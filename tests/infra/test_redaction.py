"""Secrets never get out, and what is no secret stays legible."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.redaction import redact, redact_error, redact_value, secret_in


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    value = "hf_Zq8/&%+ \"'é{x}"
    monkeypatch.setenv("HF_TOKEN", value)
    return value


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql+asyncpg://me:pw@db:5432/x", "postgresql+asyncpg://***@db:5432/x"),
        ("http://me:p%40w@h/api and http://h:80/a@b", "http://***@h/api and http://h:80/a@b"),
        ("postgresql://me:a/b#c?d@h/x", "postgresql://***@h/x"),
        ("https://token@host", "https://***@host"),
        ("sqlite:////a/mlflow.db", "sqlite:////a/mlflow.db"),
        ("models:/policy@champion", "models:/policy@champion"),
        ("git+https://host/x/y@v1", "git+https://host/x/y@v1"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("mail a@b.c", "mail a@b.c"),
        ("http://h/x?a=1&token=abc&b=2", "http://h/x?a=1&token=***&b=2"),
        ("s3://b/k?X-Amz-Signature=ff00", "s3://b/k?X-Amz-Signature=***"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("Basic knowledge of tokens", "Basic *** of tokens"),
        ("'http://a:b@c', 'd@e'", "'http://***@c', 'd@e'"),
    ],
)
def test_addresses(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "WANDB_API_KEY",
        "OPENAI_APIKEY",
        "my_secret",
        "TOKEN",
    ],
)
def test_the_value_of_a_variable_that_is_named_like_a_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "s3cr3t-value")
    assert redact("it is s3cr3t-value.") == "it is ***."
    assert secret_in("it is s3cr3t-value.") == f"the value of {name}"


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "PATH", "SECRETARY", "MONKEY", "KEYBOARD", "AUTHOR"]
)
def test_the_value_of_another_variable_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t-value")
    assert redact("it is s3cr3t-value.") == "it is s3cr3t-value."


def test_a_password_in_an_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p%40ss-w0rd/1@db/x")
    assert redact("p%40ss-w0rd/1, p@ss-w0rd/1") == "***, ***"


@pytest.mark.parametrize("value", ["postgres", "1", "prefect", "a1b2c", ""])
def test_what_is_too_plain_to_be_a_secret_ruins_no_text(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", value)
    assert redact("1 prefect on postgres a1b2c") == "1 prefect on postgres a1b2c"


@settings(max_examples=50, deadline=None)
@given(before=st.text(), after=st.text())
def test_in_any_surroundings_and_every_form(before: str, after: str) -> None:
    value = "hf_Zq8/&%+ \"'é{x}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", value)
        for form in (value, json.dumps(value), repr(value), repr({"a": value})):
            assert "Zq8" not in redact(before + form + after)


def test_structures_and_errors(token: str) -> None:
    assert redact_value({token: [token, 1, (token, None)]}) == {"***": ["***", 1, ("***", None)]}
    inner = OSError(5, f"at {token}", token)
    error = RuntimeError("with", token)
    error.__cause__ = inner
    error.add_note(f"note {token}")
    assert redact_error(error) is error
    assert error.args == ("with", "***")
    assert error.__notes__ == ["note ***"]
    assert inner.args[1] == inner.strerror == "at ***"


PROGRAM = """
import logging, os, sys
from infra.redaction import redact_process
redact_process()
redact_process()
token = os.environ["HF_TOKEN"]
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
print("printed", token)
print("in two", token[:3], sep=" ", end=""); print(token[3:])
sys.stderr.write(f"written {token}\\n")
logging.info("logged %s and %d", token, 3)
logging.info("odd %d", token)
try:
    raise ValueError(token)
except ValueError:
    logging.exception("caught")
print("no end", token, end="", flush=True)
raise RuntimeError(token)
"""


def test_a_program_prints_and_logs_no_secret(token: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert "Zq8" not in output
    for line in ("printed ***", "in two ***", "written ***", "logged *** and 3", "no end ***"):
        assert line in output
    assert "ValueError: ***" in output
    assert "RuntimeError: ***" in output


def test_a_record_is_left_as_it_is_without_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("any").warning("%s of %d", "one", 2)
    assert caplog.records[-1].args == ("one", 2)
