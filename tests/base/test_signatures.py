"""How networks and wrappers around them are called."""

import torch
from torch import nn

from tfmq_fx.base.signatures import call_of, hides_arguments, parameters_of, signature_of, takes_any


class Named(nn.Module):
    def forward(self, x, t, y=3):
        return x + t + y


class Hidden(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)[0] if len(inner) == 1 else nn.ModuleList(inner)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class OnlyPositions(Hidden):
    def forward(self, *args):
        return self.inner(*args)


class Strict(nn.Module):
    def forward(self, x, t, /, *rest, y, **more):
        return x, t, rest, y, more


def test_a_wrapper_has_the_signature_of_what_is_in_it():
    for wrapper in (
        Hidden(Named()),
        Hidden(Hidden(Named())),
        nn.DataParallel(Named()),
        torch.compile(Named(), backend="eager"),
    ):
        assert hides_arguments(wrapper)
        assert list(signature_of(wrapper).parameters) == ["x", "t", "y"]
        assert not takes_any(wrapper)
    assert not hides_arguments(Named())


def test_a_wrapper_of_networks_with_different_arguments_keeps_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Named(), nn.Linear(2, 2)

        def forward(self, *args, **kwargs):
            return self.a(*args, **kwargs)

    assert list(signature_of(Two()).parameters) == ["args", "kwargs"]
    assert takes_any(Two())
    assert list(parameters_of(Two())) == ["args"]


def test_arguments_go_by_name_where_the_network_takes_names():
    assert call_of(Named(), {"x": 1, "t": 2}) == ((), {"x": 1, "t": 2})
    assert call_of(Hidden(Named()), {"x": 1, "t": 2}) == ((), {"x": 1, "t": 2})
    assert call_of(OnlyPositions(Named()), {"x": 1, "t": 2}) == ((1, 2), {})
    assert call_of(Strict(), {"x": 1, "t": 2, "rest": [5, 6], "y": 3, "z": 4}) == (
        (1, 2, 5, 6),
        {"y": 3, "z": 4},
    )
