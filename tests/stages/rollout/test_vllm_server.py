"""Real servers of vLLM: new weights in place, exact log-probabilities, faults, and no orphans."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.rl import OnlineConfig, RolloutConfig, SamplingConfig
from stages.rewards.composition import RewardBreakdown
from stages.rl.batches import Batches
from stages.rl.rollouts import PromptRecord, PromptStream, Sampler
from stages.rollout.dispatch import Dispatcher
from stages.rollout.engine import build_engine
from stages.rollout.native import NativeEngine
from stages.rollout.replicas import LocalReplica, progress
from stages.rollout.server_engine import ServerEngine
from stages.rollout.types import Rollout
from tests.stages.rollout.tiny import EOS, PROMPTS, exact_logprobs, letters, llama

GREEDY = SamplingConfig(temperature=0, max_completion_tokens=20)
# Without an end token every completion has this many tokens, and a call takes a while.
LONG = SamplingConfig(max_completion_tokens=250)
CONFIG = RolloutConfig.model_validate(
    {"engine": "vllm_server", "max_batch_size": 32, "servers": {"stall_timeout": 15}}
)

pytestmark = [
    pytest.mark.vllm,
    # A busy machine takes minutes to start a server.
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def start(model: PreTrainedModel, folder: Path, *, eos: list[int]) -> ServerEngine:
    model.save_pretrained(folder)
    tokenizer = letters(64)
    tokenizer.save_pretrained(folder)
    engine = build_engine(
        CONFIG,
        model=model,
        model_folder=folder,
        eos_token_ids=eos,
        pad_token_id=EOS,
        tokenizer=tokenizer,
    )
    assert isinstance(engine, ServerEngine)
    return engine


@dataclass(frozen=True)
class Server:
    """An engine of one server on its second weights."""

    engine: ServerEngine
    model: PreTrainedModel
    replica: LocalReplica

    def native(self) -> NativeEngine:
        return NativeEngine(
            self.model,
            eos_token_ids=[EOS],
            pad_token_id=EOS,
            max_batch_size=32,
            tokenizer=letters(64),
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    replicas: list[LocalReplica] = []
    create = Dispatcher.__init__

    def remember(self: Dispatcher, found: list[LocalReplica], *rest: Any, **named: Any) -> None:
        replicas.extend(found)
        create(self, found, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "__init__", remember)
        folder = tmp_path_factory.mktemp("first")
        engine = start(llama(0, tied=True, max_positions=512), folder, eos=[EOS])
    second = llama(1, tied=True, max_positions=512)
    before = engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    engine.update_weights(second, 5)
    after = engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    assert [r.completion_ids for r in before] != [r.completion_ids for r in after]
    assert {r.policy_version for r in before} == {0}
    yield Server(engine, second, replicas[0])
    engine.close()


def test_greedy_after_an_update_is_that_of_the_new_weights(server: Server) -> None:
    found, expected = (
        engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
        for engine in (server.engine, server.native())
    )
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]
    assert {r.policy_version for r in found} == {5}
    for rollout in found:
        exact = exact_logprobs(server.model, rollout, 1.0)
        assert rollout.rollout_logprobs == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.4, "top_k": 5},
        {"temperature": 1.4, "min_p": 0.1},
    ],
)
def test_logprobs_are_the_trainers(server: Server, changes: dict[str, Any]) -> None:
    sampling = SamplingConfig(max_completion_tokens=20, **changes)
    rollouts = server.engine.generate(PROMPTS, sampling, num_samples=18, seed=1)
    assert [r.prompt_index for r in rollouts] == [i for i in range(len(PROMPTS)) for _ in range(18)]
    assert len({tuple(r.completion_ids) for r in rollouts[:18]}) > 1
    for rollout in rollouts:
        assert rollout.rollout_logprobs == pytest.approx(
            exact_logprobs(server.model, rollout, sampling.temperature), abs=1e-4
        )


def test_stop_strings_and_tokens_are_those_of_the_native_engine(server: Server) -> None:
    sampling = GREEDY.model_copy(update={"stop": ("rI", "cl"), "stop_token_ids": (46,)})
    found, expected = (
        engine.generate(PROMPTS, sampling, num_samples=1, seed=0)
        for engine in (server.engine, server.native())
    )
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]


class Constant:
    """A rewarder for which all rollouts are alike."""

    def __call__(self, rollouts: list[Rollout], records: Any) -> RewardBreakdown:
        zeros = torch.zeros(len(rollouts))
        return RewardBreakdown(zeros, zeros, {})


def test_a_lagging_batch_is_drawn_by_the_weights_before(server: Server) -> None:
    """While the policy changes here, the server goes on with the weights it was given."""
    config = OnlineConfig(
        num_steps=3,
        prompts_per_step=5,
        group_size=4,
        max_policy_lag=1,
        sampling=SamplingConfig(max_completion_tokens=20),
    )
    stream = PromptStream([PromptRecord({}, prompt) for prompt in PROMPTS], seed=0)
    rewarder: Any = Constant()
    sampler = Sampler(server.engine, rewarder, stream, config, 0)
    policies = [llama(seed, tied=True, max_positions=512) for seed in (7, 8, 9)]
    policy = llama(7, tied=True, max_positions=512)
    with Batches(server.engine, sampler, stream, policy, config, lambda step: step) as batches:
        for step, drawn_by in ((0, 0), (1, 0), (2, 1)):
            rollouts = batches.take(step).rollouts
            assert {r.policy_version for r in rollouts} == {drawn_by}
            for rollout in rollouts:
                exact = exact_logprobs(policies[drawn_by], rollout, 1.0)
                assert rollout.rollout_logprobs == pytest.approx(exact, abs=1e-4)
            if step < 2:
                policy.load_state_dict(policies[step + 1].state_dict())
    server.engine.update_weights(server.model, 5)


def test_tokens_of_weights_that_somebody_else_has_set_are_refused(server: Server) -> None:
    server.replica.client.post("/update_weight_version", {"new_version": "9"}, timeout=60)
    with pytest.raises(UserError, match=r"weights of version .*'9'(?s:.*)servers of its own"):
        server.engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    server.engine.update_weights(server.model, 5)


def test_killed_in_the_middle_of_a_generation(server: Server) -> None:
    signal_while_it_draws(server, signal.SIGKILL)


@pytest.mark.slow
def test_hung_in_the_middle_of_a_generation(server: Server) -> None:
    signal_while_it_draws(server, signal.SIGSTOP)


def signal_while_it_draws(server: Server, number: signal.Signals) -> None:
    """Signal the server once its engine has drawn some tokens.

    Nothing may be missing after it, and no process of the old server be left.
    """
    engine, replica = server.engine, server.replica
    below: list[int] = []
    restarts = engine.report()["engine/num_restarts"]
    first = progress(replica.client, 10)

    def strike() -> None:
        # As soon as it can be seen: on a busy machine, most is drawn before the next look.
        while progress(replica.client, 10) <= first:
            time.sleep(0.005)
        pid = replica.pid
        assert pid is not None
        below.extend(descendants(pid))
        # A hang stops the whole group, its engine too; a kill is of the leader alone.
        (os.kill if number == signal.SIGKILL else os.killpg)(pid, number)

    thread = threading.Thread(target=strike)
    thread.start()
    engine._eos_token_ids = []
    try:
        rollouts = engine.generate(PROMPTS, LONG, num_samples=6, seed=2)
    finally:
        engine._eos_token_ids = [EOS]
        thread.join()
    assert [len(r.completion_ids) for r in rollouts] == [250] * 30
    assert {r.policy_version for r in rollouts} == {5}
    assert engine.report()["engine/num_restarts"] == restarts + 1
    assert below
    assert [pid for pid in below if alive(pid)] == []
    for rollout in rollouts[::7]:
        exact = exact_logprobs(server.model, rollout, 1.0)
        assert rollout.rollout_logprobs == pytest.approx(exact, abs=1e-3)
    test_greedy_after_an_update_is_that_of_the_new_weights(server)


_STAGE = """
import sys
from pathlib import Path
from tests.stages.rollout.test_vllm_server import LONG, PROMPTS, start
from tests.stages.rollout.tiny import llama

engine = start(llama(0, tied=True, max_positions=512), Path(sys.argv[1]), eos=[])
print("ready", flush=True)
while True:
    engine.generate(PROMPTS, LONG, num_samples=6, seed=2)
"""


@pytest.mark.slow
def test_nothing_outlives_a_stage_that_is_killed(tmp_path: Path) -> None:
    """Killed while it draws; neither the server nor vLLM's engine and worker may stay."""
    stage = subprocess.Popen(
        [sys.executable, "-c", _STAGE, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        assert stage.stdout is not None
        assert stage.stdout.readline() == "ready\n"
        time.sleep(1)
        below = descendants(stage.pid)
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in below}
        assert any("EngineCor" in name for name in names), names
        stage.kill()
        stage.wait()
        deadline = time.monotonic() + 10
        while (left := [pid for pid in below if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    finally:
        stage.kill()


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and parent(int(entry.name)) == pid:
            found += [int(entry.name), *descendants(int(entry.name))]
    return found


def parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
