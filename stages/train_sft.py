"""Supervised fine-tuning: cross entropy on the tokens that the assistant writes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infra.devices import resolve_device
from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import PolicyCheckpoint
from schemas.base import UserError
from schemas.requests import TrainSFTRequest
from schemas.training import SFTConfig
from stages import supervised
from stages.adapters import add_adapters, merge
from stages.data.records import read_records
from stages.forward import hidden_states
from stages.fused_head import mean_cross_entropy_at
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.models import load_base, max_positions, num_parameters, save_model, to_device
from stages.packing import micro_batches, pack
from stages.precision import use_precision
from stages.provenance import provenance
from stages.stability import write_audit
from stages.tokenization import encode_messages, encode_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are trained on."""

    input_ids: list[int]
    trainable: list[bool]


def run(request: TrainSFTRequest, *, run_dir: Path, tracker: Tracker) -> PolicyCheckpoint:
    """Fine-tune the base model on demonstrations.

    Raises UserError before training for records without a trainable token, too many cut records,
    a missing chat template, or a max_length beyond the model's context.
    """
    config = request.config
    store = Store(request.runtime.store)
    model, tokenizer = load_base(request.model, request.seed)
    if config.max_length > max_positions(model):
        raise UserError(
            f"sft.max_length is {config.max_length}, but the model's context holds "
            f"{max_positions(model)} tokens: lower it"
        )
    records = read_records(store.path(request.demonstrations))
    examples, num_truncated = encode(records, tokenizer, config)
    to_device(model, resolve_device(request.runtime.device))
    use_precision(model, config.precision)
    use_gradient_checkpointing(model, config.gradient_checkpointing, "sft")
    if config.lora is not None:
        add_adapters(model, config.lora, section="sft.lora", seed=request.seed)
    result = supervised.train(
        model,
        section="sft",
        record_ids=[str(record["id"]) for record in records],
        micro_losses=lambda indices, max_tokens: micro_losses(
            model, [examples[i] for i in indices], config, max_tokens
        ),
        settings=config,
        seed=request.seed,
        run_dir=run_dir,
        tracker=tracker,
    )
    content = run_dir / "content"
    contract = save_model(merge(model), tokenizer, content)
    write_audit(content, {"stability": result.interventions})
    return PolicyCheckpoint(
        **provenance(request, content),
        algorithm="sft",
        contract=contract,
        num_parameters=num_parameters(model),
        num_steps=result.num_steps,
        metrics={
            "loss": result.metrics["loss"],
            "num_records": len(examples),
            "num_truncated": num_truncated,
            "num_trainable_tokens": sum(sum(example.trainable) for example in examples),
            **result.counts,
        },
    )


def encode(
    records: Sequence[dict[str, object]], tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> tuple[list[Example], int]:
    """Examples, and how many were cut to max_length."""
    examples: list[Example] = []
    num_truncated = 0
    empty: list[str] = []
    for record in records:
        example = _example(record, tokenizer)
        if len(example.input_ids) > config.max_length:
            num_truncated += 1
            example = Example(
                example.input_ids[: config.max_length], example.trainable[: config.max_length]
            )
        # The first token of a sequence is predicted from nothing.
        if not any(example.trainable[1:]):
            empty.append(str(record["id"]))
        examples.append(example)
    supervised.refuse_truncation(
        "demonstrations",
        num_truncated,
        len(examples),
        config.max_truncated_fraction,
        config.max_length,
    )
    if empty:
        raise UserError(
            f"{len(empty)} of {len(examples)} demonstrations have no token to train on "
            f"(first: record {empty[0]}): their completion is empty, or lies behind "
            f"sft.max_length {config.max_length}; drop them or raise the limit"
        )
    return examples, num_truncated


def micro_losses(
    model: PreTrainedModel, examples: Sequence[Example], config: SFTConfig, max_tokens: int
) -> Iterator[supervised.MicroLoss]:
    """Mean cross entropy over the trainable tokens of the optimizer step, by micro-batch."""
    denominator = sum(sum(example.trainable[1:]) for example in examples)
    lengths = [len(example.input_ids) for example in examples]
    for indices in micro_batches(lengths, max_tokens):
        chosen = [examples[i] for i in indices]
        ids = [example.input_ids for example in chosen]
        batch = pack([[]] * len(ids), ids, device=model.device)
        flat = [
            (start + t - 1, example.input_ids[t])
            for start, example in zip(batch.completion_starts, chosen, strict=True)
            for t in range(1, len(example.input_ids))
            if example.trainable[t]
        ]
        index = torch.tensor(flat, dtype=torch.long, device=model.device)
        hidden = hidden_states(model, batch)
        yield supervised.MicroLoss(
            *mean_cross_entropy_at(model, hidden, index[:, 0], index[:, 1], denominator)
        )


def _example(record: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Example:
    if "messages" in record:
        return Example(*encode_messages(tokenizer, record["messages"]))  # type: ignore[arg-type]
    prompt_ids, completion_ids = encode_pair(
        tokenizer,
        record["prompt"],  # type: ignore[arg-type]
        record["completion"],  # type: ignore[arg-type]
    )
    return Example(
        prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)
    )
