"""Recipes by the names of rows: a preset, and what of it is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tfmq_fx.recipe import Recipe, Reconstruction


def named(name: str) -> Recipe:
    """Return the recipe of a row, such as "w8a8", the preset, or "w4a8 gptq", with one of CHANGES.

    Raises ValueError for an unknown preset or change.
    """
    preset, _, change = name.partition(" ")
    if change and change not in CHANGES:
        raise ValueError(f"{name!r}: {change!r} is no change of a recipe; use one of {', '.join(CHANGES)}.")
    recipe = Recipe.preset(preset)
    return CHANGES[change](recipe) if change else recipe


def unchosen(recipe: Recipe) -> Recipe:
    """Return the recipe with nothing left to choose by the network. At few bits of activations, one exponent smooths all."""
    return dataclasses.replace(
        recipe,
        smooth=0.5 if recipe.activation_bits < 8 else None,
        keyed="block",
        activation_observer=Recipe().activation_observer,
        float_flops=0.0,
        double_flops=0.0,
        float_bytes=0.0,
    )


def nearest(recipe: Recipe) -> Recipe:
    """Return the recipe with weights rounded to nearest."""
    return dataclasses.replace(recipe, reconstruction=Reconstruction(method="nearest"))


def rounded(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with changed fields of its `Reconstruction`."""
    return dataclasses.replace(recipe, reconstruction=dataclasses.replace(recipe.reconstruction, **changes))


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "unchosen": unchosen,
    "nearest": nearest,
    "plain": lambda recipe: nearest(unchosen(recipe)),
    "gptq": lambda recipe: rounded(recipe, method="gptq", tune_iterations=0),
    "corrected": lambda recipe: rounded(recipe, corrected=True),
    "uncorrected": lambda recipe: rounded(recipe, corrected=False),
    "float8": lambda recipe: dataclasses.replace(recipe, linear_dtype="float8_e4m3fn"),
    "attention": lambda recipe: dataclasses.replace(recipe, attention_bits=8),
    "all int8": lambda recipe: dataclasses.replace(recipe, edge_activation_bits=8),
    "keyed": lambda recipe: dataclasses.replace(recipe, keyed="all"),
}
