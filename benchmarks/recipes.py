"""Variants of presets that several benchmarks measure."""

from __future__ import annotations

import dataclasses

from tfmq_fx.recipe import Recipe


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
