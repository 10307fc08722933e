"""The same steps by TRL's own trainers; `versus_trl` runs this in an environment of its own.

    python trl_step.py --algorithm grpo --model FOLDER ... [--settings defaults|fastest]

Imports nothing of the project, so that it runs where TRL's versions of the packages are. Prints
one JSON object with the fields that `step` has too. `defaults` are TRL's own (bf16 and gradient
checkpointing); `fastest` are the quickest honest ones found: packing where the trainer has it, and
no checkpointing.
"""

import argparse
import json
import os
import resource
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """Processor and wall seconds from the end of the warm-up on."""

    def __init__(self, warmup):
        self.warmup = warmup
        self.cpu = self.wall = 0.0
        self.steps = 0

    def on_train_begin(self, args, state, control, **_):
        if self.warmup == 0:
            self._start()

    def _start(self):
        self.start = (time.process_time(), time.perf_counter())

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.warmup:
            self._start()
        elif state.global_step > self.warmup:
            self.steps += 1
            self.cpu = time.process_time() - self.start[0]
            self.wall = time.perf_counter() - self.start[1]


def text(tokenizer, generator, length):
    """A text of exactly `length` tokens, by way of single-token words."""
    ids = WORDS[torch.randint(len(WORDS), (length,), generator=generator)].tolist()
    return tokenizer.decode(ids)


def single_token_words(tokenizer):
    """Ids of words with a leading space that stay one token beside any other of them."""
    kept = [
        i
        for i in range(200, 20000)
        if tokenizer.decode([i])[1:].isalpha()
        and tokenizer.decode([i])[0] == " "
        and tokenizer.decode([i])[1:].isascii()
    ]
    return torch.tensor(kept)


