"""Layers that forget what they made and make it again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from transformers import PreTrainedModel

from schemas.base import UserError


def use_gradient_checkpointing(model: PreTrainedModel, wanted: bool, section: str) -> None:
    """Keep only the input of each layer while training, if wanted; sampling is as it was.

    The same operations are done again, with the same random numbers and in the same number format,
    so losses and gradients are the same to the bit. section: place of `gradient_checkpointing` in
    the recipe, for messages. Raises UserError if the model's layers cannot do it.
    """
    if not wanted:
        return
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{section}.gradient_checkpointing is true, but {type(model).__name__} cannot do it: "
            f"set it to false, and {section}.micro_batch_tokens lower if memory runs out"
        ) from error
    # That the embedding's output asks for a gradient is for reentrant checkpoints alone: below
    # adapters, the first layer would compute a gradient that nobody wants.
    model.disable_input_require_grads()
