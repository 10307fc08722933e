"""How many tokens a device's memory holds in a training pass, found out before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from infra.memory import free_bytes
from stages.core.logprobs import KEPT_ELEMENTS
from stages.forward import LOGIT_ELEMENTS, hidden_states
from stages.memory import TokenBudget, tokens_at_once
from stages.packing import pack
from stages.precision import compute_dtype
from stages.shared_critic import Critic

_FILE = "micro_batch_tokens.json"
# The rest is for the allocator, which never fills all that it takes.
_SHARE = 0.8
_LENGTH = 96


def fitted_budget(
    asked: int | None,
    section: str,
    models: Sequence[Critic],
    run_dir: Path,
    shared_prompt: float = 0.0,
) -> TokenBudget:
    """As many tokens as are asked for or serve the models best, fewer where memory is short.

    shared_prompt: see `tokens_at_once`.
    models: those that are trained, one after the other. run_dir keeps the result, so that every
    attempt at a stage splits its batches alike. Draws no random number.
    """
    tokens = min(tokens_at_once(asked, model, shared_prompt) for model in models)
    budget = TokenBudget(tokens, section)
    model = models[0]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        each = max(bytes_a_token(model) for model in models)
    left = free_bytes(model.device) - sum(map(_bytes_to_come, models)) - _head_bytes(model, tokens)
    budget.fit(each, max(_SHARE * left, 0.0), run_dir / _FILE)
    return budget


def bytes_a_token(model: Critic) -> float:
    """Memory that a backbone's pass takes for each token of a packed row, at its peak.

    The difference between two rows of one sequence each: what does not grow falls out.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    config = backbone.config.get_text_config()
    long = min(_LENGTH, getattr(config, "max_position_embeddings", _LENGTH))
    short = long // 3
    training = backbone.training
    backbone.train()
    try:
        return (_peak_bytes(model, long) - _peak_bytes(model, short)) / (long - short)
    finally:
        backbone.train(training)


def _peak_bytes(model: Critic, length: int) -> int:
    batch = pack([[]], [[0] * length], device=model.device)
    backbone = cast(PreTrainedModel, model.base_model)
    with torch.enable_grad(), _Alive() as alive:
        hidden = hidden_states(model, batch)
        if backbone.is_gradient_checkpointing:
            # What a layer keeps is made on the way back. Of one weight: none has a gradient then.
            trained = next(weight for weight in backbone.parameters() if weight.requires_grad)
            torch.autograd.grad(hidden.sum(), trained)
        peak: int = alive.peak
    return peak


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        for storage in _storages(out):
            if storage._cdata not in known:  # not a view of what was there
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


def _storages(values: object) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes_to_come(model: nn.Module) -> int:
    """Gradients and moments, and the number format's copies of weights, before the first step."""
    size = sum(
        3 * weight.numel() * weight.element_size()
        for weight in model.parameters()
        if weight.requires_grad
    )
    dtype = compute_dtype(model)
    if dtype != next(model.parameters()).dtype:
        size += sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    return size


def _head_bytes(model: Critic, tokens: int) -> int:
    """Logits: a chunk in two formats, and those that wait for the backward pass."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None:
        return 0
    elements = tokens * int(head.weight.shape[0])
    kept = min(elements, KEPT_ELEMENTS)
    return (2 * min(elements, LOGIT_ELEMENTS) + kept) * torch.float32.itemsize
