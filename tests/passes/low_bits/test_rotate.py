import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS
from tests.helpers.low_bits import Attention, Gated, Itself, Squared, Twice, done, graph, operators, run
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import attribute, fresh
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes import find_temporal, rotate
from tfmq_fx.passes.low_bits.rotate import hadamard


def rotated(gm, image=False, block=4):
    """A rotated copy, checked for what holds of each: same function, same block, the original as it was."""
    before = {n: p.clone() for n, p in gm.named_parameters()}
    expected = run(gm, image)
    got = rotate(fresh(gm), block=block).graph_module
    torch.testing.assert_close(run(got, image), expected, rtol=1e-5, atol=1e-5)
    assert find_temporal(got) == find_temporal(gm)
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters())
    return got


@settings(deadline=None)
@given(power=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_hadamard_matrices_are_orthogonal_symmetric_and_flat(power, seed):
    h = hadamard(2**power)
    torch.testing.assert_close(h @ h.T, torch.eye(2**power, dtype=h.dtype))
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h.abs(), torch.full_like(h, 2 ** (-power / 2)))
    if power % 2 == 0:
        torch.testing.assert_close(h.sum(0), torch.ones(2**power, dtype=h.dtype))  # a constant stays one
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(2, 3, 2**power, generator=generator, dtype=h.dtype)
    torch.testing.assert_close((w @ h) @ (x @ h).T, w @ x.T)
    torch.testing.assert_close((x @ h).norm(), x.norm())


def test_one_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, 3] = 8
    assert (x @ hadamard(16)).abs().max() == 2


def test_a_layer_takes_the_rotation_of_the_next_through_views_alone():

    def body():
        return nn.Sequential(nn.Linear(8, 8), nn.Unflatten(-1, (2, 4)), nn.Flatten(-2), nn.Linear(8, 8))

    gm = rotated(graph(body))
    assert operators(gm) == [
        "unflatten",
        "matmul",
        "flatten",
        "linear",
        "unflatten",
        "flatten",
        "linear",
        "linear",
    ]
    assert done(gm, "rotate") == {"0.weight": "explicit", "3.weight": "folded"}
    gm = rotated(graph(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))))
    assert done(gm, "rotate") == {"0.weight": "explicit", "2.weight": "explicit"}


def test_convolutions_are_rotated_over_the_channels():

    def body():
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU(), nn.Conv2d(8, 8, 1)
        )

    gm = rotated(graph(body, image=True), image=True)
    explicit = ["transpose", "unflatten", "matmul", "flatten", "transpose", "conv2d"]
    assert operators(gm) == [*explicit, "conv2d", "silu", *explicit, "conv2d"]
    assert done(gm, "rotate") == {"0.weight": "explicit", "1.weight": "folded", "3.weight": "explicit"}
    assert {t for c in captured_of(gm).low_bits["rotate"] for t in c.tensors} == {
        "hadamard_4"
    }  # one constant for all


@pytest.mark.parametrize("fused", [False, True])
def test_v_takes_the_rotation_while_a_block_stays_within_a_head(fused):
    name = "qkv" if fused else "v"
    for block, how in ((2, "folded"), (4, "folded"), (8, "explicit")):
        gm = rotated(graph(lambda: Attention(fused)), block=block)
        assert done(gm, "rotate")["out.weight"] == how
        if how == "folded":
            assert {c.name: c.reason for c in captured_of(gm).low_bits["rotate"]}[
                "body.out.weight"
            ] == f"into body.{name}.weight"


def test_layers_that_share_an_input_share_its_rotation():
    gm = rotated(graph(Attention))
    assert operators(gm).count("matmul") == 1  # q, k and v read the norm; out is folded
    assert [done(gm, "rotate")[f"{n}.weight"] for n in "qkv"] == ["explicit"] * 3


@pytest.mark.parametrize("body", [Gated, Twice, Itself, Squared])
def test_what_is_not_linear_or_read_elsewhere_is_not_touched(body):
    assert set(done(rotated(graph(body)), "rotate").values()) == {"explicit"}


@pytest.mark.parametrize(
    ("conv", "how"),
    [
        (lambda: nn.Conv2d(8, 8, 3, groups=2), "explicit"),
        (lambda: nn.Conv2d(8, 8, 3, groups=4), "left"),
        (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), "explicit"),
        (lambda: nn.Conv2d(8, 6, 1), "explicit"),
    ],
)
def test_grouped_and_transposed_convolutions(conv, how):
    channels = conv().out_channels
    gm = rotated(
        graph(lambda: nn.Sequential(conv(), nn.SiLU(), nn.Conv2d(channels, 8, 1)), image=True), image=True
    )
    assert done(gm, "rotate")["0.weight"] == how
    if channels == 6:
        reason = {c.name: c.reason for c in captured_of(gm).low_bits["rotate"]}["body.2.weight"]
        assert reason == "6 input channels are not divisible by 4"


def test_a_second_time_changes_nothing():
    gm = rotated(graph(Attention))
    weight = attribute(gm, "body.out.weight").clone()
    assert not rotate(gm, block=2).modified
    assert torch.equal(attribute(gm, "body.out.weight"), weight)


@pytest.mark.parametrize("block", [0, 1, 6])
def test_other_blocks_are_refused(block):
    with pytest.raises(TFMQError, match=f"block={block}: is not a power of two"):
        rotate(graph(Attention), block=block)


def test_a_prepared_graph_is_refused():
    gm = tfmq_fx.prepare(graph(Attention), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="rotate: the graph is prepared already"):
        rotate(gm)
