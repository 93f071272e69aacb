"""Batches that mix timesteps and labels, of any size: each row is what the network gives for that row alone."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, OneTimestep, ScalarTime, captured, make, vectors
from tests.helpers.agreement import CLOSE, assert_same_but_for_flips, moved
from tests.helpers.nearest import labelled, one_timestep, quantized, recipe
from tfmq_fx.base.errors import TFMQError

# Captured with 2, calibrated in batches of 40 to 64, measured in batches of up to 128.
SIZES = (2, 3, 7, 33, 64)
SETTINGS = [("w4a8", "block"), ("w8a8", "block"), ("w4a8", "all"), ("w8a8", "all")]
NULL = Labelled.classes - 1  # the label that stands for "no label" in classifier-free guidance


def one_by_one(network, *inputs):
    return torch.cat([network(*[x[i : i + 1] for x in inputs]) for i in range(len(inputs[0]))])


def rows(size, pixels=8):
    """Noise, timesteps and labels; neighbours in the batch have different timesteps and labels."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 1, pixels, pixels, generator=generator)
    turn = torch.arange(size) + int(torch.randint(0, 10, (), generator=generator))
    return x, TIMESTEPS[turn * 3 % 10], turn % Labelled.classes


@torch.no_grad()
def test_the_float_graph_gives_each_row_what_it_gives_alone():
    graph = captured()
    for size in SIZES:
        x, t, _ = rows(size)
        got, expected = graph(x, t), one_by_one(graph, x, t)
        torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE * expected.abs().max().item())
        assert moved(graph(x, t.roll(1)), expected)[0].all()  # the control: the neighbour's timestep shows


@pytest.mark.parametrize(("bits", "keyed"), SETTINGS)
@torch.no_grad()
def test_a_batch_of_mixed_timesteps_gives_each_row_what_it_gives_alone(bits, keyed):
    q, pairs = quantized(bits, keyed), []
    for size in SIZES:
        x, t, _ = rows(size)
        pairs.append((q(x, t), one_by_one(q, x, t)))
        assert moved(q(x, t.roll(1)), pairs[-1][1])[0].all()
    assert_same_but_for_flips(pairs)
    assert q.report["unseen_timesteps"] == {}


@pytest.mark.parametrize(("bits", "keyed"), SETTINGS)
@torch.no_grad()
def test_a_batch_of_mixed_timesteps_and_labels_gives_each_row_what_it_gives_alone(bits, keyed):
    q, pairs = labelled(bits, keyed), []
    for size in SIZES:
        x, t, y = rows(size, pixels=6)
        pairs.append((q(x, t, y), one_by_one(q, x, t, y)))
        assert moved(q(x, t.roll(1), y), pairs[-1][1])[0].all()
        assert moved(q(x, t, y.roll(1)), pairs[-1][1])[0].all()
    assert_same_but_for_flips(pairs)


@pytest.mark.parametrize(("bits", "keyed"), SETTINGS)
@torch.no_grad()
def test_the_halves_of_a_guided_batch_are_the_two_calls_it_stands_for(bits, keyed):
    q, pairs = labelled(bits, keyed), []
    for size in SIZES:
        x, _, y = rows(size, pixels=6)
        y, null = y % NULL, torch.full((size,), NULL)
        for t in TIMESTEPS[:3]:
            guided = q(torch.cat([x, x]), t, torch.cat([y, null]))
            apart = torch.cat([q(x, t, y), q(x, t, null)])
            pairs.append((guided, apart))
            assert moved(guided.roll(size, 0), apart)[
                0
            ].all()  # the halves swapped: the label shows in every row
    assert_same_but_for_flips(pairs)
    assert q.report["unseen_values"] == {"class_labels": {}}


@pytest.mark.parametrize("size", [1, 2, 5])
@torch.no_grad()
def test_one_timestep_may_be_given_in_any_shape(size):
    (x, _, y), (small, _, _) = rows(size), rows(size, pixels=6)
    for model, inputs in ((quantized("w4a8"), (x,)), (labelled("w4a8"), (small, y))):
        expected = model(inputs[0], torch.full((size,), 300), *inputs[1:])
        assert not torch.equal(model(inputs[0], torch.full((size,), 400), *inputs[1:]), expected)
        for t in (300, 300.0, torch.tensor(300), torch.tensor([300]), torch.tensor([300], dtype=torch.int32)):
            assert torch.equal(model(inputs[0], t, *inputs[1:]), expected)
    for wrong in (size + 1, size + 2):
        with pytest.raises(TFMQError, match=f"{wrong} timesteps for a batch of {size}"):
            quantized("w4a8")(x, torch.full((wrong,), 300))


@torch.no_grad()
def test_a_batch_of_none_gives_none():
    assert quantized("w4a8")(torch.zeros(0, 1, 8, 8), 300).shape == (0, 1, 8, 8)
    assert quantized("w4a8")(torch.zeros(0, 1, 8, 8), TIMESTEPS[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("network_class", [ScalarTime, OneTimestep])
@torch.no_grad()
def test_a_network_of_one_timestep_per_call_takes_any_batch_of_samples(network_class):
    q, network, pairs = one_timestep(network_class), make(network_class), []
    for size in (1, *SIZES):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        for t in TIMESTEPS:
            pairs.append((q(x, t), torch.cat([q(row, t) for row in x.split(1)])))
            error = (pairs[-1][0] - network(x, t)).abs().max()
            assert 0 < error < 0.05  # 8-bit weights and activations of three layers
        assert all(torch.equal(q(x, t), q(x, 0)) for t in (0.0, TIMESTEPS[-1:], TIMESTEPS[-1:, None]))
        assert torch.equal(q(x, TIMESTEPS[-1:].expand(size)), q(x, 0))  # one for each row, all the same
        assert moved(q(x, 900), q(x, 0))[0].all()
    assert_same_but_for_flips(pairs)


def test_a_network_of_one_timestep_per_call_refuses_several():
    for count in (2, 3):
        with pytest.raises(TFMQError, match=f"captured with one timestep per call, found {count}"):
            one_timestep(OneTimestep)(torch.randn(3, 4), TIMESTEPS[:count])


def test_quantize_takes_a_network_of_one_timestep_per_call():
    q = tfmq_fx.quantize(make(OneTimestep), recipe("w8a8"), calibration=vectors())
    assert q.interface.inputs["timestep"]["shape"] == []
