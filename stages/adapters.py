"""Low-rank adapters (Hu et al. 2021, LoRA) inside a model, which stays the class that it was.

peft puts its layers in place of linear ones, and the model's own weights are frozen: they are what
the model was before, and with the adapters disabled it is that model again, to the bit. So a policy
with adapters is its own reference. Whoever needs plain weights gets them merged, W + scaling * B A,
as new tensors: adding to the weights in place and taking away again would leave rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from schemas.base import UserError
from schemas.training import LoRAConfig

_NAME = "default"


def add_adapters(
    model: PreTrainedModel, config: LoRAConfig, *, section: str, seed: int
) -> PreTrainedModel:
    """Freeze a model and put adapters that do nothing yet into it, drawn from the seed.

    Returns the same model. section: place of the configuration in the recipe, for messages.
    Raises UserError for target modules that the model has not, or that cannot be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    remedy = _remedy(model)
    torch.manual_seed(seed)
    modules = config.target_modules
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
    )
    try:
        inject_adapter_in_model(settings, model, _NAME)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{section}.target_modules: {reason}; {remedy}") from error
    cast_adapter_dtype(model, _NAME)
    problem = _misplaced(model, config)
    if problem:
        raise UserError(f"{section}.target_modules: {problem}; {remedy}")
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was here, and `merge` was not."""
    return hasattr(model, "peft_config")


@contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before it got adapters, without dropout.

    A model without adapters is only put into evaluation mode. Its former mode comes back.
    """
    training = model.training
    layers = [layer for _, layer in _layers(model)]
    model.train(False)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


@torch.no_grad()
def plain_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` of the plain model, in its order, adapters merged; without gradient.

    One weight is merged at a time, into a new tensor; the model stays as it is.
    """
    prefixes = {f"{name}.": layer for name, layer in _layers(model)}
    for name, value in model.named_parameters():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            yield name, value.detach()
            continue
        kind, _, rest = name.removeprefix(prefix).partition(".")
        if kind != "base_layer":
            continue
        merged = _merged(prefixes[prefix]) if rest == "weight" else value.detach()
        yield prefix + rest, merged


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the weights, in place, and take them out; returns the same model."""
    for name, layer in _layers(model):
        plain = layer.get_base_layer()
        plain.weight.copy_(_merged(layer))
        model.set_submodule(name, plain)
    if has_adapters(model):
        del model.peft_config
    return model


def _merged(layer: Any) -> Tensor:
    """W + scaling * B A, in the number format of W."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    update: Tensor = layer.get_delta_weight(_NAME)
    return (weight + update).to(weight.dtype)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with an adapter, by name."""
    if not has_adapters(model):
        return []
    # Importing peft takes seconds, which only its users are to pay.
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]


def _misplaced(model: PreTrainedModel, config: LoRAConfig) -> str | None:
    """What is wrong about the places of the adapters, if anything is."""
    layers = _layers(model)
    if isinstance(config.target_modules, tuple):
        for target in config.target_modules:
            # peft is content if any of them is there.
            if not any(name == target or name.endswith(f".{target}") for name, _ in layers):
                return f"{type(model).__name__} has no module {target}"
    for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name, layer in layers:
            if layer is ends:
                # The head's matrix is applied by hand, and may be the embedding's.
                return f"{name} cannot have an adapter"
    return None


def _remedy(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return f"use all-linear, or some of {', '.join(sorted(linear))}"
