"""The online loop, with the real engine on a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from schemas.base import UserError
from schemas.rewards import RewardConfig
from schemas.rl import RLConfig, RolloutConfig
from stages import memory, termination
from stages.adapters import add_adapters
from stages.models import load_policy, load_with_head
from stages.rewards.composition import Rewarder
from stages.rewards.verifiers import build_verifier
from stages.rl import online
from stages.rl.algorithms import online_algorithm
from stages.rl.guards import Guards
from stages.rl.held_out import split_held_out
from stages.rl.rollouts import PromptRecord, PromptStream, Sampler
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout, RolloutEngine
from stages.shared_critic import Critic, SharedCritic
from stages.tokenization import decode
from tests.stages.fakes import Killed, MemoryTracker

OPTIMIZER = {"learning_rate": 1e-3, "schedule": "constant"}
ONLINE: dict[str, Any] = {
    "num_steps": 4,
    "prompts_per_step": 3,
    "group_size": 4,
    "micro_batch_tokens": 128,
    "sampling": {"temperature": 1.0, "max_completion_tokens": 12},
    "checkpoint_every": 2,
    "max_truncated_fraction": 1.0,
    "trace": {"every": 2},
}
PPO = {
    "optimizer": OPTIMIZER,
    "critic_optimizer": OPTIMIZER,
    "critic_warmup_steps": 1,
    "kl_target": 1.0,
    "kl_horizon": 100,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "grpo": {"optimizer": OPTIMIZER, "kl_coef": 0.1}},
    "rloo": {"algorithm": "rloo", "rloo": {"optimizer": OPTIMIZER}},
    "ppo": {"algorithm": "ppo", "ppo": PPO},
    "ppo_shared": {"algorithm": "ppo", "ppo": {**PPO, "critic": "shared"}},
}
LORA = "_lora"
"""Behind the name of an algorithm: only adapters are trained, and there is no second model."""
ADAPTED = [f"{algorithm}{LORA}" for algorithm in ("grpo", "ppo", "ppo_shared")]
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", [*ALGORITHMS, *ADAPTED])


def count_fours(completion: str, answer: str) -> float:
    """A reward with variance even for a model that knows nothing."""
    return completion.count("4") / 12


REWARD = RewardConfig.model_validate(
    {
        "verifier": {"function": "tests.stages.test_online:count_fours"},
        "process": {"weight": 0.5, "credit": "steps"},
    }
)


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[PromptRecord]:
    texts = ["1+2=", "4-1+7=", "9-9=", "5+5+5=", "8-2="]
    return [
        PromptRecord({"id": t, "prompt": t, "answer": "0"}, tokenizer(t).input_ids) for t in texts
    ]


def rewarder(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Rewarder:
    assert REWARD.verifier is not None
    return Rewarder(
        REWARD,
        tokenizer,
        verifier=build_verifier(REWARD.verifier),
        outcome=None,
        process=load_with_head(folder, "process", seed=1).eval(),
        step_separator="\n",
        max_tokens=256,
    )


class DyingTracker(MemoryTracker):
    """Kills the stage when it reports a step, before the checkpoint of that step."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.die_at = die_at

    def log_metrics(self, metrics: Any, step: int) -> None:
        super().log_metrics(metrics, step)
        if step == self.die_at:
            raise Killed


def rl_config(algorithm: str, **changes: Any) -> RLConfig:
    online = {**ONLINE, **changes}
    if algorithm.endswith(LORA):
        online["lora"] = {"rank": 4}
    settings = ALGORITHMS[algorithm.removesuffix(LORA)]
    return RLConfig.model_validate({**settings, "online": online})


def traces_of(run_dir: Path) -> dict[str, Any]:
    folder = run_dir / "traces"
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("step-*.parquet"))}


