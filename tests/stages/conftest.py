"""A tiny model, shared by the tests of the stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.model import BuiltModel, ModelConfig
from stages.models import load_base, save_model
from stages.tasks.arithmetic import ALPHABET

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '+' if m.role == 'user' else '-' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}-{% endif %}"
)


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "alphabet": ALPHABET,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "max_positions": 96,
        **changes,
    }
    return ModelConfig(built=BuiltModel.model_validate(values))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_base(tiny_config(), seed=0)
    with torch.no_grad():
        # Larger weights than at initialisation, so that tokens really differ in probability.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_folder(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(*tiny, folder)
    return folder
