import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS
from tests.helpers.low_bits import (
    Attention,
    Gated,
    Itself,
    Shared,
    Squared,
    Twice,
    data,
    done,
    graph,
    operators,
    run,
)
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.stage import input_maxima
from tfmq_fx.graph.nodes import attribute, fresh
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes import find_temporal, smooth


def smoothed(gm, image=False, **settings):
    """A smoothed copy, checked for what holds of each: same function, same block, the original as it was."""
    before = {n: p.clone() for n, p in gm.named_parameters()}
    expected = run(gm, image)
    result = smooth(fresh(gm), maxima=input_maxima(gm, data(image)), **settings)
    assert result.modified
    torch.testing.assert_close(run(result.graph_module, image), expected)
    assert find_temporal(result.graph_module) == find_temporal(gm)
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters())
    return result.graph_module


def convolutions():
    return nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))


def test_a_norm_takes_the_scale_and_a_silu_does_not_let_it_pass():
    gm = smoothed(graph(convolutions, image=True), image=True)
    assert operators(gm) == ["group_norm", "conv2d", "silu", "mul", "conv2d", "conv2d"]
    assert done(gm, "smooth") == {"1.weight": "folded", "3.weight": "explicit"}
    (change,) = [c for c in captured_of(gm).low_bits["smooth"] if c.how == "explicit"]
    assert change.reason == "silu (silu) in between"
    assert [attribute(gm, t).shape for t in change.tensors] == [(8, 1, 1)]


def test_scales_are_those_of_the_paper():
    gm = graph(convolutions, image=True)
    x_C = input_maxima(gm, data(True))["conv2d_2"].double()
    w_C = attribute(gm, "body.3.weight").detach().abs().amax((0, 2, 3)).double()
    got = smoothed(gm, image=True, alpha=0.75)
    expected = x_C**0.75 / w_C**0.25
    torch.testing.assert_close(1 / attribute(got, "body.3.weight_smooth").flatten(), expected.float())
    # alpha = 1/2 gives activations and weights the same maximum in every channel.
    even = smoothed(gm, image=True)
    torch.testing.assert_close(
        input_maxima(even, data(True))["conv2d_2"], attribute(even, "body.3.weight").abs().amax((0, 2, 3))
    )


def test_a_layer_takes_the_scale_of_the_next_through_relu():
    gm = smoothed(graph(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))))
    assert operators(gm) == ["mul", "linear", "relu", "linear", "linear"]
    assert done(gm, "smooth") == {"2.weight": "folded", "0.weight": "explicit"}


@pytest.mark.parametrize("fused", [False, True])
def test_attention_folds_into_its_norm_and_into_v(fused):
    gm = smoothed(graph(lambda: Attention(fused)))
    assert "mul" not in operators(gm)
    assert set(done(gm, "smooth").values()) == {"folded"}
    into = {c.name: c.reason for c in captured_of(gm).low_bits["smooth"]}
    assert into["body.out.weight"] == f"into body.{'qkv' if fused else 'v'}.weight"


def test_a_gate_lets_the_scale_pass_on_its_linear_side():
    gm = smoothed(graph(Gated))
    assert done(gm, "smooth") == {"out.weight": "folded", "project.weight": "explicit"}


@pytest.mark.parametrize(
    ("body", "layer", "reason"),
    [
        (Twice, "body.b.weight", "sigmoid (sigmoid) reads it too"),
        (Itself, "body.b.weight", "scaled_dot_product_attention (scaled_dot_product_attention) in between"),
        (Squared, "body.b.weight", "mul (mul_2) in between"),
        (Attention, "first.weight", "first or last layer"),
    ],
)
def test_what_others_read_is_not_touched(body, layer, reason):
    found = {c.name: c.reason for c in captured_of(smoothed(graph(body))).low_bits["smooth"]}
    assert found[layer] == reason


def test_a_weight_used_twice_is_left():
    assert [c.how for c in captured_of(smoothed(graph(Shared))).low_bits["smooth"] if "own" in c.reason] == [
        "left",
        "left",
    ]


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(8, 8, 3, groups=4),
        lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False),
        lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(8, 8, 3, stride=2),
    ],
)
def test_grouped_and_transposed_convolutions(conv):
    channels = conv().out_channels
    gm = graph(
        lambda: nn.Sequential(nn.GroupNorm(2, 8), conv(), nn.ReLU(), nn.Conv2d(channels, 8, 1)), image=True
    )
    assert done(smoothed(gm, image=True), "smooth")["1.weight"] == "folded"


def test_dead_channels_keep_their_scale():
    gm = graph(convolutions, image=True)
    with torch.no_grad():
        attribute(gm, "body.0.weight")[1], attribute(gm, "body.0.bias")[1] = 0, 0
        attribute(gm, "body.3.weight")[:, 2] = 0
    got = smoothed(gm, image=True)
    assert attribute(got, "body.3.weight_smooth").flatten()[2] == 1
    assert all(torch.isfinite(p).all() for p in got.parameters())


def test_a_second_time_changes_nothing():
    gm = smoothed(graph(Attention))
    before = {n: p.clone() for n, p in gm.named_parameters()}
    assert not smooth(gm, maxima={}).modified
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters())


def test_wrong_maxima_alphas_and_graphs_are_refused():
    gm = graph(convolutions, image=True)
    maxima = input_maxima(gm, data(True))
    with pytest.raises(
        TFMQError, match=r"body\.1\.weight \(node conv2d_1\) needs one .* 8 input channels, there are none"
    ):
        smooth(gm, maxima={})
    with pytest.raises(TFMQError, match=r"found \(3,\)"):
        smooth(gm, maxima=maxima | {"conv2d_1": torch.ones(3)})
    with pytest.raises(TFMQError, match="NaN or infinite"):
        smooth(gm, maxima=maxima | {"conv2d_1": torch.full((8,), torch.nan)})
    with pytest.raises(TFMQError, match=r"alpha=1\.5"):
        smooth(gm, maxima=maxima, alpha=1.5)
    prepared = tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="smooth: the graph is prepared already"):
        smooth(prepared, maxima=maxima)
