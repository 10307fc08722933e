"""Sampling engines side by side on the same work: `python -m tests.benchmarks.engines`.

Prints one JSON line for each engine: tokens per CPU-second and per second, medians over rounds in
which the engines take turns, and the ratios between them. `bare` is vLLM's own `LLM.generate` on
the same instance that the vLLM engine wraps, `bare_without_logprobs` the same without asking for
the log-probabilities that training needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from schemas.rl import RolloutConfig, SamplingConfig
from stages.rollout.engine import build_engine
from stages.rollout.types import RolloutEngine

Draw = Callable[[int], int]
"""Samples with a seed; returns the number of tokens."""


def tiny(hidden_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            dtype="float32",
        )
    ).eval()


def through(engine: RolloutEngine, prompts: list[list[int]], arguments: Any) -> Draw:
    sampling = SamplingConfig(max_completion_tokens=arguments.completion_tokens)

    def draw(seed: int) -> int:
        found = engine.generate(prompts, sampling, num_samples=arguments.group_size, seed=seed)
        return sum(len(rollout.completion_ids) for rollout in found)

    return draw


def bare(engine: Any, prompts: list[list[int]], arguments: Any, logprobs: int | None) -> Draw:
    def draw(seed: int) -> int:
        params = engine._sampling_params(
            n=arguments.group_size,
            max_tokens=arguments.completion_tokens,
            seed=seed,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        engine._llm.reset_prefix_cache()
        outputs = engine._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; else a tiny model")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-vllm", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, arguments.model or Path(folder))


def compare(arguments: Any, folder: Path) -> None:
    if arguments.model is None:
        tiny(arguments.hidden_size).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.prompts, arguments.prompt_tokens)
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator).tolist()
    engines = ["native"] if arguments.without_vllm else ["native", "vllm"]
    built = {
        name: build_engine(
            RolloutConfig.model_validate(
                {"engine": name, "max_batch_size": arguments.prompts * arguments.group_size}
            ),
            model=model,
            model_folder=folder,
            eos_token_ids=[],
            pad_token_id=0,
        )
        for name in engines
    }
    draws = {name: through(engine, prompts, arguments) for name, engine in built.items()}
    if "vllm" in built:
        draws["bare"] = bare(built["vllm"], prompts, arguments, 0)
        draws["bare_without_logprobs"] = bare(built["vllm"], prompts, arguments, None)
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(-1, arguments.rounds):  # the first warms up, and does not count
        rounds.append({name: measure(draw, number) for name, draw in draws.items()})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shown = vars(arguments) | {"hidden_size": model.config.hidden_size}
    settings = {k: v for k, v in shown.items() if k != "model"}
    for name in draws:
        line = {
            "engine": name,
            "num_parameters": parameters,
            "dtype": str(model.dtype),
            "num_threads": torch.get_num_threads(),
            **settings,
            "tokens_per_cpu_second": statistics.median(r[name][0] for r in rounds[1:]),
            "tokens_per_second": statistics.median(r[name][1] for r in rounds[1:]),
        }
        for other in draws:
            if other != name:
                shares = [r[name][0] / r[other][0] for r in rounds[1:]]
                line[f"cpu_ratio_to_{other}"] = statistics.median(shares)
        print(json.dumps(line), flush=True)
    for engine in built.values():
        engine.close()


def measure(draw: Draw, seed: int) -> tuple[float, float]:
    """Tokens per CPU-second and per second."""
    cpu, wall = time.process_time(), time.perf_counter()
    count = draw(seed & 0xFFFF)
    return count / (time.process_time() - cpu), count / (time.perf_counter() - wall)


if __name__ == "__main__":
    main()
