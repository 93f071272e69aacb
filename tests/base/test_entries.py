"""Rows with one timestep each, as samples that have several."""

import torch

from tfmq_fx.base.entries import entries_of, packed, per_sample

T = torch.tensor([9, 5, 1, 0, 7])


def test_rows_fill_samples_and_are_found_again():
    samples, where = packed({"t": T}, "t", (1, 2, 1))
    assert samples["t"].shape == (3, 1, 2, 1)
    assert torch.equal(samples["t"].reshape(-1)[where], T)
    samples, where = packed({"t": T}, "t", (100,))
    assert samples["t"].shape == (1, 100)
    assert torch.equal(samples["t"].reshape(-1)[where], T)


def test_rows_share_a_sample_only_with_equal_conditions():
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    samples, where = packed({"t": T, "y": y}, "t", (2,))
    assert samples["y"].shape == (3, 2)  # two for the first condition, one for the second
    assert torch.equal(samples["t"].reshape(-1)[where], T)
    assert torch.equal(samples["y"].repeat_interleave(2, 0)[where], y)


def test_samples_become_rows_with_their_conditions():
    rows = entries_of({"t": torch.tensor([[9, 5], [1, 0]]), "y": torch.tensor([3, 4])}, "t")
    assert rows["t"].tolist() == [9, 5, 1, 0]
    assert rows["y"].tolist() == [3, 3, 4, 4]
    assert entries_of({"t": T, "y": T}, "t")["y"] is T


def test_a_samples_own_timestep_is_its_largest():
    assert per_sample(torch.tensor([[9, 5], [0, 1]])).tolist() == [9, 1]
    assert per_sample(torch.tensor([[[[2.0]], [[3.0]]]])).tolist() == [3.0]
    assert per_sample(T) is T
