"""A graph that computes on a device on which its weights do not lie."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import Labelled, Tokens, calibration, labelled_data, make
from tests.helpers.elsewhere import DEVICE, Elsewhere, device
from tfmq_fx.base.metrics import first_tensor
from tfmq_fx.base.offloaded import Offloaded
from tfmq_fx.calibration.data import inputs_of
from tfmq_fx.passes import offload_weights, return_weights

DATA = {Tokens: calibration, Labelled: labelled_data}


@pytest.fixture(autouse=True)
def there():
    with device():
        yield


def graph(cls=Labelled):
    data = DATA[cls]()
    return tfmq_fx.capture(make(cls), data.arguments(slice(0, 2))), data


@pytest.mark.parametrize("cls", DATA)
def test_the_values_are_the_same(cls):
    gm, data = graph(cls)
    batch = data.batch(torch.arange(3))
    with torch.no_grad():
        expected = gm(*inputs_of(gm, batch))
        operators = [(n.op, n.target) for n in gm.graph.nodes]
        assert offload_weights(gm, device=DEVICE).modified
        assert [(n.op, n.target) for n in gm.graph.nodes] == operators
        inputs = inputs_of(gm, batch)
        assert {x.device for x in inputs} == {DEVICE}
        found = gm(*inputs)
    torch.testing.assert_close(
        first_tensor(found).cpu(), first_tensor(expected)
    )  # attention has another kernel


def test_matrices_stay_where_they_lie_and_vectors_move():
    gm, _ = graph()
    pointers = {n: x.data_ptr() for n, x in gm.state_dict().items()}
    offload_weights(gm, device=DEVICE)
    for name, x in gm.state_dict().items():
        assert type(x) is (Offloaded if x.dim() > 1 else Elsewhere)
        assert x.dim() < 2 or x.home.data_ptr() == pointers[name]


def test_it_changes_nothing_twice_and_is_undone():
    gm, _ = graph()
    code, tensors = gm.code, {n: x.clone() for n, x in gm.state_dict().items()}
    assert not return_weights(gm, device=torch.device("cpu")).modified
    offload_weights(gm, device=DEVICE)
    assert not offload_weights(gm, device=DEVICE).modified
    assert return_weights(gm, device=torch.device("cpu")).modified
    assert gm.code == code
    assert {type(x) for x in gm.state_dict().values()} == {torch.Tensor}
    assert all(torch.equal(x, tensors[n]) for n, x in gm.state_dict().items())
