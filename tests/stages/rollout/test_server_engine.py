"""Servers that are scripted to die, hang, err and lag: what is drawn must not depend on it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.base import UserError
from schemas.rl import RolloutConfig, SamplingConfig
from stages.rollout.dispatch import ServersLost
from stages.rollout.engine import build_engine
from stages.rollout.http_client import HttpClient, ServerFailure, ServerRefused
from stages.rollout.replicas import LocalReplica
from stages.rollout.server_engine import ServerEngine, named_replicas
from stages.rollout.streams import request_seed
from tests.stages.rollout.fake_server import tokens

PROMPTS = [[5, 6, 7], [4], [3, 9, 8, 4, 10, 11, 5], [6, 6], [12, 3, 4, 5]]
SAMPLING = SamplingConfig(max_completion_tokens=10)
FAKE = Path(__file__).with_name("fake_server.py")


def policy(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )


def weight_sum(model: LlamaForCausalLM) -> float:
    return sum(float(value.detach().sum()) for value in model.parameters())


class Servers:
    """Engines over scripted servers, and the faults of these."""

    def __init__(self, folder: Path) -> None:
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.replicas: list[LocalReplica] = []
        self.engines: list[ServerEngine] = []

    def fault(self, *names: str) -> None:
        for name in names:
            (self.faults / name).touch()

    def engine(
        self, model: LlamaForCausalLM, *, count: int = 2, max_batch_size: int = 6, **limits: Any
    ) -> ServerEngine:
        command = [sys.executable, str(FAKE), "--faults", str(self.faults)]
        root = {"PYTHONPATH": str(FAKE.parents[3])}
        self.replicas = [LocalReplica(f"server {i}", command, root) for i in range(count)]
        config = RolloutConfig.model_validate(
            {
                "engine": "vllm_server",
                "max_batch_size": max_batch_size,
                "servers": {"start_timeout": 60, "stall_timeout": 2, "slow_after": 60} | limits,
            }
        )
        engine = ServerEngine(self.replicas, model, config, eos_token_ids=[2], context=64)
        self.engines.append(engine)
        return engine

    def states(self) -> list[dict[str, Any]]:
        return [json.loads(one.client.get("/state", timeout=10)) for one in self.replicas]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path)
    yield found
    for engine in found.engines:
        engine.close()
    assert all(one.pid is None for one in found.replicas)


def check(engine: ServerEngine, *, version: int, num_samples: int = 4) -> None:
    """Everything that was asked for is there, drawn with its own seed."""
    found = engine.generate(PROMPTS, SAMPLING, num_samples=num_samples, seed=9)
    expected = [
        (index, tokens(prompt, request_seed(9, index) + sample, 10))
        for index, prompt in enumerate(PROMPTS)
        for sample in range(num_samples)
    ]
    assert [(r.prompt_index, r.completion_ids) for r in found] == expected
    assert {r.policy_version for r in found} == {version}
    assert all(r.prompt_ids == PROMPTS[r.prompt_index] for r in found)
    assert found[0].rollout_logprobs == [-i / 64 for i in found[0].completion_ids]


def test_requests_are_spread_and_weights_reach_every_server(servers: Servers) -> None:
    first, second = policy(0), policy(1)
    engine = servers.engine(first)
    check(engine, version=0)
    assert all(state["num_tokens"] > 0 for state in servers.states())
    assert sum(state["num_tokens"] for state in servers.states()) == 5 * 4 * 10
    resets = [state["num_resets"] for state in servers.states()]
    engine.update_weights(second, 3)
    check(engine, version=3)
    for state, before in zip(servers.states(), resets, strict=True):
        assert state["version"] == "3"
        assert state["weights"] == pytest.approx(weight_sum(second), abs=1e-4)
        assert state["weights"] != pytest.approx(weight_sum(first), abs=1e-2)
        assert state["temperature"] == 1.0
        assert state["num_resets"] > before
    assert engine.report() == {"engine/num_restarts": 0.0, "engine/num_moved_requests": 0.0}


def test_more_samples_than_a_request_holds(servers: Servers) -> None:
    check(servers.engine(policy(0), count=1, max_batch_size=64), version=0, num_samples=37)


def test_temperature_is_set_before_anything_is_drawn(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=1)
    for temperature, expected in ((0.7, 0.7), (0.0, 1.0)):
        sampling = SamplingConfig(temperature=temperature, max_completion_tokens=2)
        engine.generate(PROMPTS, sampling, num_samples=1, seed=0)
        assert servers.states()[0]["temperature"] == expected


@pytest.mark.parametrize("fault", ["kill", "error", "stop"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_failed_server_comes_back_with_the_newest_weights(
    servers: Servers, fault: str, count: int
) -> None:
    model = policy(1)
    engine = servers.engine(policy(0), count=count)
    engine.update_weights(model, 4)
    servers.fault(fault)
    check(engine, version=4)
    assert engine.report()["engine/num_restarts"] == 1
    assert engine.report()["engine/num_moved_requests"] >= 1
    # The next call waits for the server that is starting.
    check(engine, version=4)
    assert [state["weights"] for state in servers.states()] == pytest.approx(
        [weight_sum(model)] * count, abs=1e-4
    )


def test_a_server_that_fails_while_nothing_is_drawn_is_started_again(servers: Servers) -> None:
    engine = servers.engine(policy(0))
    pid = servers.replicas[0].pid
    assert pid is not None
    os.kill(pid, 9)
    time.sleep(0.2)
    engine.update_weights(policy(1), 1)
    check(engine, version=1)
    assert engine.report()["engine/num_restarts"] == 1


def test_restarts_are_bounded_and_the_others_go_on(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=2, max_restarts=1)
    pid = servers.replicas[0].pid
    assert pid is not None
    # The first server never starts again; the second does all the work.
    servers.fault("start.always")
    os.kill(pid, 9)
    check(engine, version=0)
    for version in (1, 2):
        engine.update_weights(policy(version), version)
        check(engine, version=version)
    assert engine.report()["engine/num_restarts"] == 1


def test_when_no_server_is_left_the_reason_is_told(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=2, max_restarts=1)
    servers.fault("kill.always")
    with pytest.raises(ServersLost, match=r"no server is left after 2 restarts(?s:.*)SIGKILL"):
        engine.generate(PROMPTS, SAMPLING, num_samples=4, seed=9)
    # A failure of the machine: the stage may be tried again.
    assert issubclass(ServersLost, OSError)


def test_a_server_that_does_not_start_says_why(servers: Servers) -> None:
    servers.fault("start")
    with pytest.raises(ServersLost, match=r"exit code 1(?s:.*)no memory for the cache"):
        servers.engine(policy(0), count=2)


def test_each_failure_halves_what_a_server_gets_at_once(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    engine = servers.engine(policy(0), count=1, max_batch_size=16)
    servers.fault("kill1", "kill2")
    check(engine, version=0)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "at most 2 requests at once" in text
    assert "at most 1 requests at once" in text


def test_a_request_that_takes_too_long_is_given_to_an_idle_server(servers: Servers) -> None:
    engine = servers.engine(policy(0), slow_after=0.5)
    servers.fault("slow")
    start = time.monotonic()
    check(engine, version=0)
    assert time.monotonic() - start < 25, "the slow request was waited for"
    assert engine.report() == {"engine/num_restarts": 0.0, "engine/num_moved_requests": 1.0}
    check(engine, version=0)


def test_a_slow_server_that_moves_is_not_taken_for_hung(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=1, stall_timeout=1)
    sampling = SamplingConfig(max_completion_tokens=1)
    servers.fault("busy")
    engine.generate(PROMPTS[:1], sampling, num_samples=1, seed=0)
    assert engine.report()["engine/num_restarts"] == 0


def test_what_a_server_refuses_is_not_tried_again(servers: Servers) -> None:
    engine = servers.engine(policy(0))
    servers.fault("refuse")
    with pytest.raises(ServerRefused, match="400 top_k must be an integer"):
        engine.generate(PROMPTS, SAMPLING, num_samples=4, seed=9)
    assert engine.report()["engine/num_restarts"] == 0
    check(engine, version=0)


def test_tokens_of_another_version_are_refused(servers: Servers) -> None:
    engine = servers.engine(policy(0))
    servers.fault("version")
    with pytest.raises(UserError, match=r"somebody else(?s:.*)servers of its own"):
        engine.generate(PROMPTS, SAMPLING, num_samples=4, seed=9)


def test_nothing_to_sample_gives_nothing(servers: Servers) -> None:
    assert servers.engine(policy(0)).generate([], SAMPLING, num_samples=4, seed=9) == []


def test_a_prompt_that_does_not_fit_is_named(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=1)
    with pytest.raises(UserError, match="prompt 1 has 60 tokens"):
        engine.generate([[4], [4] * 60], SAMPLING, num_samples=1, seed=0)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that somebody else has started, by its address, and its faults."""
    faults = tmp_path / "others"
    faults.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(FAKE), "--faults", str(faults)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(FAKE.parents[3])},
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}", faults
    process.kill()
    process.wait()


