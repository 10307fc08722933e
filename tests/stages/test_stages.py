"""Every stage from its request to its published artifact, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from infra.store import Store
from schemas.artifacts import (
    AnyArtifact,
    DatasetArtifact,
    EvaluationReport,
    PolicyCheckpoint,
    RewardModelCheckpoint,
)
from schemas.base import UserError
from schemas.data import DataSource
from schemas.evaluation import EvaluateConfig
from schemas.fingerprint import fingerprint
from schemas.requests import (
    EvaluateRequest,
    LabelStepsRequest,
    PrepareDataRequest,
    Runtime,
    SamplePreferencesRequest,
    StageRequest,
    TrainProcessRewardModelRequest,
    TrainRewardModelRequest,
    TrainRLRequest,
    TrainSFTRequest,
)
from schemas.rewards import RewardConfig, VerifierConfig
from schemas.rl import RLConfig, RolloutConfig, SamplingConfig
from schemas.training import (
    LabelStepsConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SamplePreferencesConfig,
    SFTConfig,
)
from stages.data.records import read_records
from stages.main import run_stage
from stages.tasks.arithmetic import verify
from tests.stages.conftest import tiny_config
from tests.stages.fakes import MemoryTracker

OPTIMIZER = {"learning_rate": 3e-3}
TERMS = {"min_terms": 2, "max_terms": 2, "max_operand": 4}
SAMPLING = SamplingConfig(max_completion_tokens=24)
VERIFIER = VerifierConfig(function="stages.tasks.arithmetic:verify")
SHORT = {"max_length": 64, "batch_size": 32, "micro_batch_tokens": 4096}


def answer_of(prompt: str) -> str:
    return str(eval(prompt.removesuffix("=")))


class House:
    """A store, and stages run in it one after the other."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.runtime = Runtime(store=str(root), device="cpu")

    def run(self, request: StageRequest) -> Any:
        request = request.model_copy(update={"fingerprint": fingerprint(request)})
        found = self.store.find(request.fingerprint)
        if found is not None:
            return found
        work = self.store.work_dir(request.fingerprint)
        artifact: AnyArtifact = run_stage(request, run_dir=work, tracker=MemoryTracker())  # type: ignore[arg-type]
        self.store.publish(request.fingerprint, artifact)
        return artifact

    def data(self, split: Any, layout: Any, generator: str, **arguments: Any) -> DatasetArtifact:
        source = DataSource(
            generator=f"stages.tasks.arithmetic:{generator}", arguments={**TERMS, **arguments}
        )
        return self.run(
            PrepareDataRequest(runtime=self.runtime, split=split, layout=layout, source=source)
        )

    def sft(self, **changes: Any) -> PolicyCheckpoint:
        config = {"optimizer": OPTIMIZER, "num_epochs": 30, **SHORT, **changes}
        return self.run(
            TrainSFTRequest(
                runtime=self.runtime,
                seed=0,
                model=tiny_config(),
                config=SFTConfig.model_validate(config),
                demonstrations=self.data(
                    "demonstrations",
                    "prompt_completion",
                    "demonstrations",
                    count=200,
                    seed=1,
                    slip_probability=0.3,
                    digest_range=[0.0, 1.0],
                ),
            )
        )

    def prompts(self, split: str = "prompts") -> DatasetArtifact:
        return self.data(split, "verifiable", "problems", count=12, seed=2, digest_range=[0.0, 1.0])

    def pairs(self, split: str, count: int) -> DatasetArtifact:
        return self.data(
            split,
            "preference",
            "preferences",
            count=count,
            seed=3,
            slip_probability=0.5,
            digest_range=[0.0, 1.0],
        )

    def steps(self, split: str, count: int) -> DatasetArtifact:
        return self.data(
            split,
            "steps",
            "step_labels",
            count=count,
            seed=4,
            slip_probability=0.5,
            digest_range=[0.0, 1.0],
        )

    def reward_model(self) -> RewardModelCheckpoint:
        return self.run(
            TrainRewardModelRequest(
                runtime=self.runtime,
                seed=0,
                config=RewardModelConfig.model_validate(
                    {"optimizer": OPTIMIZER, "num_epochs": 4, **SHORT}
                ),
                policy=self.sft(),
                preferences=(self.pairs("preferences", 60),),
                held_out=self.pairs("preferences_held_out", 20),
            )
        )

    def process_reward_model(self) -> RewardModelCheckpoint:
        return self.run(
            TrainProcessRewardModelRequest(
                runtime=self.runtime,
                seed=0,
                config=ProcessRewardModelConfig.model_validate(
                    {"optimizer": OPTIMIZER, "num_epochs": 4, **SHORT}
                ),
                step_separator="\n",
                policy=self.sft(),
                step_labels=(self.steps("step_labels", 60),),
                held_out=self.steps("step_labels_held_out", 20),
            )
        )

    def folder(self, artifact: Any) -> Path:
        return self.store.path(artifact)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("store with spaces ü"))