def train(
    tiny: tuple[Any, PreTrainedTokenizerBase],
    folder: Path,
    run_dir: Path,
    tracker: MemoryTracker,
    algorithm: str,
    wrap: Callable[[RolloutEngine], RolloutEngine] = lambda engine: engine,
    *,
    engine_is_exact: bool = True,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], online.OnlineResult | None]:
    _, tokenizer = tiny
    config = rl_config(algorithm, **changes)
    assert config.online is not None
    device = torch.device("cpu")
    functions = online_algorithm(config)
    policy = load_policy(folder, device)
    critic: Critic | None = None
    if functions.critic is not None and functions.critic.shared_weight is not None:
        critic = SharedCritic(policy)
    elif functions.critic is not None:
        critic = load_with_head(folder, "value", seed=0)
    if config.online.lora is None:
        reference = load_policy(folder, device).eval()
    else:
        reference = add_adapters(policy, config.online.lora, section="rl.online.lora", seed=0)
    models = online.Models(policy, reference, critic)
    engine = build_engine(
        RolloutConfig(max_batch_size=5),
        model=policy,
        model_folder=folder,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        while_training=config.online.max_policy_lag > 0,
    )
    try:
        result = online.train(
            models,
            functions,
            wrap(engine),
            rewarder(tokenizer, folder),
            *split_held_out(prompts(tokenizer), config.online.stability.held_out),
            config.online,
            decode=partial(decode, tokenizer),
            engine_is_exact=engine_is_exact and config.online.max_policy_lag == 0,
            seed=3,
            run_dir=run_dir,
            tracker=tracker,
        )
    except Killed:
        return dict(policy.state_dict()), None
    return dict(policy.state_dict()), result


@EVERY_ALGORITHM
@pytest.mark.parametrize("lag", [0, 1])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str, lag: int
) -> None:
    whole = MemoryTracker()
    lagging = partial(train, max_policy_lag=lag)
    expected, _ = lagging(tiny, tiny_folder, tmp_path / "whole", whole, algorithm)
    lags = [metrics["rollouts/policy_lag"] for _, metrics in whole.lines]
    assert lags == [0.0, lag, lag, lag]
    traces = traces_of(tmp_path / "whole")
    assert list(traces) == [f"step-{step:08d}.parquet" for step in (1, 3, 4)]
    for die_at in (3, 4):
        run_dir = tmp_path / f"cut-{die_at}"
        cut = DyingTracker(die_at)
        _, nothing = lagging(tiny, tiny_folder, run_dir, cut, algorithm)
        assert nothing is None
        cut.die_at = None
        weights, result = lagging(tiny, tiny_folder, run_dir, cut, algorithm)
        assert result is not None
        assert result.resumed_from_step == 2
        assert cut.lines == whole.lines
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        found = traces_of(run_dir)
        assert found.keys() == traces.keys()
        assert all(found[name].equals(traces[name], check_metadata=True) for name in traces)


