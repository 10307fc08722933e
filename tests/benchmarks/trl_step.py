"""The same steps by TRL's own trainers; `versus_trl` runs this in an environment of its own.

    python trl_step.py --algorithm grpo --model FOLDER ... [--settings defaults|fastest]

Imports nothing of the project but the module that draws the lengths, so that it runs where TRL's
versions of the packages are. Prints one JSON object with the fields that `step` has too.

The data set holds one step's records, and every epoch is one optimizer step: whatever order or
micro-batches TRL chooses, each step has the same tokens, those of `step`. They are counted in the
data that the trainer has made of them, and a difference is an error.

`defaults` are TRL's own: bf16 autocast, gradient checkpointing, per_device_train_batch_size 8 (with
as many accumulation steps as the step needs), random order. `fastest` are the quickest honest ones
found on the CPU: no checkpointing; micro-batches of --micro-batch-tokens; SFT packed into rows of
--packed-tokens; pairs and solutions in the order of their length, which is the best that TRL's
`group_by_length` can come to (it sorts a fiftieth of a data set at a time, and this one is a single
step); a static cache for sampling; DPO's reference precomputed. Padding-free DPO is switched off in
TRL 1.16, and the reward and PRM trainers pack nothing. --options tries others, as JSON.

DPO with --reference pass has one pass of the reference over each record in each step. TRL does that
within the step (`defaults`) or before training (`precompute_ref_log_probs`, in `fastest`), where it
is timed and counted as part of one step: that is training for one epoch. With --reference cached
the reference is precomputed and not counted: any later epoch.

PPO (TRL 1.12): bf16 autocast is asked of accelerate as its launcher would, since this trainer hands
its own setting to nobody; the reference and the reward model are loaded in bf16, the policy and the
value model in float32 with autocast. `num_ppo_epochs` is --num-epochs, in one mini-batch.
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
import workload
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """Times the steps after those of the warm-up."""

    def __init__(self, warmup):
        self.warmup = warmup
        self.cpu = self.wall = 0.0
        self.steps = 0
        self.before = (0.0, 0.0)  # CPU and wall seconds before training that belong to one step

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

    def seconds_a_step(self):
        """CPU and wall."""
        return (self.cpu / self.steps + self.before[0], self.wall / self.steps + self.before[1])


class Texts:
    """Texts of an exact number of tokens, of words that stay one token beside any other of them."""

    def __init__(self, tokenizer, seed):
        self.tokenizer = tokenizer
        self.generator = torch.Generator().manual_seed(seed)
        decoded = ((i, tokenizer.decode([i])) for i in range(min(20000, len(tokenizer))))
        words = [i for i, word in decoded if word[:1] == " " and word[1:].isalpha()]
        self.words = torch.tensor([i for i in words if tokenizer.decode([i]).isascii()])

    def ids(self, length):
        return self.words[
            torch.randint(len(self.words), (length,), generator=self.generator)
        ].tolist()

    def __call__(self, length):
        return self.tokenizer.decode(self.ids(length))


def main():
    args = parser().parse_args()
    lengths = workload.Shape.of(args).lengths(args.algorithm)
    if args.settings == "fastest" and args.algorithm in workload.OFFLINE:
        lengths.sort(key=lambda one: -max(one.sequences()))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.algorithm == "ppo" and args.precision == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    clock = Clock(args.warmup)
    tokens = sum(workload.sequences(lengths))
    online = args.algorithm in workload.ONLINE
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[args.algorithm](
            args, lengths, Texts(tokenizer, args.seed), folder, clock
        )
        expected = sum(one.prompt for one in lengths) if online else tokens
        found = real_tokens(trainer, tokenizer)
        if args.algorithm == "ppo":
            expected *= args.group_size
        if found != expected:
            raise SystemExit(f"TRL made {found} tokens of {expected}: this is other work")
        trainer.train()
    cpu, wall = clock.seconds_a_step()
    print(
        json.dumps(
            {
                "algorithm": args.algorithm,
                "settings": args.settings,
                "options": OPTIONS,
                "trl": trl.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "steps": clock.steps,
                "seconds_a_step": wall,
                "cpu_seconds_a_step": cpu,
                "training_tokens": tokens,
                "generated_tokens": workload.completion_tokens(lengths) if online else 0,
                "tokens_a_cpu_second": tokens / cpu,
                "tokens_a_second": tokens / wall,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def real_tokens(trainer, tokenizer):
    """Tokens in the data that a trainer has made: of prompts alone where completions are drawn."""
    rows = trainer.train_dataset
    names = set(rows.column_names)
    if "input_ids" in names:
        return sum(len(row["input_ids"]) for row in rows)
    if "prompt_ids" in names:
        sides = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
        return sum(len(row[side]) for row in rows for side in sides)
    if "chosen_ids" in names:
        return sum(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
    return sum(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)


OPTIONS = {}
"""What TRL was given beyond its defaults, for the report."""


def config_of(cls, args, folder, **options):
    """A trainer's configuration: TRL's defaults but for what the measurement needs, and options."""
    if args.settings == "fastest":
        options = {"gradient_checkpointing": False} | options
        if args.algorithm in ("rm", "prm", "dpo"):
            options["train_sampling_strategy"] = "sequential"
    options |= json.loads(args.options)
    OPTIONS.update(options)
    needed = {
        "output_dir": folder,
        "max_steps": args.steps + args.warmup,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "bf16": args.precision == "bfloat16",
    }
    return cls(**(needed | options))


def batches(args, rows, tokens_a_row):
    """Rows at once, and how many times that for a step: TRL's 8, or what fills the budget.

    Rollouts must come out even. Of fixed records, an epoch's rest is a smaller micro-batch.
    """
    size = min(8, rows)
    if args.settings == "fastest":
        size = min(max(args.micro_batch_tokens // tokens_a_row, 1), rows)
    while args.algorithm in workload.ONLINE and rows % size:
        size -= 1
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": -(-rows // size),
    }


def longest(args):
    return args.prompt_tokens + args.completion_tokens


def sft(args, lengths, texts, folder, clock):
    # The end token is the trainer's.
    data = Dataset.from_list([{"text": texts(n - 1)} for n in workload.sequences(lengths)])
    options = {"max_length": longest(args)}
    if args.settings == "fastest":
        options["max_length"] = max(longest(args), args.packed_tokens)
        options |= {"packing": True, "per_device_train_batch_size": 1}
        # Not more rows than records: an epoch stays a step, however many rows they are packed in.
        options["gradient_accumulation_steps"] = len(lengths)
    else:
        options |= batches(args, len(lengths), longest(args))
    return trl.SFTTrainer(
        model=model_of(AutoModelForCausalLM, args),
        args=config_of(trl.SFTConfig, args, folder, **options),
        train_dataset=data,
        processing_class=texts.tokenizer,
        callbacks=[clock],
    )


def rm(args, lengths, texts, folder, clock):
    data = Dataset.from_list(
        [
            {"chosen": prompt + texts(one[0] - 1), "rejected": prompt + texts(one[1] - 1)}
            for prompt, one in ((texts(one.prompt), one.completions) for one in lengths)
        ]
    )
    model = model_of(AutoModelForSequenceClassification, args, num_labels=1)
    model.config.pad_token_id = texts.tokenizer.pad_token_id
    options = {"max_length": longest(args)} | batches(args, len(lengths), 2 * longest(args))
    return trl.RewardTrainer(
        model=model,
        args=config_of(trl.RewardConfig, args, folder, **options),
        train_dataset=data,
        processing_class=texts.tokenizer,
        callbacks=[clock],
    )


def dpo(args, lengths, texts, folder, clock):
    data = Dataset.from_list(
        [
            {
                "prompt": texts(one.prompt),
                "chosen": texts(one.completions[0] - 1),
                "rejected": texts(one.completions[1] - 1),
            }
            for one in lengths
        ]
    )
    options = {"max_length": longest(args)} | batches(args, len(lengths), 2 * longest(args))
    if args.settings == "fastest" or args.reference == "cached":
        options["precompute_ref_log_probs"] = True

    class Trainer(trl.DPOTrainer):
        def _precompute_ref_logps(self, *arguments):
            cpu, wall = time.process_time(), time.perf_counter()
            result = super()._precompute_ref_logps(*arguments)
            if args.reference == "pass":
                clock.before = (time.process_time() - cpu, time.perf_counter() - wall)
            return result

    return Trainer(
        model=model_of(AutoModelForCausalLM, args),
        args=config_of(trl.DPOConfig, args, folder, **options),
        train_dataset=data,
        processing_class=texts.tokenizer,
        callbacks=[clock],
    )


def prm(args, lengths, texts, folder, clock):
    from trl.experimental.prm import PRMConfig, PRMTrainer

    # The first token of a prompt is the trainer's where the tokenizer has one, and a separator ends
    # each step.
    first = texts.tokenizer.bos_token_id is not None
    rows = []
    for one in lengths:
        sizes = workload.step_lengths(one.completions[0])
        rows.append(
            {
                "prompt": texts(one.prompt - first),
                "completions": [texts(size - 1) for size in sizes],
                "labels": [i % 2 == 0 for i in range(len(sizes))],
            }
        )
    options = {"max_length": longest(args)} | batches(args, len(lengths), longest(args))
    return PRMTrainer(
        model=model_of(AutoModelForTokenClassification, args, num_labels=2),
        args=config_of(PRMConfig, args, folder, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=texts.tokenizer,
        callbacks=[clock],
    )


def reward(completions, **_):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def group_based(args, lengths, texts, folder, clock):
    cls, config_cls = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[args.algorithm]
    rows = args.prompts * args.group_size
    options = {
        "max_completion_length": args.completion_tokens,
        "num_generations": args.group_size,
        # No end token is drawn, so that every completion has its full length.
        "generation_kwargs": {"suppress_tokens": [texts.tokenizer.eos_token_id]},
        **batches(args, rows, longest(args)),
    }
    if args.settings == "fastest":
        options["cache_implementation"] = "static"
    return cls(
        model=model_of(AutoModelForCausalLM, args),
        reward_funcs=reward,
        args=config_of(config_cls, args, folder, **options),
        train_dataset=Dataset.from_list([{"prompt": texts(one.prompt)} for one in lengths]),
        processing_class=texts.tokenizer,
        callbacks=[clock],
    )


def ppo(args, lengths, texts, folder, clock):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = texts.tokenizer
    tokenizer.padding_side = "left"
    # One completion a row: the prompt of a group is a row for each.
    prompts = [{"input_ids": ids} for ids in (texts.ids(one.prompt) for one in lengths)]
    data = Dataset.from_list([row for row in prompts for _ in range(args.group_size)])
    options = {
        "total_episodes": len(data) * (args.steps + args.warmup),
        "response_length": args.completion_tokens,
        "num_ppo_epochs": args.num_epochs,
        "num_sample_generations": 0,
        "temperature": 1.0,
        **batches(args, len(data), longest(args)),
    }
    policy = model_of(AutoModelForCausalLM, args)
    # The padding token would end a completion: neither it nor the end token is drawn.
    policy.generation_config.suppress_tokens = sorted(
        {tokenizer.eos_token_id, tokenizer.pad_token_id}
    )
    heads = {"num_labels": 1, "cls": AutoModelForSequenceClassification}
    return PPOTrainer(
        args=config_of(PPOConfig, args, folder, **options),
        processing_class=tokenizer,
        model=policy,
        ref_model=frozen(args, AutoModelForCausalLM),
        reward_model=frozen(args, **heads),
        value_model=model_of(args=args, **heads),
        train_dataset=data,
        callbacks=[clock],
    )


def model_of(cls, args, **options):
    """The weights in float32, as mixed precision wants them."""
    return cls.from_pretrained(args.model, dtype=torch.float32, **options)


def frozen(args, cls, **options):
    """A model that is only asked."""
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    return cls.from_pretrained(args.model, dtype=dtype, **options).eval()


TRAINERS = {
    "sft": sft,
    "rm": rm,
    "prm": prm,
    "dpo": dpo,
    "grpo": group_based,
    "rloo": group_based,
    "ppo": ppo,
}


def parser():
    found = argparse.ArgumentParser()
    found.add_argument("--algorithm", choices=workload.ALGORITHMS, required=True)
    found.add_argument("--model", required=True)
    found.add_argument("--settings", choices=("defaults", "fastest"), default="defaults")
    found.add_argument(
        "--packed-tokens", type=int, default=512, help="row of `fastest` SFT, if records fit in it"
    )
    found.add_argument("--options", default="{}", help="JSON: other options of TRL's configuration")
    workload.add_options(found)
    return found


if __name__ == "__main__":
    main()
