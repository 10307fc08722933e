"""Models in and out: built from a configuration, or Hugging Face folders as they are."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from schemas.artifacts import ModelContract
from schemas.base import UserError
from schemas.model import BuiltModel, ModelConfig
from stages import heartbeat
from stages.character_tokenizer import build_character_tokenizer
from stages.model_files import (
    check_code_is_own,
    check_weight_files,
    code_remedy,
    may_run_code,
    safetensors_remedy,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The loss head is applied to hidden states by hand; models that do more than a matrix product
# there would be scored wrongly.
_UNSUPPORTED_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def load_base(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer. Raises UserError where either cannot be had.

    Code that the model ships runs only if `config.trust_remote_code` lists it; weights are read
    from safetensors or GGUF, never from pickles.
    """
    if config.built is not None:
        return _build(config.built, seed)
    source, options = _locate(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        remedy = "put tokenizer.json and tokenizer_config.json into the folder"
        raise _not_loaded(config, error, "no tokenizer could be loaded", remedy) from error
    weights = {} if config.gguf_file is not None else {"use_safetensors": True}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=_DTYPES[config.dtype], attn_implementation="sdpa", **options, **weights
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(config, error, "could not be loaded") from error
    if config.gguf_file is not None:
        model = _plain_copy(model)
    for loaded in (tokenizer, model):
        _check_opens_without_code(source, loaded)
    _check_head(model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {source}: its tokenizer has no end-of-sequence token; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_policy(folder: Path, device: torch.device) -> PreTrainedModel:
    """A causal model from an artifact's folder (safetensors only)."""
    return to_device(_load(AutoModelForCausalLM, folder), device)


def load_with_head(folder: Path, kind: str, seed: int | None = None) -> PreTrainedModel:
    """A model with a linear head on its backbone.

    kind `outcome`: one score a sequence; `process`: two classes a token; `value`: one number a
    token. With a seed, a head that the folder does not hold is drawn from it; a value head starts
    at 0, so that an untrained critic says nothing.
    """
    num_labels = 2 if kind == "process" else 1
    cls = (
        AutoModelForSequenceClassification if kind == "outcome" else AutoModelForTokenClassification
    )
    if seed is not None:
        torch.manual_seed(seed)
    model = _load(cls, folder, num_labels=num_labels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if kind == "value" and seed is not None:
        head = head_of(model)
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer on the backbone of a model from `load_with_head`, or of a critic."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    raise UserError(f"{type(model).__name__} has no linear head named score or classifier")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an artifact's folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    assert tokenizer.pad_token_id is not None
    return tokenizer


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> ModelContract:
    """Write a plain Hugging Face folder and say what the next stage must agree on."""
    heartbeat.beat("writing the model")
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return contract(model, tokenizer)


def contract(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelContract:
    """What two models must share before the tokens of one mean anything to the other."""
    return ModelContract(
        tokenizer_sha256=hashlib.sha256(_tokenizer_identity(tokenizer).encode()).hexdigest(),
        chat_template_sha256=(
            hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
            if isinstance(tokenizer.chat_template, str)
            else None
        ),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_ids=eos_token_ids(model, tokenizer),
        architecture=type(model).__name__,
        vocab_size=vocabulary_size(model),
        max_positions=max_positions(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def check_contract(name: str, ours: ModelContract, theirs_name: str, theirs: ModelContract) -> None:
    """Raise UserError if two models do not share a tokenizer, a template and an end token."""
    for field in ("tokenizer_sha256", "chat_template_sha256", "pad_token_id", "eos_token_ids"):
        left, right = getattr(ours, field), getattr(theirs, field)
        if left != right:
            raise UserError(
                f"{name} and {theirs_name} disagree on {field}: {left} against {right}; "
                "train both from the same base model"
            )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's, and those of the generation settings."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    configured = generation.eos_token_id if generation is not None else None
    if isinstance(configured, int):
        ids.add(configured)
    elif configured is not None:
        ids.update(configured)
    return tuple(sorted(ids))


def max_positions(model: PreTrainedModel) -> int:
    """Context length in tokens."""
    return int(getattr(model.config, "max_position_embeddings", 0)) or 2**31 - 1


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model.to(device)`, with a type."""
    nn.Module.to(model, device)
    return model


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _build(config: BuiltModel, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = build_character_tokenizer(config)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            initializer_range=config.initializer_range,
        )
    )
    return model, tokenizer


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    if config.hub is not None:
        trusted = may_run_code(config, None)
        options |= {"revision": config.revision, "trust_remote_code": trusted}
        if trusted:
            # Code of the model's own repository, at the commit that was read.
            options["code_revision"] = config.revision
            _check_hub_code(config.hub, config.revision)
        return config.hub, options
    assert config.path is not None
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"model.path {config.path}: there is no such folder")
    if config.gguf_file is None and not (folder / "config.json").is_file():
        raise UserError(f"model.path {folder}: no config.json; it must be a Hugging Face folder")
    if config.gguf_file is not None and not (folder / config.gguf_file).is_file():
        raise UserError(f"model.gguf_file {config.gguf_file}: not in {folder}")
    check_weight_files(config, folder)
    trusted = may_run_code(config, folder)
    return str(folder), options | {"local_files_only": True, "trust_remote_code": trusted}


def _check_hub_code(name: str, revision: str | None) -> None:
    try:
        content, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return  # the loader says what is wrong
    check_code_is_own(f"model.hub {name}", content)


def _not_loaded(config: ModelConfig, error: Exception, what: str, remedy: str = "") -> UserError:
    """The loader's error in our words, with what to do about it."""
    source = config.hub or config.path
    text = str(error)
    if "trust_remote_code" in text:
        return UserError(f"model {source}: {code_remedy(config)}")
    if config.gguf_file is None and "safetensors" in text:
        return UserError(f"model {source}: {safetensors_remedy(str(source))}")
    return UserError(f"model {source}: {what} ({text})" + (f"; {remedy}" if remedy else ""))


def _check_opens_without_code(source: str, loaded: object) -> None:
    """Later stages open what this one saves, and never with code that came with a model."""
    kind = type(loaded)
    if not kind.__module__.startswith("transformers."):
        raise UserError(
            f"model {source}: its own code gives a {kind.__name__}, which transformers does not "
            "have; the stages after SFT load without remote code and could not open it: use a "
            "model whose architecture and tokenizer are part of transformers"
        )


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from GGUF refuses to be saved; the same weights in a fresh one do not."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    copy: PreTrainedModel = fresh.to(model.dtype)
    return copy


def _check_head(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name in _UNSUPPORTED_HEAD:
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(
                f"{type(model).__name__} changes its logits by {name}, which posttrain does not "
                "support; use a model with a plain output head"
            )


def _load(cls: Any, folder: Path, **options: Any) -> PreTrainedModel:
    heartbeat.beat(f"loading the model in {folder}")
    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **options
    )
    # A new head is what we ask for; the loader's report of it would alarm the reader of the log.
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model: PreTrainedModel = cls.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    finally:
        logger.setLevel(level)
    return model


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges, normalisation and special tokens.

    Padding and truncation are settings of a call, not of the tokenizer, and are left out.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    return json.dumps(content, sort_keys=True)
