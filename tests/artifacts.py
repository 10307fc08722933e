"""What hand-made artifacts of tests have in common."""

from __future__ import annotations

from schemas.artifacts import CreatedBy, ModelContract

NOBODY = CreatedBy(posttrain="0", python="3", packages={}, code={})
CONTRACT = ModelContract(
    tokenizer_sha256="t",
    chat_template_sha256=None,
    pad_token_id=0,
    eos_token_ids=(1,),
    architecture="LlamaForCausalLM",
    vocab_size=18,
    max_positions=96,
    dtype="float32",
)
