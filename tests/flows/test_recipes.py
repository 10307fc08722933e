from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.recipes import SHIPPED, find_recipe, load_recipe, shipped_recipes
from schemas.base import UserError


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "dpo"])
def test_every_shipped_recipe_parses_under_every_algorithm_it_has(
    name: str, algorithm: str
) -> None:
    sections = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["rl"]
    if algorithm not in sections:
        pytest.skip(f"{name} has no rl.{algorithm}")
    config = load_recipe(name, [f"rl.algorithm={algorithm}"])
    assert config.name == name
    assert config.rl.algorithm == algorithm


def test_a_recipe_is_found_by_path_too(files_recipe: Path) -> None:
    assert load_recipe(str(files_recipe)).name == "files"


def test_a_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").write_text("name: other")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == SHIPPED / "quickstart.yaml"
    assert find_recipe("./quickstart").read_text() == "name: other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.grpo.clip_lo=1", "unknown field rl.grpo.clip_lo; did you mean clip_low?"),
        (
            "rl.grpo.learning_rat=1",
            "unknown field rl.grpo.learning_rat; did you mean rl.grpo.optimizer.learning_rate?",
        ),
        ("sed=1", "unknown field sed; did you mean seed?"),
        ("rollout.zzz=1", "unknown field rollout.zzz; fields here: engine, max_batch_size"),
        ("seed=many", "seed must be a whole number, not 'many'"),
        ("seed='1'", "seed must be a whole number, not '1'"),
        ("seed=1.5", "seed must be a whole number, not 1.5"),
        ("gate.confidence=.nan", "gate.confidence must be a finite number, not NaN"),
        ("gate.confidence=2", "gate.confidence: should be less than 1, not 2"),
        ("sft=3", "sft must be a section of fields, not 3"),
        ("sft=", "sft must be a section of fields, not empty"),
        ("sft.lora={target_modules: 3}", "sft.lora.target_modules cannot be 3"),
        ("data.evaluation.digest_range=x", "data.evaluation.digest_range must be a list, not 'x'"),
        ("rl.algorithm=grop", "rl.algorithm must be 'ppo', 'grpo', 'rloo' or 'dpo', not 'grop'"),
        ("rl.online.group_size=1", "rl.online.group_size must be at least 2, not 1"),
        ("rl.grpo=", "section rl.grpo is missing; add it"),
        ("sft.max_length=4000", "sft.max_length is 4000, but the model's context holds"),
        ("process_reward_model=", "reward.process needs a process reward model"),
        (
            "gate.limits=[{metric: pass@8, max: 1}]",
            "gate.limits.0.metric: the evaluation reports no metric pass@8; did you mean pass@4? "
            "It reports pass@1, pass@4, reward, kl, length, truncated_fraction, verifier, process, "
            "proxy",
        ),
        (
            "gate.limits=[{metric: kl, maxx: 1}]",
            "unknown field gate.limits.0.maxx; did you mean max?",
        ),
        ("gate.slices=[{field: level, min_primary: x}]", "min_primary must be a number, not 'x'"),
        ("seed.a=1", "--set seed.a=1: seed is 0, it has no field a"),
        ("seed", "--set seed: write it as --set section.field=value"),
        (".a=1", "--set .a=1: write it as"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
        ("evaluation.pass_at.9=1", "evaluation.pass_at is a list of 2; 9 is no index of it"),
    ],
)
def test_a_bad_override_names_the_place_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", [override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_is_listed_one_a_line() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", ["sed=1", "seed=x", "sft.max_lenght=3"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("--set: ") for line in lines)


def test_overrides_apply_in_order_and_make_sections() -> None:
    config = load_recipe(
        "quickstart",
        [
            "seed=1",
            "seed=2",
            "sft.optimizer.learning_rate=3e-4",
            "compute.num_threads=1",
            "evaluation.pass_at.1=2",
            "sft.lora.rank=4",
        ],
    )
    assert config.seed == 2
    assert config.sft.optimizer.learning_rate == 3e-4
    assert config.compute.num_threads == 1
    assert config.evaluation.pass_at == (1, 2)
    assert config.sft.lora is not None
    assert config.sft.lora.rank == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the recipe is empty"),
        (b"# nothing\n", "the recipe is empty"),
        (b"- 1\n", "a recipe is a mapping of sections, not the list [1]"),
        (b"name: a\nseed: [1,\n", ":3:1: not valid YAML: while parsing a flow node"),
        (b"name: a\n\tseed: 1\n", ":2:1: not valid YAML: "),
        (b"name: a\nseed: \xff\n", ":2: not UTF-8 (byte 0xff at position 14)"),
        (b"name: a\nseed: 1\nseed: 2\n", ":3: seed is given twice (first on line 2)"),
        (b"name: a\nrl:\n  grpo: {}\n  grpo: {}\n", ":4: rl.grpo is given twice (first on line 3)"),
        (b"name: a\x00\n", ":1: not valid YAML: character #x0000 is not allowed"),
        (b"name: !!python/name:os.system a\n", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_problem_in_a_file_names_its_line(files_recipe: Path) -> None:
    text = files_recipe.read_text().replace("max_length: 32", "max_lenght: 32")
    files_recipe.write_text(text)
    number = text[: text.index("max_lenght")].count("\n") + 1
    with pytest.raises(UserError) as caught:
        load_recipe(str(files_recipe))
    assert (
        f"{files_recipe}:{number}: unknown field sft.max_lenght; did you mean max_length?"
        in str(caught.value)
    )
    assert "sft.max_length is missing; add it" in str(caught.value)


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no recipe quikstart; did you mean quickstart\?"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match=r"recipe nowhere\.yaml does not exist"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(str(tmp_path))


def test_a_rule_across_sections_names_its_line(files_recipe: Path) -> None:
    text = files_recipe.read_text() + "gate:\n  limits:\n  - metric: lenght\n    max: 9\n"
    files_recipe.write_text(text)
    number = text.splitlines().index("  - metric: lenght") + 1
    with pytest.raises(UserError) as caught:
        load_recipe(str(files_recipe))
    assert str(caught.value) == (
        f"{files_recipe}:{number}: gate.limits.0.metric: the evaluation reports no metric lenght; "
        "did you mean length? It reports pass@1, reward, kl, length, truncated_fraction, verifier"
    )


def test_numbers_and_texts_are_read_as_people_write_them(files_recipe: Path) -> None:
    overrides = ["sft.optimizer.learning_rate=1e-3", "description=2026-11-24"]
    config = load_recipe(str(files_recipe), overrides)
    assert config.sft.optimizer.learning_rate == 0.001
    assert config.description == "2026-11-24"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 50_000, "nested more than 40 levels deep"),
        ("- " * 50_000 + "a", "nested more than 40 levels deep"),
        ("name: &a [*a]", "an alias holds itself"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "stands for more than 100000 values",
        ),
    ],
)
def test_a_small_file_that_would_take_for_ever_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))