class SpyEngine:
    """Keeps, of a native engine, every weight it was given and every rollout it drew."""

    def __init__(self, engine: RolloutEngine, before: Callable[[int], None]) -> None:
        self.engine = engine
        self.before = before
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.drawn: list[list[Rollout]] = []

    def generate(self, prompt_ids: Any, sampling: Any, *, num_samples: int, seed: int) -> Any:
        self.before(len(self.drawn))
        found = self.engine.generate(prompt_ids, sampling, num_samples=num_samples, seed=seed)
        self.drawn.append(found)
        return found

    def update_weights(self, policy: Any, version: int) -> None:
        self.weights[version] = {n: v.detach().clone() for n, v in policy.named_parameters()}
        self.engine.update_weights(policy, version)

    def report(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.engine.close()


def test_a_lagging_batch_is_drawn_while_the_policy_trains_by_the_weights_before(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    logged = [threading.Event() for _ in range(5)]

    class Tracker(MemoryTracker):
        def log_metrics(self, metrics: Any, step: int) -> None:
            super().log_metrics(metrics, step)
            logged[step].set()

    def before(batch: int) -> None:
        # Batches 1 to 3 wait for the end of the step that they are drawn beside: were they drawn
        # before or after it, nothing would ever be logged.
        if batch:
            assert logged[batch].wait(60)

    spies: list[SpyEngine] = []

    def spy(engine: RolloutEngine) -> SpyEngine:
        spies.append(SpyEngine(engine, before))
        return spies[0]

    train(
        tiny,
        tiny_folder,
        tmp_path,
        Tracker(),
        "grpo",
        wrap=spy,
        max_policy_lag=1,
        checkpoint_every=4,
    )
    weights, drawn = spies[0].weights, spies[0].drawn
    assert [{r.policy_version for r in batch} for batch in drawn] == [{0}, {0}, {1}, {2}]
    assert not torch.equal(*(weights[v]["model.embed_tokens.weight"] for v in (0, 1)))
    model = load_policy(tiny_folder, torch.device("cpu")).eval()
    for batch in drawn:
        model.load_state_dict(weights[batch[0].policy_version], strict=False)
        for rollout in batch[::5]:
            with torch.no_grad():
                logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits
            logprobs = logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(1)
            assert rollout.rollout_logprobs == pytest.approx(own.tolist(), abs=1e-5)


def test_rollouts_of_a_version_that_was_not_asked_for_are_refused(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    class Stale(SpyEngine):
        def update_weights(self, policy: Any, version: int) -> None:
            super().update_weights(policy, 0)

    with pytest.raises(AssertionError, match=r"step 1 was given rollouts of .* versions \[0\]"):
        train(
            tiny,
            tiny_folder,
            tmp_path,
            MemoryTracker(),
            "grpo",
            wrap=lambda engine: Stale(engine, lambda batch: None),
        )


def test_traces_do_not_change_the_weights(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    kept, _ = train(tiny, tiny_folder, tmp_path / "kept", MemoryTracker(), "ppo", num_steps=2)
    off, _ = train(
        tiny,
        tiny_folder,
        tmp_path / "off",
        MemoryTracker(),
        "ppo",
        num_steps=2,
        trace={"num_groups": 0},
    )
    assert traces_of(tmp_path / "off") == {}
    assert all(torch.equal(kept[name], off[name]) for name in kept)


@EVERY_ALGORITHM
def test_micro_batches_do_not_change_the_first_update(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str
) -> None:
    logged = []
    for tokens in (32, 4096):
        tracker = MemoryTracker()
        train(
            tiny,
            tiny_folder,
            tmp_path / str(tokens),
            tracker,
            algorithm,
            num_steps=2,
            micro_batch_tokens=tokens,
        )
        logged.append(dict(tracker.lines)[2])
    for name in ("policy/loss", "grad_norm", "entropy", "reward/mean"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("group_size", "tokens"),
    # Prompts of 4, 6, 4, 6 and 4 tokens: 8 times their mean, if a group shares one.
    [(4, 38), (1, 16)],
)
def test_micro_batches_grow_with_the_prompts_that_groups_share(
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group_size: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(memory, "_FEWEST", 16)
    monkeypatch.setattr(memory, "_ENOUGH", 16)
    settings = {"num_steps": 1, "group_size": group_size, "micro_batch_tokens": None}
    train(
        tiny,
        tiny_folder,
        tmp_path,
        MemoryTracker(),
        "rloo" if group_size > 1 else "ppo",
        **settings,
    )
    kept = json.loads((tmp_path / "micro_batch_tokens.json").read_text(encoding="utf-8"))
    assert kept == {"tokens": tokens}


@EVERY_ALGORITHM
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_an_engine_with_small_differences_changes_little(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str, num_epochs: int
) -> None:
    """With one step a batch the old log-probabilities are the step's own; else a pass makes them.

    The engine here is exact, so that all three ways must agree.
    """
    logged = []
    for exact in (True, False):
        tracker = MemoryTracker()
        folder = tmp_path / str(exact)
        train(
            tiny,
            tiny_folder,
            folder,
            tracker,
            algorithm,
            engine_is_exact=exact,
            num_steps=2,  # a critic warms up in the first
            num_epochs=num_epochs,
        )
        logged.append(dict(tracker.lines)[2])
    for name in ("policy/loss", "grad_norm", "ratio/clip_fraction", "mismatch_kl"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-3, abs=1e-5), name


def test_the_critic_warms_up_before_the_policy_moves(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    tracker = MemoryTracker()
    train(tiny, tiny_folder, tmp_path, tracker, "ppo")
    first, second, third = (dict(tracker.lines)[step] for step in (1, 2, 3))
    assert "policy/loss" not in first
    assert "critic/loss" in first
    assert "policy/loss" in second
    assert first["kl/mean"] == pytest.approx(0.0, abs=1e-4)
    assert second["kl/mean"] == pytest.approx(0.0, abs=1e-4)
    assert third["kl/mean"] != pytest.approx(0.0, abs=1e-4)


def test_a_shared_critic_warms_up_without_moving_the_backbone(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    before = load_policy(tiny_folder, torch.device("cpu")).state_dict()
    warm, _ = train(
        tiny, tiny_folder, tmp_path / "warm", MemoryTracker(), "ppo_shared", num_steps=1
    )
    assert all(torch.equal(warm[name], before[name]) for name in before)
    # The head did move: it speaks in the second step.
    tracker = MemoryTracker()
    train(tiny, tiny_folder, tmp_path / "on", tracker, "ppo_shared", num_steps=2)
    trace = traces_of(tmp_path / "on")["step-00000002.parquet"]
    assert any(trace["value"].to_pylist())
    assert "policy/loss" in dict(tracker.lines)[2]
    assert dict(tracker.lines)[1]["critic/grad_norm"] > 0


def test_every_metric_has_its_name(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    train(tiny, tiny_folder, tmp_path, tracker, "ppo", num_steps=2)
    assert {
        "reward/mean",
        "reward/std",
        "reward/verifier",
        "reward/process",
        "kl/mean",
        "ratio/clip_fraction",
        "entropy",
        "critic/explained_variance",
        "credit/mode",
        "groups/zero_variance_fraction",
        "completions/length",
        "completions/truncated_fraction",
        "completions/num_steps",
        "mismatch_kl",
    } <= dict(tracker.lines)[2].keys()


def test_several_epochs_and_mini_batches_move_the_ratio(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    tracker = MemoryTracker()
    train(
        tiny, tiny_folder, tmp_path, tracker, "grpo", num_epochs=3, num_mini_batches=3, num_steps=2
    )
    line = dict(tracker.lines)[2]
    # The first mini-batch is on policy; later ones are not, and some are clipped.
    assert line["mismatch_kl"] < 1e-6
    assert 0 < line["ratio/clip_fraction"] < 1


def test_too_many_cut_completions_stop_the_stage(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"reached the limit of 1 tokens.*raise max_completion"):
        train(
            tiny,
            tiny_folder,
            tmp_path,
            MemoryTracker(),
            "grpo",
            sampling={"max_completion_tokens": 1},
            max_truncated_fraction=0.5,
        )


@EVERY_ALGORITHM
def test_a_batch_without_a_trained_token_stops_the_stage(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str
) -> None:
    with pytest.raises(UserError, match=r"left out of the loss.*raise .*max_completion_tokens"):
        train(
            tiny,
            tiny_folder,
            tmp_path,
            MemoryTracker(),
            algorithm,
            sampling={"max_completion_tokens": 1},
            mask_truncated=True,
            trace={"num_groups": 0},
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl": 1e-6}, r"nats a sequence away.*max_kl 1e-06 .*: raise kl_coef"),
        ({"min_entropy": 100.0}, r"entropy fell to .*min_entropy 100.0 .*: it no longer explores"),
    ],
)
def test_a_policy_that_runs_away_stops_the_stage(
    tiny: Any, tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tracker = MemoryTracker()
    with pytest.raises(UserError, match=message):
        train(tiny, tiny_folder, tmp_path, tracker, "rloo", **changes)
    assert tracker.lines  # the number is on the curve


def test_groups_without_variance_stop_the_stage_after_a_while() -> None:
    config = rl_config("grpo", patience=3).online
    assert config is not None
    line = {"kl/mean": 0.0, "entropy": 1.0}
    flat, varied = ({"groups/zero_variance_fraction": share} | line for share in (1.0, 0.9))
    guards = Guards(config, compares_groups=True)
    for metrics in (flat, flat, varied, flat, flat):
        guards.check(metrics)
    resumed = Guards(config, True, list(guards.flat_fractions))
    with pytest.raises(UserError, match=r"100% of the groups of the last 3 steps had no variance"):
        resumed.check(flat)
    with_critic = Guards(config, compares_groups=False)
    for _ in range(5):
        with_critic.check(flat)


def test_sigterm_leaves_a_checkpoint(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = train(tiny, tiny_folder, tmp_path / "whole", MemoryTracker(), "rloo")
    monkeypatch.setattr(termination, "requested", lambda: True)
    with pytest.raises(termination.Terminated, match="after step 1 of 4"):
        train(tiny, tiny_folder, tmp_path / "cut", MemoryTracker(), "rloo")
    monkeypatch.setattr(termination, "requested", lambda: False)
    weights, result = train(tiny, tiny_folder, tmp_path / "cut", MemoryTracker(), "rloo")
    assert result is not None
    assert result.resumed_from_step == 1
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


class ScriptedEngine:
    """Answers with one token, the same for each completion of a prompt unless told otherwise."""

    def __init__(self, varied: set[int]) -> None:
        self.varied = varied
        self.calls: list[int] = []

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Any, *, num_samples: int, seed: int
    ) -> list[Rollout]:
        self.calls.append(len(prompt_ids))
        four, five = 7, 8
        return [
            Rollout(
                list(ids),
                [four if sample == 0 and next(iter(ids)) in self.varied else five],
                [-1.0],
                "stop",
                0,
                index,
            )
            for index, ids in enumerate(prompt_ids)
            for sample in range(num_samples)
        ]

    def update_weights(self, policy: Any, version: int) -> None: ...

    def report(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def test_dynamic_sampling_replaces_flat_groups(tiny: Any, tiny_folder: Path) -> None:
    _, tokenizer = tiny
    config = RLConfig.model_validate({**ALGORITHMS["grpo"], "online": ONLINE}).online
    assert config is not None
    own = [PromptRecord({"answer": "0"}, [n]) for n in range(20)]
    reward = RewardConfig.model_validate({"verifier": REWARD.verifier})
    assert reward.verifier is not None
    scorer = Rewarder(
        reward,
        tokenizer,
        verifier=build_verifier(reward.verifier),
        outcome=None,
        process=None,
        step_separator="\n",
        max_tokens=256,
    )
    order = PromptStream(own, seed=0).take(20)
    varied = {order[1].prompt_ids[0], order[4].prompt_ids[0]}
    engine = ScriptedEngine(varied)
    stream = PromptStream(own, seed=0)
    found = Sampler(engine, scorer, stream, config, 2).sample(seed=0)
    # Of prompts 0, 1, 2 only 1 varies; 3 and 4 replace 0 and 2, and 4 varies; 5 replaces 3 in vain.
    assert engine.calls == [3, 2, 1]
    assert found.num_zero_variance_groups == 2
    assert found.num_replaced_groups == 3
    assert stream.position == 6
    drawn = [rollout.prompt_ids[0] for rollout in found.rollouts[::4]]
    assert drawn == [order[5].prompt_ids[0], order[1].prompt_ids[0], order[4].prompt_ids[0]]
    assert [rollout.prompt_index for rollout in found.rollouts] == [0] * 4 + [1] * 4 + [2] * 4
    assert found.rewards.total.tolist() == pytest.approx(
        [0] * 4 + [1 / 12, 0, 0, 0] + [1 / 12, 0, 0, 0]
    )