def test_servers_named_by_address(running: tuple[str, Path], tmp_path: Path) -> None:
    url, faults = running
    folder = tmp_path / "weights"
    config = RolloutConfig.model_validate(
        {
            "engine": "vllm_server",
            "max_batch_size": 6,
            "servers": {"urls": [url], "weights_folder": str(folder), "start_timeout": 20},
        }
    )
    replicas, context = named_replicas(config.servers.urls, 20)
    assert context == 64
    model = policy(1)
    engine = ServerEngine(replicas, policy(0), config, eos_token_ids=[2], context=context)
    engine.update_weights(model, 2)
    check(engine, version=2)
    (faults / "error").touch()
    check(engine, version=2)
    assert engine.report()["engine/num_restarts"] == 1
    state = json.loads(HttpClient(url).get("/state", timeout=10))
    assert state["weights"] == pytest.approx(weight_sum(model), abs=1e-4)
    engine.close()
    assert list(folder.iterdir()) == []


def test_a_server_that_takes_no_weights_is_named_with_how_to_start_one(
    running: tuple[str, Path], tmp_path: Path
) -> None:
    url, faults = running
    (faults / "foreign.always").touch()
    config = RolloutConfig.model_validate(
        {
            "engine": "vllm_server",
            "servers": {"urls": [url], "weights_folder": str(tmp_path / "weights")},
        }
    )
    replicas, context = named_replicas(config.servers.urls, 20)
    with pytest.raises(UserError, match=r"404 Not Found(?s:.*)VLLM_SERVER_DEV_MODE=1 python -m"):
        ServerEngine(replicas, policy(0), config, eos_token_ids=[2], context=context)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_machine_without_vllm_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'posttrain\[vllm\]'.*servers\.urls"):
        build_engine(
            RolloutConfig(engine="vllm_server"),
            model=policy(0),
            model_folder=tmp_path,
            eos_token_ids=[2],
            pad_token_id=2,
        )


def test_an_address_without_a_server_is_named() -> None:
    with pytest.raises(UserError, match=r"servers\.urls: http://127\.0\.0\.1:9 does not answer"):
        named_replicas(["http://127.0.0.1:9"], 0.3)


def test_a_connection_that_is_broken_off_fails_at_once(servers: Servers) -> None:
    engine = servers.engine(policy(0), count=1)
    client = servers.replicas[0].client
    servers.fault("slow")
    body = {"token_ids": [4], "sampling_params": {"n": 1, "seed": 0, "max_tokens": 1}}
    failed: list[str] = []

    def ask() -> None:
        try:
            client.post("/inference/v1/generate", body, timeout=60, key="mine")
        except ServerFailure as error:
            failed.append(str(error))

    run_while(ask, lambda: client.abort("mine"))
    assert len(failed) == 1
    check(engine, version=0)


def run_while(work: Callable[[], None], action: Callable[[], None]) -> None:
    """Do the work in a thread, and the action again and again until it is done."""
    import threading

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        time.sleep(0.1)
        action()
