"""NaN in an input is NaN in the output's row, whatever computes it."""

import pytest
import torch

from benchmarks.networks.small import TinyUNet
from tests.helpers.lowered import lower
from tests.helpers.nearest import quantized
from tfmq_fx.artefact.nan_rows import with_nan_rows

X, T = torch.randn(3, 1, 8, 8), torch.tensor([100, 300, 500])


@pytest.mark.parametrize("lowered", [False, True])
def test_only_the_row_with_nan_is_nan(lowered):
    q = quantized("w8a8", network_class=TinyUNet)
    network = lower(q, engine="torch", compile=False, precision="float32", batch=3) if lowered else q
    x = X.clone()
    x[1, 0, 2, 3] = torch.nan
    with torch.no_grad():
        y, clean = network(x, T), network(X, T)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not clean.isnan().any()


def test_an_input_without_rows_counts_for_all_and_integers_stay():
    y = {"a": torch.ones(3, 2), "b": [torch.ones(2), None, torch.ones(3, dtype=torch.int64)]}
    bad = torch.tensor(torch.nan)
    found = with_nan_rows(y, [X, bad], sample=X)
    assert found["a"].isnan().all()
    assert found["b"][0].isnan().all()
    assert found["b"][1] is None
    assert torch.equal(found["b"][2], y["b"][2])
    assert with_nan_rows(y, [X], sample=X) is y


def test_infinity_is_nan_in_the_noisy_sample_and_a_masks_elsewhere():
    x = X.clone()
    x[1, 0, 2, 3] = torch.inf
    mask = torch.full((3, 4), -torch.inf)
    assert with_nan_rows(X, [x, mask], sample=x).isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_another_device_is_not_waited_for():
    """torch has no value of a tensor on the meta device: to ask for one would raise."""
    x = X.to("meta")
    assert with_nan_rows(x, [x], sample=x).shape == X.shape


def test_a_compiled_call_keeps_it_too():
    q = quantized("w8a8", network_class=TinyUNet)
    compiled = torch.compile(q, backend="eager")
    x = X.clone()
    x[2] = torch.nan
    with torch.no_grad():
        assert compiled(x, T)[2].isnan().all()
