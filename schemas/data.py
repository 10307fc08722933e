"""Where records come from and which layout they have."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen

Layout = Literal["messages", "prompt_completion", "preference", "steps", "verifiable"]
"""`messages`; `prompt`/`completion`; `prompt`/`chosen`/`rejected`;
`prompt`/`completions`/`labels`; `prompt`/`answer`."""

SplitName = Literal[
    "evaluation",
    "demonstrations",
    "preferences",
    "preferences_held_out",
    "step_labels",
    "step_labels_held_out",
    "prompts",
]


class DataSource(Frozen):
    """One source of records: exactly one of `path`, `hub` and `generator`."""

    path: str | None = None
    """JSONL (`.jsonl`, `.json`) or Parquet (`.parquet`) file, relative to `data.root`."""
    hub: str | None = None
    """Hub data set, `owner/name` or `owner/name:configuration`."""
    hub_split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set (a commit makes the run reproducible)."""
    generator: str | None = None
    """Import path `module:function` of a function that yields records."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the generator, or of `transform`."""
    transform: str | None = None
    """Import path `module:function` that turns one raw record into zero or more records."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames fields of the source: `{prompt: question}` reads the prompt from `question`."""
    digest_range: tuple[float, float] = (0.0, 1.0)
    """Keep records whose prompt digest, mapped to [0, 1), lies in [low, high)."""
    limit: int | None = Field(default=None, ge=1)
    """Keep at most this many records, the first ones by position."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in ("path", "hub", "generator") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "a data source needs exactly one of path, hub and generator; "
                f"it has {', '.join(given) or 'none'}"
            )
        low, high = self.digest_range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"digest_range must satisfy 0 <= low < high <= 1, not {low}, {high}")
        if self.arguments and not (self.generator or self.transform):
            raise ValueError("arguments are for a generator or a transform; name one or drop them")
        for name in ("generator", "transform"):
            target = getattr(self, name)
            if target is not None and target.count(":") != 1:
                raise ValueError(f"{name} must be an import path module:function, not {target!r}")
        return self

    def content(self) -> dict[str, Any]:
        """What identifies the records, apart from the file behind `path` (its digest does)."""
        return self.model_dump(mode="json", exclude={"path"})


class DataConfig(Frozen):
    """The records of every stage."""

    root: str = "."
    """Folder that relative paths start from; where it is does not enter any fingerprint."""
    evaluation: DataSource
    """Held-out verifiable records (`prompt`, `answer`); every other split is checked against it."""
    demonstrations: DataSource
    """SFT records: `messages` or `prompt`/`completion`."""
    demonstrations_layout: Literal["messages", "prompt_completion"] = "prompt_completion"
    """Layout of the demonstrations."""
    prompts: DataSource | None = None
    """Verifiable prompts (`prompt`, `answer`) for online RL and for sampling preferences."""
    preferences: DataSource | None = None
    """Pairs (`prompt`, `chosen`, `rejected`) for the outcome reward model and for DPO."""
    preferences_held_out: DataSource | None = None
    """Pairs on which the outcome reward model is evaluated."""
    step_labels: DataSource | None = None
    """Stepwise records (`prompt`, `completions`, `labels`) for the process reward model."""
    step_labels_held_out: DataSource | None = None
    """Stepwise records on which the process reward model is evaluated."""
    step_separator: str = "\n"
    """Text that ends every step of a completion."""

    def source(self, split: SplitName) -> DataSource | None:
        """The source of a split, or None where the recipe has none."""
        source: DataSource | None = getattr(self, split)
        return source

    def layout(self, split: SplitName) -> Layout:
        """The record layout of a split."""
        match split:
            case "demonstrations":
                return self.demonstrations_layout
            case "preferences" | "preferences_held_out":
                return "preference"
            case "step_labels" | "step_labels_held_out":
                return "steps"
            case "prompts" | "evaluation":
                return "verifiable"
