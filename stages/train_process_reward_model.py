"""Process reward model: right or wrong at the last token of each step."""

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
from schemas.base import UserError
from schemas.requests import TrainProcessRewardModelRequest
from schemas.training import ProcessRewardModelConfig
from stages import heartbeat, supervised
from stages.core.losses import step_cross_entropy
from stages.core.metrics import expected_calibration_error, first_error_f1
from stages.data.records import read_datasets
from stages.forward import Sequences, scores_at
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.memory import tokens_at_once
from stages.models import load_tokenizer, load_with_head, num_parameters, save_model, to_device
from stages.packing import micro_batches
from stages.precision import use_precision, weights_held
from stages.provenance import provenance
from stages.stability import write_audit
from stages.tokenization import labelled_step_ends

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """A solution as token ids, with the position of each step's last token and its label."""

    prompt_ids: list[int]
    completion_ids: list[int]
    step_ends: list[int]
    labels: list[int]


def run(
    request: TrainProcessRewardModelRequest, *, run_dir: Path, tracker: Tracker
) -> RewardModelCheckpoint:
    """Train on step labels and evaluate on held-out ones.

    Raises UserError before training if too many records have to be cut, or have no step left.
    """
    config = request.config
    store = Store(request.runtime.store)
    folder = store.path(request.policy)
    tokenizer = load_tokenizer(folder)
    separator = request.step_separator
    records = read_datasets(store, request.step_labels)
    examples, num_truncated = encode(records, tokenizer, separator, config.max_length)
    held_out, _ = encode(
        read_datasets(store, [request.held_out]), tokenizer, separator, config.max_length
    )
    supervised.refuse_truncation(
        "step records",
        num_truncated,
        len(examples),
        config.max_truncated_fraction,
        config.max_length,
    )
    device = resolve_device(request.runtime.device)
    model = to_device(load_with_head(folder, "process", request.seed), device)
    use_precision(model, config.precision)
    use_gradient_checkpointing(model, config.gradient_checkpointing, "process_reward_model")
    result = supervised.train(
        model,
        section="process_reward_model",
        record_ids=[str(record["id"]) for record in records],
        micro_losses=lambda indices, max_tokens: micro_losses(
            model, [examples[i] for i in indices], config, max_tokens
        ),
        settings=config,
        seed=request.seed,
        run_dir=run_dir,
        tracker=tracker,
    )
    metrics = evaluate(model, held_out, config.micro_batch_tokens)
    logger.info(
        "held-out step accuracy %.3f, first-error F1 %.3f",
        metrics["step_accuracy"],
        metrics["first_error_f1"],
    )
    tracker.log_metrics({f"held_out/{k}": v for k, v in metrics.items()}, result.num_steps)
    content = run_dir / "content"
    contract = save_model(model, tokenizer, content)
    write_audit(content, {"stability": result.interventions})
    return RewardModelCheckpoint(
        **provenance(request, content),
        kind="process",
        contract=contract,
        pooling="step_end",
        step_separator=separator,
        num_parameters=num_parameters(model),
        num_steps=result.num_steps,
        metrics={
            **metrics,
            "loss": result.metrics["loss"],
            "num_truncated": num_truncated,
            **result.counts,
        },
    )


def encode(
    records: Sequence[dict[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    max_length: int,
) -> tuple[list[Labelled], int]:
    """Labelled solutions, and how many of them were cut to max_length."""
    examples: list[Labelled] = []
    num_truncated = 0
    for record in records:
        steps: list[str] = record["completions"]  # type: ignore[assignment]
        labels = [int(label) for label in record["labels"]]  # type: ignore[attr-defined]
        prompt_ids, completion_ids, ends = labelled_step_ends(
            tokenizer,
            record["prompt"],  # type: ignore[arg-type]
            steps,
            separator,
        )
        room = max_length - len(prompt_ids)
        if len(completion_ids) > room:
            num_truncated += 1
            ends = [end for end in ends if end < room]
            completion_ids = completion_ids[: max(room, 0)]
        if not ends:
            raise UserError(
                f"step record {record['id']} has no step within max_length {max_length}; "
                "raise process_reward_model.max_length, or drop the record"
            )
        examples.append(Labelled(prompt_ids, completion_ids, ends, labels[: len(ends)]))
    return examples, num_truncated


def step_logits(model: PreTrainedModel, examples: Sequence[Labelled]) -> Tensor:
    """Logits of (wrong, right) at each step's last token, [steps of all examples, 2]."""
    sequences = Sequences(
        [example.prompt_ids for example in examples],
        [example.completion_ids for example in examples],
    )
    positions = [
        [len(example.prompt_ids) + end for end in example.step_ends] for example in examples
    ]
    return scores_at(model, sequences, positions)


def micro_losses(
    model: PreTrainedModel,
    examples: Sequence[Labelled],
    config: ProcessRewardModelConfig,
    max_tokens: int,
) -> Iterator[supervised.MicroLoss]:
    """Mean cross entropy over the steps of the optimizer step, by micro-batch."""
    denominator = sum(len(example.labels) for example in examples)
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    for indices in micro_batches(lengths, max_tokens):
        chosen = [examples[i] for i in indices]
        logits = step_logits(model, chosen)
        labels = torch.tensor(
            [label for example in chosen for label in example.labels], device=logits.device
        )
        right = (logits.argmax(1) == labels).sum().item()
        yield supervised.MicroLoss(
            step_cross_entropy(logits, labels).sum() / denominator,
            {"train/step_accuracy": right / denominator},
        )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, examples: Sequence[Labelled], max_tokens: int | None
) -> dict[str, float]:
    """Held-out step accuracy, first-error F1 (ProcessBench) and calibration."""
    probabilities: list[Tensor] = [torch.empty(0)] * len(examples)
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    with weights_held(model):
        for indices in micro_batches(lengths, tokens_at_once(max_tokens, model)):
            heartbeat.beat(f"evaluating on {len(examples)} held-out step records")
            chosen = [examples[i] for i in indices]
            right = step_logits(model, chosen).softmax(-1)[:, 1].cpu()
            sizes = [len(example.labels) for example in chosen]
            for index, own in zip(indices, right.split(sizes), strict=True):
                probabilities[index] = own
    flat = torch.cat(probabilities)
    labels = torch.tensor([label for example in examples for label in example.labels])
    first = first_error_f1(
        [_first_wrong((own > 0.5).int().tolist()) for own in probabilities],
        [_first_wrong(example.labels) for example in examples],
    )
    return {
        "step_accuracy": ((flat > 0.5).int() == labels).float().mean().item(),
        "first_error_f1": first["f1"],
        "first_error_accuracy_erroneous": first["accuracy_erroneous"],
        "first_error_accuracy_correct": first["accuracy_correct"],
        "calibration_error": expected_calibration_error(flat, labels.float()),
        "num_steps": float(labels.numel()),
        "num_solutions": float(len(examples)),
    }


def _first_wrong(labels: Sequence[int]) -> int:
    """Index of the first 0, or -1."""
    return next((index for index, label in enumerate(labels) if label == 0), -1)
