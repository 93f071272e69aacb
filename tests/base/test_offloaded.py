"""Tensors whose values lie on another device than the one that computes with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.helpers.elsewhere import DEVICE, Elsewhere, device
from tfmq_fx.base import offloaded
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.mapped import on_disk
from tfmq_fx.base.offloaded import (
    Offloaded,
    bring_back,
    executing_on,
    home_of,
    loaded,
    lying_as,
    offload,
    usable_device,
)

VIEWS = (
    lambda x: x.t(),
    lambda x: x[1:],
    lambda x: x[:, ::2],
    lambda x: x.unsqueeze(0).squeeze(0),
    lambda x: x.detach(),
    lambda x: x.expand(2, *x.shape).select(0, 1),
    lambda x: x.split(1)[0].expand(3, -1),
)


@pytest.fixture(autouse=True)
def there():
    with device():
        yield


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", weight(3, 4))

    def forward(self, x, *, at):
        return {"y": self.second(self.first(x)) + self.table[at], "none": None}


def test_an_operator_computes_on_the_device_and_keeps_nothing():
    home, x = weight(5, 4), weight(2, 4).to(DEVICE)
    w = Offloaded(home, DEVICE)
    y = F.linear(x, w)
    assert w.device == y.device == DEVICE
    assert type(y) is Elsewhere
    assert torch.equal(y.cpu(), F.linear(x.cpu(), home))
    assert home_of(w) == home.device
    assert type(loaded(w)) is Elsewhere
    assert loaded(y) is y
    assert vars(w) == {"home": home}


@given(st.lists(st.sampled_from(VIEWS), max_size=4))
def test_views_are_offloaded_and_share_their_memory(chain):
    plain = weight(4, 4)
    w, expected = Offloaded(plain, DEVICE), plain
    for view in chain:
        if min(expected.shape) < 2:
            break
        w, expected = view(w), view(expected)
    assert type(w) is Offloaded
    assert (w.shape, w.stride(), w.storage_offset()) == (
        expected.shape,
        expected.stride(),
        expected.storage_offset(),
    )
    assert w.home.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
    assert torch.equal(w.cpu(), expected)


def test_what_is_written_in_place_is_written_where_it_lies():
    home = weight(3, 4)
    expected = home.clone().mul_(2)
    expected[1] = 0
    w = Offloaded(home, DEVICE)
    assert w.mul_(2) is w
    w[1] = 0
    torch.add(w, 1, out=w)
    assert torch.equal(home, expected + 1)


def test_gradients_go_through():
    w, x = Offloaded(weight(5, 4), DEVICE), weight(2, 4).to(DEVICE).requires_grad_()
    F.linear(x, w).sum().backward()
    assert torch.equal(x.grad.cpu(), weight(5, 4).sum(0).expand(2, 4))


def test_tensors_lie_as_others_do(monkeypatch):
    written = []
    monkeypatch.setattr(offloaded, "on_disk", lambda x: written.append(x) or on_disk(x))
    w, x = Offloaded(weight(3, 4), DEVICE), weight(3, 4).to(DEVICE) + 1
    found = lying_as(w, x, mapped=False)
    assert type(found) is Offloaded
    assert found.device == DEVICE
    assert torch.equal(found.home, weight(3, 4) + 1)
    assert lying_as(x, x, mapped=True) is x  # files are for the CPU's memory
    on_file = lying_as(w, x, mapped=True)
    assert torch.equal(on_file.home, found.home)
    assert len(written) == 1


def test_a_module_is_offloaded_and_put_back():
    m = Tied()
    before = {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
    undo = offload(m, DEVICE)
    assert {x.device for x in m.state_dict().values()} == {DEVICE}
    assert m.first.weight is m.second.weight
    assert type(m.first.weight) is type(m.table) is Offloaded
    assert isinstance(m.first.weight, nn.Parameter)
    assert type(m.first.bias.detach()) is Elsewhere  # a vector
    assert m.first.weight.home.data_ptr() == before["first.weight"].data_ptr()
    undo()
    after = {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
    assert after.keys() == before.keys()
    assert all(after[n] is before[n] for n in before)


def test_a_module_that_computed_there_is_brought_back():
    m = Tied()
    values = {n: x.clone() for n, x in m.state_dict().items()}
    pointer = m.table.data_ptr()
    offload(m, DEVICE)
    bring_back(m, torch.device("cpu"))
    assert m.table.data_ptr() == pointer  # no copy
    assert {type(x) for x in m.state_dict().values()} == {torch.Tensor}
    assert all(torch.equal(x, values[n]) for n, x in m.state_dict().items())


def test_a_module_computes_there_until_it_returns_what_it_was():
    m, x, at = Tied(), weight(2, 4), torch.tensor([2, 0])
    with torch.no_grad():
        expected = m(x, at=at)["y"]
        with executing_on([m], DEVICE):
            found = m(x, at=at)
            assert found["none"] is None
            assert type(found["y"]) is torch.Tensor  # where its input is
            assert type(m(x.to(DEVICE), at=at)["y"]) is Elsewhere
        assert torch.equal(found["y"], expected)
        with pytest.raises(ZeroDivisionError), executing_on([m], DEVICE):
            raise ZeroDivisionError
        assert not m._forward_pre_hooks
        assert not m._forward_hooks
        assert torch.equal(m(x, at=at)["y"], expected)
        with executing_on([m], torch.device("cpu")), executing_on([m], None):
            assert type(m.table) is torch.Tensor


def test_devices_that_do_not_exist_are_refused():
    assert usable_device(None, "execution_device") is None
    assert usable_device("cpu", "execution_device") == torch.device("cpu")
    for name in ("abacus", "cuda:99", 1.5):
        with pytest.raises(
            TFMQError, match=rf"execution_device {name}: cannot be used here .*use one of cpu"
        ):
            usable_device(name, "execution_device")
