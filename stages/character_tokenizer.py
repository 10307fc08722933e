"""A tokenizer made in code: one token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from schemas.model import BuiltModel

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def build_character_tokenizer(config: BuiltModel) -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 2 are padding, end and unknown; the alphabet follows in its own order."""
    characters = list(dict.fromkeys(config.alphabet))
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )
    if config.chat_template is not None:
        wrapped.chat_template = config.chat_template
    return wrapped
