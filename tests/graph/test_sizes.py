"""Which sizes of a captured graph may differ, and what has to hold where they do."""

import json

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TinyUNet, Tokens, captured
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import meta_value
from tfmq_fx.graph.sizes import holds, shown, sizes_in, sizes_of

T = torch.tensor([3, 500])


def found(gm):
    return sizes_of(gm, meta_value(placeholders(gm)["timestep"]).shape[0])


def test_a_picture_may_have_any_height_and_width_and_the_conditions_say_which():
    sizes = found(captured(TinyUNet))
    assert sizes.moving == {("sample", 2): 8, ("sample", 3): 8}
    assert json.loads(json.dumps(sizes.conditions)) == list(sizes.conditions)
    for height, width, fits in ((8, 8, True), (64, 24, True), (8, 9, False), (1, 8, False)):
        now = {("sample", 0): 5, ("sample", 1): 1, ("sample", 2): height, ("sample", 3): width}
        assert all(holds(c, now) for c in sizes.conditions) == fits


def test_a_number_of_tokens_in_the_code_is_fixed():
    assert found(captured(Tokens)).moving == {}


class Positions(nn.Module):
    """Tokens and their positions, which come without a batch: neither can move alone."""

    def __init__(self):
        super().__init__()
        self.time, self.layer = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, tokens, timestep, positions):
        angle = positions.float().sum(1)[None, :, None]
        return self.layer(tokens) * angle.cos() + self.time(timestep[:, None].float())[:, None]


def test_sizes_that_depend_on_each_other_move_together():
    gm = tfmq_fx.capture(
        Positions().eval(),
        {"tokens": torch.randn(2, 6, 4), "timestep": T, "positions": torch.arange(18).reshape(6, 3)},
    )
    assert found(gm).moving == {("tokens", 1): 6, ("positions", 0): 6}


class Picks(nn.Module):
    """Its rows are picked by number, so that a trace does not see that there is a timestep for each."""

    def __init__(self):
        super().__init__()
        self.time, self.layer = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, tokens, timestep):
        emb = self.time(timestep[:, None].float())[torch.arange(tokens.shape[0])]
        return self.layer(tokens + emb[:, None])


def test_rows_are_the_batch_even_if_nothing_compares_them():
    gm = tfmq_fx.capture(Picks().eval(), {"tokens": torch.randn(2, 6, 4), "timestep": T})
    batch = meta_value(placeholders(gm)["tokens"]).shape[0]
    assert sizes_of(gm, batch).moving == {("tokens", 1): 6}


class Repeats(Picks):
    """The temporal block repeats its features for each token: their number is part of what leaves it."""

    def forward(self, tokens, timestep):
        of = torch.arange(tokens.shape[0]).repeat_interleave(tokens.shape[1])
        emb = self.time(timestep[:, None].float())[of]
        return self.layer(tokens.flatten(0, 1) + emb).unflatten(0, tokens.shape[:2])


def test_a_size_of_the_temporal_block_is_fixed():
    assert (
        found(tfmq_fx.capture(Repeats().eval(), {"tokens": torch.randn(2, 6, 4), "timestep": T})).moving == {}
    )


@pytest.mark.parametrize(
    "condition",
    [["unknown"], ["Mod", ["size", "x", 0], 0], ["Equality", ["size", "y", 0], 2], ["Nothing", 1]],
)
def test_a_condition_that_cannot_be_told_does_not_hold(condition):
    assert not holds(condition, {("x", 0): 2})


def test_conditions_are_readable():
    assert shown(["Equality", ["Mod", ["Add", -1, ["size", "x", 2]], 4], 0]) == "((-1 + x.shape[2]) % 4) == 0"


class Frames(Picks):
    """It treats many frames of all samples in another way, which computes the same."""

    def forward(self, tokens, timestep):
        h = tokens.flatten(0, 1)
        h = h.contiguous() if h.shape[0] >= 64 else h
        return self.layer(h.unflatten(0, tokens.shape[:2]) + self.time(timestep[:, None].float())[:, None])


def test_a_limit_of_frames_and_rows_holds_for_one_row():
    sizes = found(tfmq_fx.capture(Frames().eval(), {"tokens": torch.randn(2, 6, 4), "timestep": T}))
    assert sizes.moving == {("tokens", 1): 6}
    assert not any(("tokens", 0) in sizes_in(c) for c in sizes.conditions)
    for rows, frames, fits in ((2, 6, True), (100, 6, True), (1, 63, True), (1, 64, False)):
        now = {("tokens", 0): rows, ("tokens", 1): frames, ("tokens", 2): 4, ("timestep", 0): rows}
        assert all(holds(c, now) for c in sizes.conditions) == fits
