from __future__ import annotations

import pytest

from flows import installed
from flows.installed import check_installed
from flows.recipes import load_recipe
from schemas.base import UserError


def test_what_is_missing_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe("smollm2-gsm8k", ["rollout.engine=vllm"])
    monkeypatch.setattr(installed, "_found", lambda package: False)
    with pytest.raises(UserError) as error:
        check_installed(config)
    assert "pip install 'posttrain[vllm]'" in str(error.value)
    assert "pip install 'posttrain[gguf]'" in str(error.value)


def test_nothing_is_asked_for_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_found", lambda package: False)
    check_installed(load_recipe("quickstart", []))


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_an_engine_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(installed, "_found", lambda package: package != "vllm")
    with pytest.raises(UserError, match=rf"rollout\.engine is {engine}, and vLLM is not installed"):
        check_installed(load_recipe("quickstart", [f"rollout.engine={engine}"]))


def test_servers_that_run_elsewhere_need_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_found", lambda package: False)
    overrides = [
        "rollout.engine=vllm_server",
        "rollout.servers.urls=[http://host:8000]",
        "rollout.servers.weights_folder=/shared",
    ]
    check_installed(load_recipe("quickstart", overrides))
