"""Outcome reward model: Bradley-Terry on pairs, the score read at the last token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infra.devices import resolve_device
from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import RewardModelCheckpoint
from schemas.requests import TrainRewardModelRequest
from schemas.training import RewardModelConfig
from stages import heartbeat, supervised
from stages.core.losses import bradley_terry_loss
from stages.core.metrics import expected_calibration_error
from stages.data.records import read_datasets
from stages.forward import Sequences, scores_at
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.memory import tokens_at_once
from stages.models import load_tokenizer, load_with_head, num_parameters, save_model, to_device
from stages.packing import micro_batches
from stages.precision import use_precision, weights_held
from stages.provenance import provenance
from stages.stability import write_audit
from stages.tokenization import encode_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One prompt with a chosen and a rejected completion, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def length(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def run(
    request: TrainRewardModelRequest, *, run_dir: Path, tracker: Tracker
) -> RewardModelCheckpoint:
    """Train on preferences and evaluate on held-out pairs.

    Raises UserError before training if too many pairs have to be cut.
    """
    config = request.config
    store = Store(request.runtime.store)
    folder = store.path(request.policy)
    tokenizer = load_tokenizer(folder)
    records = read_datasets(store, request.preferences)
    pairs, num_truncated = encode_pairs(records, tokenizer, config.max_length)
    held_out, _ = encode_pairs(
        read_datasets(store, [request.held_out]), tokenizer, config.max_length
    )
    supervised.refuse_truncation(
        "pairs", num_truncated, len(pairs), config.max_truncated_fraction, config.max_length
    )
    device = resolve_device(request.runtime.device)
    model = to_device(load_with_head(folder, "outcome", request.seed), device)
    use_precision(model, config.precision)
    use_gradient_checkpointing(model, config.gradient_checkpointing, "reward_model")
    result = supervised.train(
        model,
        section="reward_model",
        record_ids=[str(record["id"]) for record in records],
        micro_losses=lambda indices, max_tokens: micro_losses(
            model, [pairs[i] for i in indices], config, max_tokens
        ),
        settings=config,
        seed=request.seed,
        run_dir=run_dir,
        tracker=tracker,
    )
    metrics = evaluate(model, held_out, config.micro_batch_tokens)
    logger.info("held-out pairwise accuracy %.3f", metrics["accuracy"])
    tracker.log_metrics({f"held_out/{k}": v for k, v in metrics.items()}, result.num_steps)
    content = run_dir / "content"
    contract = save_model(model, tokenizer, content)
    write_audit(content, {"stability": result.interventions})
    return RewardModelCheckpoint(
        **provenance(request, content),
        kind="outcome",
        contract=contract,
        pooling="last_token",
        num_parameters=num_parameters(model),
        num_steps=result.num_steps,
        metrics={
            **metrics,
            "loss": result.metrics["loss"],
            "num_truncated": num_truncated,
            **result.counts,
        },
    )


def encode_pairs(
    records: Sequence[dict[str, object]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Pair], int]:
    """Pairs, and how many of them were cut to max_length."""
    pairs: list[Pair] = []
    num_truncated = 0
    for record in records:
        prompt_ids, chosen = encode_pair(tokenizer, record["prompt"], record["chosen"])  # type: ignore[arg-type]
        _, rejected = encode_pair(tokenizer, record["prompt"], record["rejected"])  # type: ignore[arg-type]
        pair = Pair(prompt_ids, chosen, rejected)
        if pair.length() > max_length:
            num_truncated += 1
            room = max_length - len(prompt_ids)
            pair = Pair(prompt_ids, chosen[: max(room, 0)], rejected[: max(room, 0)])
        pairs.append(pair)
    return pairs, num_truncated


def pair_batches(pairs: Sequence[Pair], max_tokens: int) -> Iterator[list[int]]:
    """Indices in micro-batches of at most max_tokens tokens; a pair's prompt counts once."""
    lengths = [
        len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs
    ]
    return micro_batches(lengths, max_tokens)


def score_pairs(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected completions, [_B] each."""
    prompts = [pair.prompt_ids for pair in pairs]
    completions = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    sequences = Sequences(prompts * 2, completions)
    scores = scores_at(model, sequences, [[n - 1] for n in sequences.lengths()])[:, 0]
    return scores[: len(pairs)], scores[len(pairs) :]


def micro_losses(
    model: PreTrainedModel, pairs: Sequence[Pair], config: RewardModelConfig, max_tokens: int
) -> Iterator[supervised.MicroLoss]:
    """Mean Bradley-Terry loss over the pairs of the optimizer step, by micro-batch."""
    for indices in pair_batches(pairs, max_tokens):
        chosen, rejected = score_pairs(model, [pairs[i] for i in indices])
        margin = torch.full_like(chosen, config.margin)
        loss = bradley_terry_loss(chosen, rejected, margin, config.centering).sum()
        right = (chosen > rejected).sum().item()
        yield supervised.MicroLoss(loss / len(pairs), {"train/accuracy": right / len(pairs)})


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int | None
) -> dict[str, float]:
    """Held-out accuracy (a tie counts half), calibration, and the distribution of the scores."""
    gaps = torch.zeros(len(pairs))
    scores: list[Tensor] = []
    with weights_held(model):
        for indices in pair_batches(pairs, tokens_at_once(max_tokens, model)):
            heartbeat.beat(f"evaluating on {len(pairs)} held-out pairs")
            chosen, rejected = score_pairs(model, [pairs[i] for i in indices])
            gaps[indices] = (chosen - rejected).cpu()
            scores += [chosen.cpu(), rejected.cpu()]
    everything = torch.cat(scores)
    # Confidence that the chosen side is the better one, against whether it is (always): folded so
    # that the two classes are balanced.
    confidence = torch.sigmoid(gaps.abs())
    right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    return {
        "accuracy": right.mean().item(),
        "calibration_error": expected_calibration_error(confidence, (gaps > 0).float()),
        "margin/mean": gaps.mean().item(),
        "score/mean": everything.mean().item(),
        "score/std": everything.std().item(),
        "num_pairs": float(len(pairs)),
    }
