"""Side by side with TRL: the same model and batch, TRL's own trainers against our own update.

TRL runs from prompts and rewards to the gradient: its trainers score the completions, compute
advantages, reference and old log-probabilities, and the loss; nothing of theirs is typed anew.
Only their sampler is replaced, by the completions of the batch. We run `credit` and `update` of
the online algorithms, and the `micro_losses` of DPO and of the reward model.

Three sets of weights: those of the reference, those that sampled (old), and the current ones, far
enough apart that ratios reach their clips. `make test-trl` runs this in an environment of its own.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from schemas.model import BuiltModel
from schemas.rl import DPOConfig, RLConfig
from schemas.training import RewardModelConfig
from stages import train_reward_model
from stages.character_tokenizer import build_character_tokenizer
from stages.core.losses import bradley_terry_loss
from stages.forward import Sequences, all_completion_logprobs
from stages.memory import TokenBudget
from stages.models import load_policy, load_with_head
from stages.rewards.composition import RewardBreakdown
from stages.rl import dpo
from stages.rl.algorithms import OnlineAlgorithm, online_algorithm
from stages.rl.experience import Experience
from stages.rl.update import Learner, update
from stages.rollout.types import Rollout
from stages.stability import Stability
from stages.train_reward_model import Pair

trl = pytest.importorskip("trl", reason="TRL is not installed here; make test-trl has it")
pytestmark = [pytest.mark.trl, pytest.mark.slow]

REL = 1e-4
GROUP, MAX_COMPLETION = 4, 7
ALPHABET = "0123456789+-=;"
END = 1
PROMPTS = ["1+2=", "10-3+4=", "9="]
# The last group has no variance; 0.5 so that its mean is exact in TRL, too.
REWARDS = [0.0, 1.0, 0.5, 1.0, 0.2, -0.7, 0.9, 0.3, 0.5, 0.5, 0.5, 0.5]
CPU = torch.device("cpu")
OPTIMIZER = {"learning_rate": 1e-3}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_character_tokenizer(BuiltModel(alphabet=ALPHABET))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The reference, as a folder: TRL loads its reference model from there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # logits that differ, as those of a trained model do
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def completions() -> list[list[int]]:
    """Of unequal length, one of them a single token; some end, some are cut."""
    draw = random.Random(0)
    rows = [
        [draw.randint(3, len(ALPHABET) + 2) for _ in range(draw.randint(1, MAX_COMPLETION - 1))]
        for _ in REWARDS
    ]
    return [[*row, END] if i % 3 else row for i, row in enumerate(rows)]


def moved(model: PreTrainedModel, seed: int, by: float) -> None:
    """Take a random step away, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def old_and_new(model: PreTrainedModel) -> tuple[Weights, Weights]:
    """Weights that sampled, and weights a few updates later."""
    model = copy.deepcopy(model)
    moved(model, 1, 0.02)
    old = copy.deepcopy(model.state_dict())
    moved(model, 2, 0.02)
    return old, model.state_dict()


def gradient(model: nn.Module) -> Tensor:
    """All of it, by the parameters' names."""
    parts = dict(model.named_parameters())
    missing = [name for name, p in parts.items() if p.grad is None]
    assert not missing, missing
    return torch.cat([parts[name].grad.flatten() for name in sorted(parts)])  # type: ignore[union-attr]


