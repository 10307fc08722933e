"""The RL stage with adapters: one model less, plain weights out, and the same bits when resumed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from infra.files import file_digest
from schemas.artifacts import TRACES_FILE, PolicyCheckpoint
from schemas.base import UserError
from schemas.fingerprint import fingerprint
from schemas.requests import StageRequest, TrainRLRequest, TrainSFTRequest
from schemas.rewards import RewardConfig, VerifierConfig
from schemas.rl import RLConfig, RolloutConfig
from schemas.training import LoRAConfig, SFTConfig
from stages import models
from stages.adapters import add_adapters
from stages.forward import Sequences, all_completion_logprobs
from stages.main import run_stage
from stages.models import load_policy
from tests.stages.conftest import tiny_config
from tests.stages.fakes import Killed, MemoryTracker
from tests.stages.test_online import DyingTracker
from tests.stages.test_stages import SHORT, House

OPTIMIZER = {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0}
LORA = {"rank": 3, "alpha": 6.0, "target_modules": ["q_proj", "down_proj"]}
ONLINE: dict[str, Any] = {
    "num_steps": 3,
    "prompts_per_step": 4,
    "group_size": 4,
    "micro_batch_tokens": 256,
    "sampling": {"max_completion_tokens": 12},
    "max_truncated_fraction": 1.0,
    "checkpoint_every": 1,
    "trace": {"every": 1, "num_groups": 4},
}
PPO = {"optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "grpo": {"optimizer": OPTIMIZER, "kl_coef": 0.1}},
    "grpo_free": {"algorithm": "grpo", "grpo": {"optimizer": OPTIMIZER, "kl_coef": 0.0}},
    "rloo": {"algorithm": "rloo", "rloo": {"optimizer": OPTIMIZER}},
    "ppo": {"algorithm": "ppo", "ppo": PPO},
    "ppo_shared": {"algorithm": "ppo", "ppo": {**PPO, "critic": "shared"}},
    "dpo": {
        "algorithm": "dpo",
        "dpo": {
            "optimizer": OPTIMIZER,
            "max_length": 64,
            "batch_size": 16,
            "micro_batch_tokens": 256,
            "checkpoint_every": 1,
            "log_every": 1,
        },
    },
}
MODELS = {"grpo": 1, "grpo_free": 1, "rloo": 1, "ppo": 2, "ppo_shared": 1, "dpo": 1}
"""Models in memory with adapters: the policy, and a separate critic."""
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", list(ALGORITHMS))
REWARD = RewardConfig(verifier=VerifierConfig(function="tests.stages.test_online:count_fours"))
SEQUENCES = Sequences([[3, 4, 5], [6, 7]], [[8, 9, 10], [4, 5, 6, 7]])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


def sft(house: House) -> PolicyCheckpoint:
    return house.sft(num_epochs=4)


def request(house: House, algorithm: str, lora: Any = LORA, **changes: Any) -> TrainRLRequest:
    section = "dpo" if algorithm == "dpo" else "online"
    config = {"online": ONLINE, **ALGORITHMS[algorithm]}
    config[section] = {**config[section], "lora": lora, **changes}
    online = section == "online"
    return TrainRLRequest(
        runtime=house.runtime,
        seed=0,
        config=RLConfig.model_validate(config).chosen(),
        policy=sft(house),
        prompts=house.prompts() if online else None,
        reward=REWARD if online else None,
        rollout=RolloutConfig() if online else None,
        preferences=None if online else house.pairs("preferences", 60),
    )


@dataclass(frozen=True)
class Run:
    """What a stage came to."""

    content: Path
    artifact: PolicyCheckpoint
    lines: list[tuple[int, dict[str, float]]]
    run_dir: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.content / "model.safetensors")

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return max((self.run_dir / "checkpoints").glob("step-*"))


def run(order: StageRequest, run_dir: Path, tracker: MemoryTracker | None = None) -> Run:
    tracker = tracker or MemoryTracker()
    order = order.model_copy(update={"fingerprint": fingerprint(order)})
    artifact: Any = run_stage(order, run_dir=run_dir, tracker=tracker)  # type: ignore[arg-type]
    return Run(run_dir / "content", artifact, tracker.lines, run_dir)


def logprobs(model: PreTrainedModel) -> Tensor:
    return all_completion_logprobs(model.eval(), SEQUENCES, 4, 64, 1.0)


@EVERY_ALGORITHM
def test_only_adapters_are_trained_and_a_plain_model_comes_out(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    found = run(request(house, algorithm), tmp_path)
    before = load_file(house.folder(sft(house)) / "model.safetensors")
    assert found.weights.keys() == before.keys()
    assert found.artifact.num_parameters == sft(house).num_parameters
    for name, value in found.weights.items():
        if "q_proj" not in name and "down_proj" not in name:
            assert torch.equal(value, before[name]), name
            continue
        singular = torch.linalg.svdvals(value.double() - before[name].double())
        assert singular[0] > 1e-3, name
        assert singular[3:].max() < 1e-5, name
    # The adapted model as it was trained, rebuilt from the base and the last checkpoint.
    policy = load_policy(house.folder(sft(house)), CPU)
    plain = logprobs(policy)
    add_adapters(policy, LoRAConfig.model_validate(LORA), section="rl.online.lora", seed=9)
    name = "model" if algorithm == "dpo" else "policy"
    adapters = load_file(found.checkpoint / f"{name}.safetensors")
    assert adapters.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    assert not policy.load_state_dict(adapters, strict=False).unexpected_keys
    adapted = logprobs(policy)
    assert logprobs(load_policy(found.content, CPU)) == pytest.approx(adapted, abs=1e-5)
    assert (adapted - plain).abs().max() > 1e-2
    first, last = dict(found.lines)[1], found.lines[-1][1]
    if algorithm == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert last["loss"] < first["loss"] - 0.001
        assert last["reward/margin"] > 0
    else:
        assert first["kl/mean"] == pytest.approx(0, abs=1e-5)
        assert abs(last["kl/mean"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "ppo_shared"])
def test_the_reward_rises(house: House, tmp_path: Path, algorithm: str) -> None:
    lora = {**LORA, "target_modules": "all-linear"}
    # Every prompt in every batch.
    changes = {"num_steps": 16, "prompts_per_step": 12, "micro_batch_tokens": 2048}
    found = run(request(house, algorithm, lora, **changes), tmp_path)
    rewards = [line["reward/mean"] for _, line in found.lines]
    assert sum(rewards[-4:]) > 1.5 * sum(rewards[:4])


@pytest.mark.parametrize("algorithm", ["grpo", "grpo_free", "ppo", "ppo_shared"])
def test_the_reference_is_the_sft_policy_to_the_end(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    found = run(request(house, algorithm), tmp_path)
    rows = pq.read_table(found.content / TRACES_FILE).to_pylist()
    reference = load_policy(house.folder(sft(house)), CPU)
    prompts = {r["prompt"] for r in rows}
    tokenizer = models.load_tokenizer(house.folder(sft(house)))
    ids = {text: tokenizer(text).input_ids for text in prompts}
    num_moved = 0
    for (step, *_), group in groupby(rows, lambda r: (r["step"], r["group"], r["sample"])):
        own = list(group)
        completion = [r["token_id"] for r in own]
        sequence = torch.tensor([ids[own[0]["prompt"]] + completion])
        with torch.no_grad():
            logits = reference(sequence).logits[0, -len(completion) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        known = torch.tensor([r["ref_logprob"] for r in own])
        assert known == pytest.approx(expected, abs=1e-5)
        old = torch.tensor([r["old_logprob"] for r in own])
        if step == 1:
            assert old == pytest.approx(expected, abs=1e-5)
        else:
            num_moved += int((old - expected).abs().max() > 1e-3)
    assert num_moved > 10


@EVERY_ALGORITHM
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_no_second_model_is_loaded(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, lora: Any
) -> None:
    order = request(house, algorithm, lora)
    loaded: Counter[str] = Counter()
    load = models._load

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded[cls.__name__] += 1
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(models, "_load", counted)
    run(order, tmp_path)
    own_reference = lora is None and algorithm != "dpo"
    assert loaded.total() == MODELS[algorithm] + own_reference
    assert loaded["AutoModelForCausalLM"] == 1 + own_reference


@pytest.mark.parametrize(("algorithm", "all_of_it"), [("ppo", True), ("ppo_shared", False)])
def test_a_separate_critic_trains_all_its_weights_and_a_shared_one_its_head(
    house: House, tmp_path: Path, algorithm: str, all_of_it: bool
) -> None:
    found = run(request(house, algorithm), tmp_path)
    critic = load_file(found.checkpoint / "critic.safetensors")
    if not all_of_it:
        assert critic.keys() == {"score.weight", "score.bias"}
        assert critic["score.weight"].any()
        return
    before = load_file(house.folder(sft(house)) / "model.safetensors")
    for name, value in critic.items():
        assert "lora" not in name
        if name in before:
            assert not torch.equal(value, before[name]), name
    assert len(critic.keys() & before.keys()) == len(before)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo_shared", "dpo"])
def test_killed_and_resumed_is_the_same_folder_to_the_bit(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    order = request(house, algorithm, {**LORA, "target_modules": "all-linear"})
    whole = run(order, tmp_path / "whole")
    assert_same_when_cut(order, whole, tmp_path / "cut", [2, 3])


def assert_same_when_cut(order: StageRequest, whole: Run, folder: Path, cuts: list[int]) -> None:
    for die_at in cuts:
        tracker = DyingTracker(die_at)
        run_dir = folder / str(die_at)
        with pytest.raises(Killed):
            run(order, run_dir, tracker)
        tracker.die_at = None
        resumed = run(order, run_dir, tracker)
        assert tracker.resumed == [die_at - 1]
        assert resumed.lines == whole.lines
        for name in ("model.safetensors", "config.json"):
            assert file_digest(resumed.content / name) == file_digest(whole.content / name)


def sft_request(house: House, **changes: Any) -> TrainSFTRequest:
    settings = {"max_steps": 4, "checkpoint_every": 1, "log_every": 1, "optimizer": OPTIMIZER}
    config = {**SHORT, "lora": LORA, **settings, **changes}
    return TrainSFTRequest(
        runtime=house.runtime,
        seed=0,
        model=tiny_config(),
        config=SFTConfig.model_validate(config),
        demonstrations=house.data(
            "demonstrations",
            "prompt_completion",
            "demonstrations",
            count=100,
            seed=1,
            slip_probability=0.3,
            digest_range=[0.0, 1.0],
        ),
    )


def test_sft_resumes_to_the_bit_though_frozen_weights_are_in_no_checkpoint(
    house: House, tmp_path: Path
) -> None:
    order = sft_request(house)
    whole = run(order, tmp_path / "whole")
    assert all("lora_" in name for name in load_file(whole.checkpoint / "model.safetensors"))
    assert_same_when_cut(order, whole, tmp_path / "cut", [2, 4])


@pytest.mark.parametrize("algorithm", ["grpo", "ppo_shared", "dpo"])
def test_micro_batches_do_not_change_the_result(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    """One update, by gradient alone: Adam's first step would blow up differences of rounding."""
    optimizer = {**OPTIMIZER, "betas": (0.0, 0.0), "learning_rate": 1e-3}
    found = []
    for tokens in (48, 4096):
        changes: dict[str, Any] = {"micro_batch_tokens": tokens}
        changes |= {"optimizer": optimizer, "max_steps": 1} if algorithm == "dpo" else {}
        changes |= {"num_steps": 1} if algorithm != "dpo" else {}
        found.append(run(request(house, algorithm, **changes), tmp_path / str(tokens)))
    left, right = (dict(one.lines)[1] for one in found)
    names = ("loss", "reward/margin") if algorithm == "dpo" else ("policy/loss", "kl/mean")
    for name in ("grad_norm", *names):
        assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name


def test_dropout_is_refused_online_and_has_its_place_in_dpo(house: House, tmp_path: Path) -> None:
    lora = {**LORA, "dropout": 0.1}
    with pytest.raises(ValueError, match=r"lora.dropout is 0.1, .*: set it to 0"):
        request(house, "grpo", lora)
    found = run(request(house, "dpo", lora), tmp_path)
    # In the first step the adapters do nothing, with and without dropout.
    assert dict(found.lines)[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_modules_that_are_not_there_are_refused_by_section(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    section = "dpo" if algorithm == "dpo" else "online"
    order = request(house, algorithm, {"target_modules": ["attention"]})
    with pytest.raises(UserError, match=rf"^rl.{section}.lora.target_modules: .*; use all-linear"):
        run(order, tmp_path)
