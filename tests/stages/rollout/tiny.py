"""A tiny model and a tokenizer of letters, in folders that vLLM opens too."""

from __future__ import annotations

from string import ascii_letters, digits

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from stages.rollout.types import Rollout

EOS = 2
PROMPTS = [[5, 6, 7], [4], [3, 9, 8, 4, 10, 11, 5], [6, 6], [12, 3, 4, 5]]


def llama(seed: int, *, tied: bool, max_positions: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=max_positions,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=EOS,
        )
    ).eval()


def letters(size: int) -> PreTrainedTokenizerFast:
    """Token 3 is "a", 4 is "b" and so on; 2 is the end, and 1 is special, too."""
    characters = (ascii_letters + digits)[: size - 3]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": EOS}
    vocabulary |= {letter: 3 + index for index, letter in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def exact_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float) -> list[float]:
    """By one pass over the whole sequence, in float64 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
    scaled = logits[len(rollout.prompt_ids) - 1 : -1].double() / temperature
    chosen = scaled.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])
    return [float(value) for value in chosen]
