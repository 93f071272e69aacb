"""Calls are copied as they are made; what only some of them have is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.calls import Constants, call_leaves, defaults_of, recorded


class Popping(nn.Module):
    """A network that empties the list it is given."""

    def forward(self, x, t, residuals=None, scale=1.0, options=None, label=5, return_dict=True):  # noqa: ARG002
        while residuals:
            x = x + residuals.pop()
        return x * scale


class Open(nn.Module):
    def forward(self, x, t, **kwargs):  # noqa: ARG002
        return x + kwargs["y"]


def test_a_call_is_kept_as_it_was_when_it_was_made():
    network, x, options = Popping(), torch.zeros(2), {"scales": [1.0], "mask": np.zeros(2)}
    with recorded(network) as calls:
        for step in range(3):
            network(x, step, residuals=[torch.ones(2), torch.ones(2)], options=options)
            x += 1
            options["scales"][0] += 1
            options["mask"] += 1
    assert [c["x"].tolist() for c in calls] == [[0, 0], [1, 1], [2, 2]]
    assert [len(c["residuals"]) for c in calls] == [2, 2, 2]
    assert [c["options"]["scales"] for c in calls] == [[1.0], [2.0], [3.0]]
    assert [c["options"]["mask"].tolist() for c in calls] == [[0, 0], [1, 1], [2, 2]]
    assert not network._forward_pre_hooks


def test_calls_share_what_they_have_in_common_even_if_made_anew_or_in_turn():
    network = Popping()
    with recorded(network) as calls:
        for step in range(4):
            network(torch.full((2,), float(step)), step, [torch.full((2,), float(step % 2))])
    given = [c["residuals"][0] for c in calls]
    assert given[2] is given[0]
    assert given[3] is given[1]
    assert given[0] is not given[1]


def test_arguments_of_a_forward_with_kwargs_have_their_own_names():
    network = Open()
    with recorded(network) as calls:
        network(torch.zeros(2), 1, y=torch.ones(2))
    assert list(calls[0]) == ["x", "t", "y"]


def test_a_none_is_kept_where_the_network_has_another_default():
    call = {"x": torch.zeros(2), "label": None, "options": {"mask": None}, "residuals": None}
    found = call_leaves(call, defaults_of(Popping()))
    assert set(found) == {"x", "label", "options_mask"}
    assert found["options_mask"] == (("options", "mask"), None)


def test_an_empty_argument_is_kept_where_the_network_needs_one():
    call = {"x": torch.zeros(2), "t": {}, "residuals": [], "options": {"scales": []}, "y": ([],)}
    assert list(call_leaves(call, defaults_of(Popping()))) == ["x", "t", "y"]
    assert call_leaves(call, defaults_of(Popping()))["y"] == (("y",), ([],))


def constants_of(*calls, others=None):
    """Return the constants of calls whose `x` has rows, and the calls' kinds."""
    constants, kinds = Constants(defaults_of(Popping()), others), []
    for call in calls:
        found = call_leaves({"x": torch.zeros(2), **call}, defaults_of(Popping()))
        kinds.append(constants.take(found, {"x", "residuals_0"} & found.keys()))
    return constants, kinds


def taken(*calls):
    return constants_of(*calls)[0].values


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (
            [{"options": torch.zeros(3)}, {"options": torch.zeros(3)}, {}],
            "'options' is given in calls 1 to 2 of the network and not in call 3",
        ),
        ([{}, {"residuals": [torch.ones(2)]}], "'residuals_0' is given in call 2 .* and not in call 1;"),
        (
            [{"scale": float(i)} for i in range(5)],
            "'scale' has no rows, but is 4.0 in call 5 of the network after 4 other kinds of calls;",
        ),
        (
            [{"options": torch.zeros(3)}, {"options": torch.ones(3)}],
            r"'options' has no rows, but is a Tensor of shape \(3,\) in call 2",
        ),
    ],
)
def test_what_only_some_calls_have_is_named_with_the_calls(calls, words):
    with pytest.raises(TFMQError, match=words):
        taken(*calls)


def test_plain_values_that_only_some_calls_have_make_kinds_of_calls():
    calls = ({"scale": 2.0}, {"options": {"layers": [7]}}, {"scale": 2.0}, {"label": None, "scale": 2.0}, {})
    constants, kinds = constants_of(*calls)
    assert kinds == [0, 1, 0, 2, 3]
    assert constants.values == {"scale": 2.0}
    assert constants.others == [{"scale": 1.0, "options_layers_0": 7}, {"label": None}, {"scale": 1.0}]


def test_no_kinds_are_found_beyond_those_that_are_given():
    others = [{"label": None}]
    assert constants_of({}, {"label": None}, others=others)[1] == [0, 1]
    with pytest.raises(TFMQError, match=r"'label' has no rows, but is 7 in call 2 .* after 2 other kinds"):
        constants_of({}, {"label": 7}, others=others)


def test_what_a_call_leaves_out_may_equal_the_default():
    assert taken({}, {"scale": 1.0}, {"label": 5}) == {"scale": 1.0, "label": 5}
    assert taken({"options": None}, {"residuals": None}) == {}
    assert taken({"return_dict": False}, {}) == {"return_dict": False}
    shared = torch.arange(3)
    assert torch.equal(taken({"options": shared}, {"options": shared.clone()})["options"], shared)
    arrays = [{"options": {"a": np.ones(2)}} for _ in range(2)]
    assert taken(*arrays)["options_a"].tolist() == [1, 1]
