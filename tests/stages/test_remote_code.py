"""Code that a model folder ships runs only if the configuration lists it, pinned."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flows.graph import model_digests
from schemas.base import UserError
from schemas.model import ModelConfig
from stages.model_files import code_digest
from stages.models import load_base, load_policy, load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Importing it leaves a mark. `Converted` gives a model that transformers has; `Custom` is its own.
MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).write_text("it ran")


class Converted(LlamaForCausalLM):
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        for name in ("code_revision", "adapter_kwargs", "_from_auto"):
            options.pop(name, None)
        return LlamaForCausalLM.from_pretrained(*arguments, **options)


class CustomConfig(LlamaConfig):
    model_type = "unheard_of"


class Custom(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code; transformers keeps its copies of such code in our own folder."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    target = tmp_path / "with-code"
    shutil.copytree(tiny_folder, target)
    (target / "modeling_custom.py").write_text(MODELING.format(mark=str(mark)))
    change(target / "config.json", auto_map={"AutoModelForCausalLM": "modeling_custom.Converted"})
    return target


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def make_foreign(folder: Path) -> None:
    """Let only the folder's own code know the architecture."""
    change(
        folder / "config.json",
        model_type="unheard_of",
        auto_map={
            "AutoConfig": "modeling_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.Custom",
        },
    )


def config(folder: Path, *trusted: str) -> ModelConfig:
    return ModelConfig(path=str(folder), trust_remote_code=trusted)


def test_unlisted_code_is_left_alone(folder: Path, mark: Path) -> None:
    model, _ = load_base(config(folder), seed=0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_listed_code_runs(folder: Path, mark: Path) -> None:
    model, _ = load_base(config(folder, code_digest(folder)), seed=0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert mark.read_text() == "it ran"


def test_a_model_that_needs_unlisted_code_is_refused_with_what_to_list(
    folder: Path, mark: Path
) -> None:
    make_foreign(folder)
    with pytest.raises(UserError) as caught:
        load_base(config(folder), seed=0)
    assert f"list {code_digest(folder)} in model.trust_remote_code" in str(caught.value)
    assert not mark.exists()


def test_code_that_changed_since_it_was_listed_is_refused(folder: Path, mark: Path) -> None:
    listed = code_digest(folder)
    (folder / "helper.py").write_text("print('new')\n")
    for refused in (
        lambda: load_base(config(folder, listed), seed=0),
        lambda: model_digests(config(folder, listed)),
    ):
        with pytest.raises(UserError, match="not those that were listed") as caught:
            refused()
        assert code_digest(folder) in str(caught.value)
    assert not mark.exists()


def test_code_from_another_repository_is_refused_though_the_folder_is_listed(
    folder: Path, mark: Path
) -> None:
    change(
        folder / "config.json", auto_map={"AutoModelForCausalLM": "evil/repo--modeling_custom.X"}
    )
    with pytest.raises(UserError, match="takes code from evil/repo"):
        load_base(config(folder, code_digest(folder)), seed=0)
    change(folder / "config.json", auto_map={})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--a.B", None]})
    with pytest.raises(UserError, match="takes code from evil/repo"):
        load_base(config(folder, code_digest(folder)), seed=0)
    assert not mark.exists()


def test_a_listed_model_that_later_stages_could_not_open_is_refused(folder: Path) -> None:
    make_foreign(folder)
    with pytest.raises(UserError, match="its own code gives a Custom"):
        load_base(config(folder, code_digest(folder)), seed=0)


@pytest.mark.parametrize("foreign", [False, True])
def test_an_artifact_never_runs_code(folder: Path, mark: Path, foreign: bool) -> None:
    if foreign:
        make_foreign(folder)
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_policy(folder, torch.device("cpu"))
    else:
        load_policy(folder, torch.device("cpu"))
    load_tokenizer(folder)
    assert not mark.exists()


def test_the_code_counts_for_the_fingerprint_only_where_it_may_run(folder: Path) -> None:
    assert "model:modeling_custom.py" not in model_digests(config(folder))
    trusted = config(folder, code_digest(folder))
    assert "model:modeling_custom.py" in model_digests(trusted)
    assert config(folder).content()["trust_remote_code"] is False
    assert trusted.content()["trust_remote_code"] is True


@pytest.mark.parametrize(
    "entry",
    [
        "org/name",
        "org/name@main",
        "org/name@0123456",
        f"org/name@{COMMIT.upper()}",
        f"org/name@{COMMIT}0",
        "/a/folder",
        "sha256:12",
        "*",
        f"../x/y@{COMMIT}",
        f"org/name@{COMMIT}\n",
        "",
    ],
)
def test_an_entry_that_pins_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError, match="does not pin the code"):
        ModelConfig(path="x", trust_remote_code=(entry,))


def test_a_hub_model_runs_code_only_at_the_listed_commit() -> None:
    listed = (f"org/name@{COMMIT}",)
    for revision in (None, "main", "f" * 40):
        with pytest.raises(ValidationError, match=r"set it to the commit"):
            ModelConfig(hub="org/name", revision=revision, trust_remote_code=listed)
    ModelConfig(hub="org/name", revision=COMMIT, trust_remote_code=listed)
    # A list may be longer than one recipe's model; it says nothing about this one.
    ModelConfig(hub="org/other", revision="main", trust_remote_code=listed)


def test_a_switch_for_everything_is_refused() -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"path": "x", "trust_remote_code": True})


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    folder: Path, mark: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(mark)))
    for refused in (
        lambda: load_base(config(folder), seed=0),
        lambda: model_digests(config(folder)),
    ):
        with pytest.raises(UserError, match=r"no \.safetensors file") as caught:
            refused()
        assert "save_pretrained('converted')" in str(caught.value)
    with pytest.raises(OSError, match="safetensors"):
        load_policy(folder, torch.device("cpu"))
    assert not mark.exists()


class _Touch:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self._mark, "it ran")