def test_sft_learns_and_is_a_plain_hugging_face_folder(house: House) -> None:
    artifact = house.sft()
    model = AutoModelForCausalLM.from_pretrained(house.folder(artifact)).eval()
    tokenizer = AutoTokenizer.from_pretrained(house.folder(artifact))
    assert artifact.metrics["loss"] < 0.5  # a uniform guess of 17 tokens costs 2.8
    assert artifact.num_steps == 188  # 30 * 200 / 32, rounded up
    ids = torch.tensor([tokenizer("2+2=").input_ids])
    output = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("2+2=2+2=")


def test_every_trained_model_says_what_was_done_about_unstable_steps(house: House) -> None:
    for artifact in (house.sft(), house.reward_model(), house.process_reward_model()):
        audit = json.loads((house.folder(artifact) / "posttrain.json").read_text())
        assert audit == {"stability": []}
        assert not [name for name in artifact.metrics if name.startswith("stability/")]
    limits = {"grad_norm": {"max": 1e-9}, "max_interventions": 100}
    with pytest.raises(UserError, match="each of the 2 steps of sft was left out"):
        house.sft(max_steps=2, stability=limits)
    limits["grad_norm"] = {"max_ratio": 1.0001, "window": 2}
    artifact = house.sft(max_steps=40, stability=limits)
    audit = json.loads((house.folder(artifact) / "posttrain.json").read_text())
    skipped = audit["stability"]
    assert 1 <= len(skipped) < 38
    assert artifact.metrics["stability/num_skipped"] == len(skipped)
    assert artifact.metrics["stability/num_rewinds"] == 0
    for one in skipped:
        assert (one["case"], one["action"]) == ("grad_norm", "skip")
        assert one["value"] > one["limit"]
        assert len(one["records"]) == 32


def test_the_same_request_gives_the_same_bits(house: House, tmp_path: Path) -> None:
    other = House(tmp_path)
    changes = {"max_steps": 4, "num_epochs": 1}
    assert house.sft(**changes).sha256 == other.sft(**changes).sha256


def test_lora_is_merged_into_plain_weights(house: House) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    trained = house.sft(lora=lora, num_epochs=2)
    plain = house.sft(max_steps=1, optimizer={"learning_rate": 1e-12})
    left, right = (
        AutoModelForCausalLM.from_pretrained(house.folder(artifact)).state_dict()
        for artifact in (trained, plain)
    )
    moved = {name for name in left if not torch.allclose(left[name], right[name], atol=1e-6)}
    assert moved == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight"
        for layer in (0, 1)
        for name in ("q", "v")
    }


def test_cut_records_are_counted_and_too_many_refused(house: House) -> None:
    with pytest.raises(UserError, match=r"200 of 200 demonstrations .* were cut"):
        house.sft(max_length=10)
    artifact = house.sft(max_length=10, max_truncated_fraction=1.0, max_steps=1)
    assert artifact.metrics["num_truncated"] == 200


def test_a_record_without_a_trainable_token_is_refused(house: House) -> None:
    # Prompts are four characters: nothing of a completion is left... at the least allowed length
    # of 8 something is, so the prompts here are longer.
    demonstrations = house.data(
        "demonstrations",
        "prompt_completion",
        "demonstrations",
        count=20,
        seed=1,
        min_terms=6,
        max_terms=6,
        digest_range=[0.0, 1.0],
    )
    config = {"optimizer": OPTIMIZER, **SHORT, "max_length": 8, "max_truncated_fraction": 1.0}
    with pytest.raises(UserError, match="20 of 20 demonstrations have no token to train on"):
        house.run(
            TrainSFTRequest(
                runtime=house.runtime,
                seed=0,
                model=tiny_config(),
                config=SFTConfig.model_validate(config),
                demonstrations=demonstrations,
            )
        )


def test_max_length_beyond_the_context_is_refused(house: House) -> None:
    with pytest.raises(UserError, match="context holds 96 tokens"):
        house.sft(max_length=97)


def test_reward_model(house: House) -> None:
    artifact = house.reward_model()
    assert artifact.pooling == "last_token"
    assert artifact.metrics["accuracy"] > 0.6
    model = AutoModelForSequenceClassification.from_pretrained(house.folder(artifact))
    assert model.config.num_labels == 1


def test_process_reward_model(house: House) -> None:
    artifact = house.process_reward_model()
    assert (artifact.pooling, artifact.step_separator) == ("step_end", "\n")
    assert artifact.metrics["step_accuracy"] > 0.5
    assert artifact.metrics["num_steps"] == 40  # two lines in each of 20 solutions