def assert_agree(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    """Loss, length and direction of the gradient, and the whole of it, each to 1e-4."""
    (loss, grad), (their_loss, their_grad) = ours, theirs
    norm, their_norm = grad.norm().item(), their_grad.norm().item()
    cosine = nn.functional.cosine_similarity(grad, their_grad, dim=0).item()
    distance = (grad - their_grad).norm().item() / their_norm
    print(
        f"\nloss {loss:.6f}, off by {abs(loss / their_loss - 1):.1e}; "
        f"gradient {norm:.6f}, off by {distance:.1e}"
    )
    assert loss == pytest.approx(their_loss, rel=REL)
    assert their_norm > 1e-3  # something to agree on
    assert norm == pytest.approx(their_norm, rel=REL)
    assert cosine > 1 - REL
    assert distance < REL


# Online: GRPO in its variants, RLOO


class KeptGradient:
    """An optimizer that leaves weights and gradients as they are."""

    def clear(self) -> None:
        """Called before anything has been computed."""

    def clip(self) -> float:
        return 0.0

    def step(self, scale: float) -> float:
        return 0.0


def theirs_online(
    trainer_class: Any, arguments: Any, folder: Path, completions: Sequence[Sequence[int]]
) -> tuple[float, Tensor]:
    rows = [{"prompt": PROMPTS[i // GROUP], "score": reward} for i, reward in enumerate(REWARDS)]

    def reward(completions: list[str], score: list[float], **_: Any) -> list[float]:
        return score

    trainer = trainer_class(
        model=str(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
    )
    drawn = [list(row) for row in completions]
    is_grpo = trainer_class is trl.GRPOTrainer
    trainer._generate_single_turn = lambda *_, **__: (drawn, None) if is_grpo else drawn
    trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
    model = trainer.model.train()
    old, new = old_and_new(model)
    model.load_state_dict(old)
    inputs = trainer._generate_and_score_completions(rows)
    model.load_state_dict(new)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), gradient(model)


def ours_online(
    config: RLConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, completions: list[list[int]]
) -> tuple[float, Tensor, float]:
    """Loss, gradient and the share of clipped tokens."""
    assert config.online is not None
    temperature = config.online.sampling.temperature
    prompts = [tokenizer(PROMPTS[i // GROUP]).input_ids for i in range(len(completions))]
    sequences = Sequences(prompts, completions)
    width = max(len(row) for row in completions)
    policy, reference = load_policy(folder, CPU), load_policy(folder, CPU)
    old, new = old_and_new(policy)

    def logprobs(model: PreTrainedModel) -> Tensor:
        return all_completion_logprobs(model, sequences, width, 10_000, temperature)

    policy.load_state_dict(old)
    old_logprobs = logprobs(policy)
    policy.load_state_dict(new)
    scores = torch.tensor(REWARDS)
    experience = Experience(
        rollouts=[
            Rollout(p, c, [0.0] * len(c), "stop" if c[-1] == END else "length", 0, i // GROUP)
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ],
        sequences=sequences,
        rewards=RewardBreakdown(scores, scores, {}),
        group_ids=torch.arange(len(completions)) // GROUP,
        completion_mask=torch.tensor([[t < len(c) for t in range(width)] for c in completions]),
        rollout_logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=logprobs(reference),
    )
    algorithm: OnlineAlgorithm = online_algorithm(config)
    metrics = update(
        Learner(policy, KeptGradient()),  # type: ignore[arg-type]
        experience,
        algorithm.credit(experience, 0),
        algorithm,
        config.online,
        seed=0,
        train_policy=True,
        engine_is_exact=True,
        stability=Stability(config.online.stability, "rl.online.stability"),
        budget=TokenBudget(config.online.micro_batch_tokens, "rl.online"),
        step=1,
        record_ids=lambda rollouts: [],
    )
    return metrics["policy/loss"], gradient(policy), metrics["ratio/clip_fraction"]


def online_config(algorithm: str, settings: dict[str, Any], temperature: float = 1.0) -> RLConfig:
    return RLConfig.model_validate(
        {
            "algorithm": algorithm,
            "online": {
                "prompts_per_step": len(PROMPTS),
                "group_size": GROUP,
                "micro_batch_tokens": 40,  # several micro-batches, against one of TRL's
                "sampling": {
                    "temperature": temperature,
                    "max_completion_tokens": MAX_COMPLETION,
                },
                "max_mismatch_kl": 100.0,
            },
            algorithm: {"optimizer": OPTIMIZER, **settings},
        }
    )


def their_arguments(config_class: Any, tmp_path: Path, settings: dict[str, Any]) -> Any:
    return config_class(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(REWARDS),
        gradient_checkpointing=False,
        **settings,
    )


SYMMETRIC = {"clip_low": 0.2, "clip_high": 0.2}
GRPO_CASES = {
    # name: (what TRL is given, what we are given)
    "trl-default-is-dapo": (
        {"epsilon_high": 0.28, "beta": 0.0},  # loss_type "dapo", scale_rewards "group"
        {"clip_low": 0.2, "clip_high": 0.28},
    ),
    # By default TRL multiplies the KL by the ratio (DeepSeek-V3.2); DeepSeekMath and we do not.
    "grpo-with-kl": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        {**SYMMETRIC, "aggregation": "sequence_mean", "kl_coef": 0.04},
    ),
    "bnpo": ({"loss_type": "bnpo", "beta": 0.0}, SYMMETRIC),
    "dr-grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
        {**SYMMETRIC, "aggregation": "constant", "scale": "none"},
    ),
    "batch-scale": (
        {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.0},
        {**SYMMETRIC, "aggregation": "sequence_mean", "scale": "batch"},
    ),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.01,
            "epsilon_high": 0.02,
            "beta": 0.0,
        },
        {
            "aggregation": "sequence_mean",
            "ratio": "sequence_mean",
            "clip_low": 0.01,
            "clip_high": 0.02,
        },
    ),
    # TRL's epsilon_high is the bound itself here, ours is what it is above 1.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.0},
        {"loss": "cispo", "clip_high": 0.1},
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", list(GRPO_CASES))
def test_grpo(
    case: str,
    temperature: float,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    completions: list[list[int]],
    tmp_path: Path,
) -> None:
    their_settings, our_settings = GRPO_CASES[case]
    arguments = their_arguments(
        trl.GRPOConfig,
        tmp_path,
        {
            "num_generations": GROUP,
            "max_completion_length": MAX_COMPLETION,
            "num_iterations": 2,  # else TRL takes the current log-probabilities for the old ones
            "temperature": temperature,
            **their_settings,
        },
    )
    theirs = theirs_online(trl.GRPOTrainer, arguments, folder, completions)
    config = online_config("grpo", our_settings, temperature)
    *ours, clipped = ours_online(config, folder, tokenizer, completions)
    assert_agree((ours[0], ours[1]), theirs)
    assert 0 < clipped < 1  # the clip was put to the test


def test_rloo(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    completions: list[list[int]],
    tmp_path: Path,
) -> None:
    # Both: k1 in the reward, leave-one-out, ratio of the sequence, mean over sequences.
    arguments = their_arguments(
        trl.RLOOConfig,
        tmp_path,
        {"num_generations": GROUP, "max_completion_length": MAX_COMPLETION, "beta": 0.05},
    )
    theirs = theirs_online(trl.RLOOTrainer, arguments, folder, completions)
    config = online_config("rloo", {"kl_coef": 0.05})
    *ours, clipped = ours_online(config, folder, tokenizer, completions)
    assert_agree((ours[0], ours[1]), theirs)
    assert 0 < clipped < 1


# Preferences: DPO, reward model


@pytest.fixture(scope="module")
def pairs(tokenizer: PreTrainedTokenizerFast, completions: list[list[int]]) -> list[Pair]:
    half = len(completions) // 2
    return [
        Pair(tokenizer(PROMPTS[i % len(PROMPTS)]).input_ids, chosen, rejected)
        for i, (chosen, rejected) in enumerate(
            zip(completions[:half], completions[half:], strict=True)
        )
    ]


def preference_rows() -> Dataset:
    """TRL's trainers want a data set to start; the batch is given to them as token ids."""
    return Dataset.from_list([{"prompt": "1+2=", "chosen": "3", "rejected": "4"}])


DPO_CASES = {
    # name: (what TRL is given, what we are given)
    "sigmoid": ({"loss_type": ["sigmoid"]}, {"loss": "sigmoid"}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss": "hinge"}),
    # TRL's IPO is on the mean log-probability of a token, eq. 17 of the paper is on the sum: ours
    # is the sum unless it is asked for the mean.
    "ipo": ({"loss_type": ["ipo"]}, {"loss": "ipo", "length_normalized": True}),
    "length-normalised": (
        {"loss_type": ["sigmoid_norm"]},
        {"loss": "sigmoid", "length_normalized": True},
    ),
}


@pytest.mark.parametrize("case", list(DPO_CASES))
def test_dpo(
    case: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    tmp_path: Path,
) -> None:
    their_settings, our_settings = DPO_CASES[case]
    beta = 0.5
    policy, reference = load_policy(folder, CPU), load_policy(folder, CPU)
    _, new = old_and_new(policy)

    policy.load_state_dict(new)
    config = DPOConfig.model_validate(
        {
            "optimizer": OPTIMIZER,
            "beta": beta,
            "max_length": 64,
            "micro_batch_tokens": 60,
            **our_settings,
        }
    )
    ref_logprobs = dpo.reference_logprobs(reference, pairs, config)
    loss = 0.0
    for micro in dpo.micro_losses(policy, pairs, ref_logprobs, config, config.micro_batch_tokens):
        micro.loss.backward()
        loss += micro.loss.item()

    trainer = trl.DPOTrainer(
        model=load_policy(folder, CPU),
        ref_model=reference,
        args=their_arguments(trl.DPOConfig, tmp_path, {"beta": beta, **their_settings}),
        processing_class=tokenizer,
        train_dataset=preference_rows(),
    )
    trainer.model.train().load_state_dict(new)
    their_loss = trainer.compute_loss(
        trainer.model, trainer.data_collator([vars(pair) for pair in pairs])
    )
    their_loss.backward()
    assert_agree((loss, gradient(policy)), (their_loss.item(), gradient(trainer.model)))


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.01)])
def test_reward_model(
    margin: float,
    centering: float,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    tmp_path: Path,
) -> None:
    model, their_loss, their_gradient = their_reward_model(
        folder, tokenizer, pairs, tmp_path, [margin] * len(pairs), centering
    )
    config = RewardModelConfig.model_validate(
        {
            "optimizer": OPTIMIZER,
            "margin": margin,
            "centering": centering,
            "max_length": 64,
            "micro_batch_tokens": 60,
        }
    )
    loss = 0.0
    for micro in train_reward_model.micro_losses(model, pairs, config, config.micro_batch_tokens):
        micro.loss.backward()
        loss += micro.loss.item()
    assert_agree((loss, gradient(model)), (their_loss, their_gradient))


def test_reward_model_with_a_margin_for_each_pair(
    folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], tmp_path: Path
) -> None:
    margins = [0.1 * i for i in range(len(pairs))]
    model, their_loss, their_gradient = their_reward_model(
        folder, tokenizer, pairs, tmp_path, margins, 0.0
    )
    chosen, rejected = train_reward_model.score_pairs(model, pairs)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor(margins)).mean()
    loss.backward()
    assert_agree((loss.item(), gradient(model)), (their_loss, their_gradient))


def their_reward_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    tmp_path: Path,
    margins: list[float],
    centering: float,
) -> tuple[PreTrainedModel, float, Tensor]:
    """A fresh model with the same weights, and TRL's loss and gradient."""
    model = load_with_head(folder, "outcome", 0)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trl.RewardTrainer(
        model=copy.deepcopy(model),
        args=their_arguments(
            trl.RewardConfig, tmp_path, {"center_rewards_coefficient": centering or None}
        ),
        processing_class=tokenizer,
        train_dataset=preference_rows(),
    )
    rows = [
        {
            "chosen_ids": pair.prompt_ids + pair.chosen_ids,
            "rejected_ids": pair.prompt_ids + pair.rejected_ids,
            "margin": margin,
        }
        for pair, margin in zip(pairs, margins, strict=True)
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return model, loss.item(), gradient(trainer.model)
