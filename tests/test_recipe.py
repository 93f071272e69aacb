"""Recipes as JSON: what `to_json` gives comes back, and what a person mistypes is named."""

import dataclasses
import json

import pytest

import tfmq_fx
from benchmarks.networks.small import FAST
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.recipe import PRESETS, Recipe, Rule


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
        ({"reconstruction": {"iterations": 1.5}}, "Recipe.reconstruction.iterations: 1.5 is not of type int"),
        (
            {"reconstruction": {"beta": [1]}},
            "Recipe.reconstruction.beta: [1] is not of type tuple[float, float]",
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
    [("[1]", "holds no JSON object"), ("{", "is not valid JSON"), (None, "cannot be read")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    file = tmp_path / "recipe.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TFMQError) as error:
        Recipe.read(file)
    assert message in str(error.value)
    assert "recipe.json" in str(error.value)


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
        TFMQError, match=r"(Recipe|Rule\('\*'\))\.group_size: .* is not a valid group size; use an integer"
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
