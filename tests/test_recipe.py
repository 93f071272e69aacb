"""Recipes as JSON: what `to_json` gives comes back, and what a person mistypes is named."""

import dataclasses
import json

import numpy as np
import pytest

import tfmq_fx
from benchmarks.networks.small import FAST
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.recipe import PRESETS, Recipe, Reconstruction, Rule


@pytest.mark.parametrize(
    "recipe",
    [
        *PRESETS.values(),
        Recipe(rules=(Rule(pattern="a.*", weight_bits=8), Rule(pattern="b", op="linear", group_size=64))),
        Recipe(maintain="auto", maintain_bytes=1000, unseen="float", smooth=0.5, temporal_observer="kl"),
    ],
)
def test_a_recipe_comes_back_from_its_file(tmp_path, recipe):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    assert Recipe.read(file) == recipe


def test_fields_left_out_have_their_defaults():
    found = Recipe.from_json({"weight_bits": 8, "smooth": 1, "reconstruction": {"method": "gptq"}})
    assert found.smooth == 1
    assert found.reconstruction.method == "gptq"
    assert found.activation_bits == Recipe().activation_bits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wieght_bits": 4}, "Recipe: unknown field 'wieght_bits'; known are weight_bits"),
        ({"smooth": "x"}, "Recipe.smooth: 'x' is unknown; use 'auto', or a number from 0 to 1"),
        ({"low_rank": "x"}, "Recipe.low_rank: 'x' is not of type int | None"),
        ({"group_size": True}, "Recipe.group_size: True is not of type int | None"),
        ({"max_table_entries": "7"}, "Recipe.max_table_entries: '7' is not of type int"),
        ({"temporal_observer": "mine.Observer"}, "Recipe.temporal_observer: 'mine.Observer' is unknown"),
        ({"rules": {}}, "Recipe.rules: {} is not a list"),
        ({"rules": ["a"]}, "Recipe.rules[0]: 'a' is not a JSON object"),
        ({"rules": [{"weight_bits": 4}]}, "Recipe.rules[0]: no pattern"),
        ({"reconstruction": {"iterations": 1.5}}, "Reconstruction.iterations: 1.5 is not of type int"),
        (
            {"reconstruction": {"beta": [1]}},
            "Reconstruction.beta: [1] is not of type tuple[float, float]",
        ),
        ({"reconstruction": {"batch_size": 0}}, "Reconstruction.batch_size: 0 is not positive"),
        ({"weight_bits": 9}, "Recipe.weight_bits: 9 is not a supported bit width"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(TFMQError) as error:
        Recipe.from_json(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "is not valid JSON"),
        (None, "cannot be read"),
        ('{"weight_bits": 4, "weight_bits": 8}', "is not valid JSON ('weight_bits' is there twice)"),
        ('{"smooth": NaN}', "is not valid JSON (it has no NaN)"),
        ('{"reconstruction": {"damping": Infinity}}', "is not valid JSON (it has no Infinity)"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    file = tmp_path / "recipe.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TFMQError) as error:
        Recipe.read(file)
    assert message in str(error.value)
    assert "recipe.json" in str(error.value)


def test_a_file_may_be_named_by_a_string(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    assert Recipe.read(str(tmp_path / "recipe.json")) == Recipe()


@pytest.mark.parametrize(
    ("cls", "change", "words"),
    [
        (Recipe, {"reconstruction": "nearest"}, "is not of type Reconstruction"),
        (Recipe, {"reconstruction": {"method": "nearest"}}, "is not of type Reconstruction"),
        (Recipe, {"reconstruction": None}, "is not of type Reconstruction"),
        (Recipe, {"rules": Rule(pattern="a")}, r"is not of type tuple\[Rule, \.\.\.\]"),
        (Recipe, {"rules": [{"pattern": "a"}]}, r"is not of type tuple\[Rule, \.\.\.\]"),
        (Recipe, {"rules": None}, r"is not of type tuple\[Rule, \.\.\.\]"),
        (Recipe, {"shared_zero_point": "no"}, "is not of type bool"),
        (Recipe, {"smooth": True}, r"is not of type float \| str \| None"),
        (Recipe, {"rotate": 8.0}, r"is not of type int \| None"),
        (Recipe, {"low_rank": True}, r"is not of type int \| None"),
        (Recipe, {"max_table_entries": 2.5}, "is not of type int"),
        (Recipe, {"float_flops": None}, "is not of type float"),
        (Recipe, {"float_flops": float("nan")}, "is not a finite number"),
        (Recipe, {"maintain_bound": "1"}, "is not of type float"),
        (Recipe, {"temporal_observer": 5}, r"is not of type str \| type\[TemporalObserver\]"),
        (Recipe, {"temporal_observer": int}, r"is not of type str \| type\[TemporalObserver\]"),
        (Reconstruction, {"tune_iterations": 2.5}, r"is not of type int \| None"),
        (Reconstruction, {"max_memory": "8GB"}, "is not of type float"),
        (Reconstruction, {"max_memory": float("nan")}, "is not a finite number"),
        (Reconstruction, {"max_memory": -1}, "is negative"),
        (Reconstruction, {"damping": -1}, "is negative"),
        (Reconstruction, {"gptq_memory": -2}, "is not positive"),
        (Reconstruction, {"learning_rate": -1}, "is not positive"),
        (Reconstruction, {"warmup": 2}, "is not a share"),
        (Reconstruction, {"beta": 3}, r"is not of type tuple\[float, float\]"),
        (Reconstruction, {"beta": (20.0, 0.0)}, "are not two positive numbers"),
        (Reconstruction, {"shards": True}, "is not of type int"),
        (Rule, {"pattern": 5}, "is not of type str"),
        (Rule, {"pattern": "a", "activation_terms": 3}, "is not 1 or 2"),
        (Rule, {"pattern": "a", "op": "conv"}, "is unknown; use one of linear, conv1d, conv2d"),
    ],
)
def test_the_constructors_check_types_and_ranges(cls, change, words):
    *_, name = change
    with pytest.raises(TFMQError, match=rf"^{cls.__name__}.*\.{name}: .* {words}") as error:
        cls(**change)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_become_pythons_and_lists_tuples():
    settings = Reconstruction(iterations=np.int64(3), learning_rate=np.float32(0.5), beta=[20, 2])
    recipe = Recipe(weight_bits=np.int64(8), smooth=1, rules=[Rule(pattern="a")], reconstruction=settings)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert hash(recipe) == hash(dataclasses.replace(recipe, smooth=1.0, rules=(Rule(pattern="a"),)))


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (Recipe.preset, None, "recipe: None is not a preset; presets are w8a8"),
        (Recipe.preset, ["w4a8"], "is not a preset"),
        (Recipe.preset, "mine.json", r"for a file, use Recipe\.read\(file\)"),
        (Recipe.from_json, '{"weight_bits": 4}', "is not a JSON object; give a dict of Recipe's fields"),
        (Recipe.from_json, [1], "is not a JSON object"),
    ],
)
def test_what_is_no_recipe_is_named(read, value, words):
    with pytest.raises(TFMQError, match=words):
        read(value)


@pytest.mark.parametrize(
    "changes",
    [
        {"maintain": "remember"},
        {"cache_type": "int4"},
        {"maintain_bound": -1.0},
        {"maintain_bytes": 0},
        {"maintain_bytes": 9, "maintain": "cache"},
    ],
)
def test_a_recipe_checks_its_maintenance(changes):
    with pytest.raises(TFMQError, match=f"Recipe.{next(iter(changes))}"):
        tfmq_fx.Recipe(**changes)


@pytest.mark.parametrize("size", [0, 1, -32, True, 32.0, "32"])
@pytest.mark.parametrize("owner", [tfmq_fx.Recipe, lambda **k: tfmq_fx.Rule(pattern="*", **k)])
def test_a_size_that_is_none_is_refused(owner, size):
    with pytest.raises(
        TFMQError,
        match=r"(Recipe|Rule\('\*'\))\.group_size: .* is not (a valid group size|of type int \| None)",
    ):
        owner(group_size=size)


def test_an_unknown_granularity_is_refused():
    words = r"activation_granularity: 'row' is unknown; use one of tensor, token"
    with pytest.raises(TFMQError, match=rf"Recipe\.{words}"):
        tfmq_fx.Recipe(activation_granularity="row")
    with pytest.raises(TFMQError, match=rf"Rule\('a\.\*'\)\.{words}"):
        tfmq_fx.Rule(pattern="a.*", activation_granularity="row")


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "edge_weight_bits", "attention_bits"])
def test_bits_outside_the_supported_are_refused(field):
    with pytest.raises(TFMQError, match=rf"Recipe\.{field}: 9 is not a supported bit width"):
        dataclasses.replace(tfmq_fx.Recipe(), **{field: 9})


@pytest.mark.parametrize(
    "change", [{"method": "magic"}, {"iterations": 0}, {"batch_size": -1}, {"tune_iterations": -1}]
)
def test_bad_settings_are_refused(change):
    with pytest.raises(TFMQError, match=rf"Reconstruction\.{next(iter(change))}"):
        dataclasses.replace(FAST, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smooth": 2.0}, "not between 0 and 1"),
        ({"rotate": 12}, "not a power of two"),
        ({"low_rank": 0}, "not positive"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change, words):
    with pytest.raises(TFMQError, match=rf"Recipe\.{next(iter(change))}: .*{words}"):
        dataclasses.replace(tfmq_fx.Recipe(), **change)