def main():
    global WORDS
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    WORDS = single_token_words(tokenizer)
    clock = Clock(args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer, tokens, generated = build(args, tokenizer, folder, clock)
        trainer.train()
    print(
        json.dumps(
            {
                "algorithm": args.algorithm,
                "settings": args.settings,
                "trl": trl.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "steps": clock.steps,
                "seconds_a_step": clock.wall / clock.steps,
                "cpu_seconds_a_step": clock.cpu / clock.steps,
                "training_tokens": tokens,
                "generated_tokens": generated,
                "tokens_a_cpu_second": tokens * clock.steps / clock.cpu,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def build(args, tokenizer, folder, clock):
    """A trainer of TRL on random text; tokens of a step, and how many of them it generates."""
    generator = torch.Generator().manual_seed(0)
    fastest = args.settings == "fastest"
    steps = args.steps + args.warmup
    # Lengths count the end token where a trainer adds one.
    length = args.prompt_tokens + args.completion_tokens
    common = dict(
        output_dir=folder,
        max_steps=steps,
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.precision == "bfloat16",
        gradient_checkpointing=not fastest,
        disable_tqdm=True,
    )
    rows = args.prompts * steps
    if args.algorithm == "sft":
        data = Dataset.from_list(
            [{"text": text(tokenizer, generator, length - 1)} for _ in range(rows)]
        )
        packed = dict(packing=True, per_device_train_batch_size=1) if fastest else {}
        per_step = args.prompts
        if fastest:
            # One packed row holds the records of a micro-batch.
            per_row = max(args.micro_batch_tokens // length, 1)
            packed["max_length"] = per_row * length
            packed["gradient_accumulation_steps"] = max(per_step // per_row, 1)
        else:
            packed["max_length"] = length
            packed.update(batches(args, length))
        trainer = trl.SFTTrainer(
            model=model_of(AutoModelForCausalLM, args),
            args=trl.SFTConfig(**common, **packed),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        return trainer, per_step * length, 0
    if args.algorithm in ("rm", "dpo"):
        data = Dataset.from_list(
            [
                {
                    "prompt": text(tokenizer, generator, args.prompt_tokens),
                    "chosen": text(tokenizer, generator, args.completion_tokens - 1),
                    "rejected": text(tokenizer, generator, args.completion_tokens - 1),
                }
                for _ in range(rows)
            ]
        )
        of_pair = batches(args, 2 * length)
        if args.algorithm == "rm":
            data = data.map(
                lambda row: {k: row["prompt"] + row[k] for k in ("chosen", "rejected")},
                remove_columns="prompt",
            )
            model = model_of(AutoModelForSequenceClassification, args, num_labels=1)
            model.config.pad_token_id = tokenizer.pad_token_id
            config = trl.RewardConfig(**common, **of_pair, max_length=length)
            trainer = trl.RewardTrainer(
                model=model,
                args=config,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            config = trl.DPOConfig(**common, **of_pair, max_length=length)
            trainer = trl.DPOTrainer(
                model=model_of(AutoModelForCausalLM, args),
                args=config,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[clock],
            )
        return trainer, 2 * args.prompts * length, 0
    if args.algorithm == "prm":
        config_cls, cls = prm_classes()
        size = 16
        data = Dataset.from_list(
            [
                {
                    "prompt": text(tokenizer, generator, args.prompt_tokens),
                    "completions": [
                        text(tokenizer, generator, size - 1)
                        for _ in range(args.completion_tokens // size)
                    ],
                    "labels": [i % 2 == 0 for i in range(args.completion_tokens // size)],
                }
                for _ in range(rows)
            ]
        )
        config = config_cls(
            **common,
            **batches(args, length),
            max_length=length + 8,
            max_completion_length=args.completion_tokens + 8,
        )
        trainer = cls(
            model=model_of(AutoModelForTokenClassification, args, num_labels=2),
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        return trainer, args.prompts * length, 0
    sequences = args.prompts * args.group_size
    data = Dataset.from_list(
        [{"prompt": text(tokenizer, generator, args.prompt_tokens)} for _ in range(rows)]
    )

    def reward(completions, **_):
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    generation = dict(
        max_completion_length=args.completion_tokens,
        num_generations=args.group_size,
        # No end token is drawn, so that every completion has its full length.
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
    )
    micro = max(args.micro_batch_tokens // length // args.group_size, 1) * args.group_size
    of_rows = dict(
        per_device_train_batch_size=min(micro, sequences),
        gradient_accumulation_steps=max(sequences // micro, 1),
    )
    cls, config_cls = (
        (trl.GRPOTrainer, trl.GRPOConfig)
        if args.algorithm == "grpo"
        else (trl.RLOOTrainer, trl.RLOOConfig)
    )
    trainer = cls(
        model=model_of(AutoModelForCausalLM, args),
        reward_funcs=reward,
        args=config_cls(**common, **generation, **of_rows),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, sequences * length, sequences * args.completion_tokens


def batches(args, tokens_a_record):
    """Records at once within the same budget of tokens, and the steps that make up a batch."""
    size = min(max(args.micro_batch_tokens // tokens_a_record, 1), args.prompts)
    return dict(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=max(args.prompts // size, 1),
    )


def model_of(cls, args, **options):
    """The weights in float32, as mixed precision wants them."""
    return cls.from_pretrained(args.model, dtype=torch.float32, **options)


def prm_classes():
    """Newer versions have put the trainer aside."""
    try:
        from trl.experimental.prm import PRMConfig, PRMTrainer
    except ImportError:
        from trl import PRMConfig, PRMTrainer
    return PRMConfig, PRMTrainer


def parser():
    found = argparse.ArgumentParser()
    found.add_argument("--algorithm", choices=("sft", "rm", "prm", "dpo", "grpo", "rloo"))
    found.add_argument("--model", required=True)
    found.add_argument("--settings", choices=("defaults", "fastest"), default="defaults")
    found.add_argument("--prompts", type=int, default=8)
    found.add_argument("--group-size", type=int, default=8)
    found.add_argument("--prompt-tokens", type=int, default=64)
    found.add_argument("--completion-tokens", type=int, default=64)
    found.add_argument("--micro-batch-tokens", type=int, default=4096)
    found.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--steps", type=int, default=3)
    found.add_argument("--warmup", type=int, default=1)
    return found


if __name__ == "__main__":
    main()
