"""Recipes: what is refused, with which message, and how overrides count."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.files import InputError
from train.engine.recipe import AlignmentRecipe, Recipe, SftRecipe

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "train" / "recipes").rglob("*.yaml"))


@pytest.fixture
def values(files: dict[str, Path]) -> dict[str, Any]:
    return yaml.safe_load(files["recipe"].read_text())


def load(path: Path, values: Any, **overrides: Any) -> AlignmentRecipe:
    path = path / "a.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return AlignmentRecipe.load(path, overrides)


def refusal(path: Path, values: Any, **overrides: Any) -> str:
    with pytest.raises(InputError) as refused:
        load(path, values, **overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_recipe_is_read_as_it_is_written(tmp_path: Path, values: dict[str, Any]) -> None:
    """Every value arrives, with the type of its field."""
    recipe = load(tmp_path, values)
    found = dataclasses.asdict(recipe)
    assert {name: found[name] for name in values} == values
    assert all(type(getattr(recipe, field.name)) is field.type for field in dataclasses.fields(recipe))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_recipes_load(path: Path) -> None:
    """Every recipe of the repository is complete and valid."""
    kind = SftRecipe if path.stem.startswith("sft") else AlignmentRecipe
    assert isinstance(kind.load(path, {}), Recipe)


def test_an_unknown_key_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    """A typo would otherwise train with a default in silence."""
    assert "unknown key learning_rat;" in refusal(tmp_path, {**values, "learning_rat": 1.0})


@pytest.mark.parametrize("key", ["beta", "seed", "lr_schedule"])
def test_a_missing_key_is_named(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    """What decides a run has no hidden default."""
    del values[key]
    assert f"missing key {key}" in refusal(tmp_path, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 1.5), ("epochs", "3"), ("epochs", True), ("epochs", None), ("global_batch", [8]), ("beta", "much"),
        ("beta", True), ("learning_rate", None), ("lr_schedule", 3), ("seed", 0.0),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, values: dict[str, Any], key: str, value: Any) -> None:
    """Nothing is rounded or guessed."""
    assert f"{key} = {value!r} must be a " in refusal(tmp_path, {**values, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", -1e-4), ("learning_rate", 0.0), ("epochs", 0), ("global_batch", -8), ("micro_batch", 0),
        ("beta", 0.0), ("alpha", -1.0), ("seed", -1), ("max_grad_norm", 0.0), ("evaluate_every", 0),
        ("lora_rank", 0), ("max_tokens", -1),
        ("checkpoint_every", -2), ("weight_decay", -0.1), ("beta", float("nan")), ("max_response_tokens", 0),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_trained_with_is_named(
    tmp_path: Path, values: dict[str, Any], key: str, value: Any
) -> None:
    """Zero and negative values where they make no sense, and NaN anywhere."""
    assert f"recipe: {key} = {value} must be " in refusal(tmp_path, {**values, key: value})


def test_zero_is_allowed_where_it_has_a_meaning(tmp_path: Path, values: dict[str, Any]) -> None:
    """alpha = 0 is the limit of one best response; a seed, a decay and a warm-up may be 0."""
    recipe = load(tmp_path, values, alpha=0.0, seed=0, warmup_ratio=0.0, weight_decay=0.0)
    assert (recipe.alpha, recipe.seed) == (0.0, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_ratio", 1.5), ("warmup_ratio", 1.0), ("adam_beta1", 1.0), ("adam_beta2", 2.0), ("lr_schedule", "linaer"),
     ("learning_rate", float("inf")), ("tuning", "qlorra"), ("dtype", "float16"), ("optimizer", "adamm"),
     ("long_prompts", "cut"), ("attention", "flash"), ("router_aux_loss", "0.02")],
)  # fmt: skip
def test_a_value_above_its_range_is_named(tmp_path: Path, values: dict[str, Any], key: str, value: Any) -> None:
    """A share of all steps is below 1 (the Trainer would take 1.5 for a number of steps), and so are Adam's betas."""
    assert key in refusal(tmp_path, {**values, key: value})


@pytest.mark.parametrize(("written", "value"), [("1e-4", 1e-4), ("5E-7", 5e-7), ("3", 3.0), ("1.0e-4", 1e-4)])
def test_numbers_in_any_notation(tmp_path: Path, values: dict[str, Any], written: str, value: float) -> None:
    """YAML reads 1e-4 as a string and 3 as an integer; both are learning rates."""
    text = "".join(f"{k}: {v}\n" for k, v in values.items() if k != "learning_rate")
    assert load(tmp_path, f"learning_rate: {written}\n{text}").learning_rate == value


def test_overrides_replace_values(tmp_path: Path, values: dict[str, Any], files: dict[str, Path]) -> None:
    """An override wins, even if it is 0; None leaves the file's value; the override is checked as well."""
    recipe = load(tmp_path, {**values, "seed": 7}, seed=0, beta=None, epochs=5)
    assert (recipe.seed, recipe.beta, recipe.epochs) == (0, values["beta"], 5)
    assert "epochs = -1" in refusal(tmp_path, values, epochs=-1)
    parser = argparse.ArgumentParser()
    AlignmentRecipe.add_arguments(parser)
    words = ["--recipe", str(files["recipe"]), "--learning-rate", "1e-4", "--global-batch", "4", "--alpha", "0"]
    recipe = AlignmentRecipe.from_arguments(parser.parse_args(words))
    changed = {"learning_rate": 1e-4, "global_batch": 4, "alpha": 0.0}
    assert dataclasses.asdict(recipe) == {**dataclasses.asdict(load(tmp_path, values)), **changed}


def test_a_switch_is_true_or_false(tmp_path: Path, values: dict[str, Any], files: dict[str, Path]) -> None:
    """`--gradient-checkpointing false` means false, as in YAML; other words are refused."""
    parser = argparse.ArgumentParser()
    AlignmentRecipe.add_arguments(parser)
    for word, meaning in (("true", True), ("false", False)):
        words = ["--recipe", str(files["recipe"]), "--gradient-checkpointing", word]
        assert AlignmentRecipe.from_arguments(parser.parse_args(words)).gradient_checkpointing is meaning
    with pytest.raises(SystemExit):
        parser.parse_args(["--recipe", "x", "--gradient-checkpointing", "maybe"])
    assert "gradient_checkpointing = 1 must be a bool" in refusal(tmp_path, {**values, "gradient_checkpointing": 1})


def test_some_checkpoint_is_written(tmp_path: Path, values: dict[str, Any]) -> None:
    """Checkpoints come by steps or by minutes; without either nothing could be resumed."""
    assert load(tmp_path, values, checkpoint_every=0, checkpoint_minutes=5.0).checkpoint_minutes == 5
    assert "set checkpoint_every" in refusal(tmp_path, values, checkpoint_every=0)


def test_accumulation_is_exact_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    """global batch = micro batch x accumulation x processes, or an error that names all three."""
    recipe = load(tmp_path, values, global_batch=24, micro_batch=4)
    assert [recipe.accumulation(processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    for processes in (4, 5, 12):
        with pytest.raises(InputError, match=rf"global_batch = 24 .*micro_batch x processes = 4 x {processes};"):
            recipe.accumulation(processes)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "just words", "a: \x00"])
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    """Broken YAML, a list, an empty file: the message names the file."""
    assert "a.yaml: " in refusal(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path is in the message; a folder is no recipe either."""
    with pytest.raises(InputError, match=r"none\.yaml: no such recipe"):
        AlignmentRecipe.load(tmp_path / "none.yaml", {})
    with pytest.raises(InputError, match=f"{tmp_path}"):
        AlignmentRecipe.load(tmp_path, {})