@pytest.mark.parametrize("ranker", ["verifier", "outcome"])
def test_sampled_preferences_are_ranked(house: House, ranker: str) -> None:
    artifact = house.run(
        SamplePreferencesRequest(
            runtime=house.runtime,
            seed=0,
            config=SamplePreferencesConfig.model_validate(
                {
                    "num_prompts": 12,
                    "samples_per_prompt": 16,
                    "pairs_per_prompt": 2,
                    "ranker": ranker,
                    "min_gap": 0.01,
                }
            ),
            sampling=SAMPLING,
            rollout=RolloutConfig(),
            policy=house.sft(),
            prompts=house.prompts(),
            verifier=VERIFIER,
            reward_model=house.reward_model() if ranker == "outcome" else None,
        )
    )
    records = read_records(house.folder(artifact))
    assert artifact.num_records == len(records) > 0
    assert artifact.num_prompts == len({record["prompt"] for record in records})
    if ranker == "verifier":
        assert all(verify(r["chosen"], answer_of(r["prompt"])) == 1.0 for r in records)
        assert all(verify(r["rejected"], answer_of(r["prompt"])) == 0.0 for r in records)


def test_steps_are_labelled_by_continuation(house: House) -> None:
    artifact = house.run(
        LabelStepsRequest(
            runtime=house.runtime,
            seed=0,
            config=LabelStepsConfig(num_prompts=12, continuations_per_step=8),
            sampling=SAMPLING,
            rollout=RolloutConfig(),
            step_separator="\n",
            policy=house.sft(),
            prompts=house.prompts(),
            verifier=VERIFIER,
        )
    )
    records = read_records(house.folder(artifact))
    assert len(records) == artifact.num_records > 0
    for record in records:
        assert len(record["labels"]) == len(record["completions"])
        # The last step's label is whether the solution's own answer is right.
        text = "\n".join(record["completions"])
        assert record["labels"][-1] == (verify(text, answer_of(record["prompt"])) == 1.0)


def test_dpo_prefers_the_chosen(house: House) -> None:
    dpo = {"optimizer": {"learning_rate": 1e-3}, "max_length": 64, "num_epochs": 3, "log_every": 1}
    artifact = house.run(
        TrainRLRequest(
            runtime=house.runtime,
            seed=0,
            config=RLConfig.model_validate({"algorithm": "dpo", "dpo": dpo}),
            policy=house.sft(),
            preferences=house.pairs("preferences", 60),
        )
    )
    assert artifact.algorithm == "dpo"
    assert artifact.metrics["reward/margin"] > 0


def evaluate(house: House, candidate: PolicyCheckpoint, **changes: Any) -> EvaluationReport:
    return house.run(
        EvaluateRequest(
            runtime=house.runtime,
            seed=0,
            config=EvaluateConfig(sampling=SAMPLING, num_samples=4, pass_at=(1, 2)),
            reward=RewardConfig.model_validate(
                {"verifier": VERIFIER, "process": {"weight": 0.5, "credit": "aggregate"}}
            ),
            rollout=RolloutConfig(),
            step_separator="\n",
            records=house.prompts("evaluation"),
            candidate=candidate,
            baseline=house.sft(),
            process_reward_model=house.process_reward_model(),
            **changes,
        )
    )


def test_evaluation_of_a_policy_against_itself(house: House) -> None:
    report = evaluate(house, house.sft())
    assert report.incumbent_is_baseline
    assert report.candidate == report.baseline == report.incumbent
    assert report.candidate.kl == 0.0
    assert report.candidate.num_records == 12


def test_evaluation_keeps_every_record(house: House) -> None:
    weaker = house.sft(num_epochs=10)
    report = evaluate(house, weaker, incumbent=weaker)
    assert report.incumbent == report.candidate != report.baseline
    assert report.candidate.kl > 0
    rows = pq.read_table(house.folder(report) / "records.parquet").to_pylist()
    assert len(rows) == 3 * 12 * 4
    own = [row for row in rows if row["model"] == "candidate"]
    passed = sum(row["correct"] for row in own) / len(own)
    assert report.candidate.pass_at["pass@1"] == pytest.approx(passed)
    assert report.candidate.length == pytest.approx(sum(r["length"] for r in own) / len(own))
    assert report.candidate.kl == pytest.approx(sum(r["kl"] for r in own) / len(own), rel=1e-4)
    # The proxy is what the trained models gave, by their weight; the verifier is gold.
    for row in own:
        assert row["proxy"] == pytest.approx(0.5 * row["process"])
        assert row["reward"] == pytest.approx(row["verifier"] + row["proxy"])
        assert row["correct"] is (row["verifier"] == 1.0)
    components = report.candidate.components
    assert components.keys() == {"verifier", "process", "proxy"}
    for name, value in components.items():
        assert value == pytest.approx(sum(row[name] for row in own) / len(own), rel=1e-5)
        assert report.metrics[f"candidate/{name}"] == value
    # pass@2 of n = 4 with c right is 1 - C(4 - c, 2) / C(4, 2).
    missed = {0: 1.0, 1: 0.5, 2: 1 / 6, 3: 0.0, 4: 0.0}
    counts: dict[str, int] = {}
    for row in own:
        counts[row["record"]] = counts.get(row["record"], 0) + row["correct"]
    expected = 1 - sum(missed[c] for c in counts.values()) / len(counts)
    assert report.candidate.pass_at["pass@2"] == pytest.approx(expected)
