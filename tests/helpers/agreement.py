"""Compare two computations of the same network, within measured bounds."""

import torch

# Another batch size adds floats in another order. Where nothing is rounded to integers in between, that changes
# results by a few float32 steps: 4.5e-7 of the largest output was measured. Fifty steps are allowed.
CLOSE = 50 * torch.finfo(torch.float32).eps
# An activation within that distance of a rounding tie may be rounded the other way, by a whole step of 1/255 of
# its range, and everything computed from it in its row changes as well. A row has thousands of 8-bit activations,
# and the distance is about 1e-5 of a step, so a few rows in a hundred have such a flip: 0 to 3% measured, 10%
# allowed. None moves by more than a few steps: 0.5% of the largest output measured, 3% allowed.
FLIPPED_ROWS, FLIPPED_BY = 0.1, 0.03


def moved(got, expected):
    """Return a mask of the rows that differ by more than float rounding, and the largest difference.

    The latter is relative to the largest output.
    """
    difference = (got - expected).abs().flatten(1).amax(1) / expected.abs().max()
    return difference > CLOSE, difference.max().item()


def assert_same_but_for_flips(pairs):
    """Assert that pairs (got, expected) of rows agree.

    The share of rows with a flip is bounded over all pairs together.
    """
    masks, worst = zip(*(moved(got, expected) for got, expected in pairs), strict=True)
    assert torch.cat(masks).float().mean() <= FLIPPED_ROWS
    assert max(worst) <= FLIPPED_BY
