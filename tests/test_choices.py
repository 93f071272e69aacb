"""What a recipe leaves open: the estimates that choose it, what is chosen, and what overrides it."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, captured, make, sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.effects import Reader, _merged, _Probe, input_ranges, output_effects
from tfmq_fx.choices import choose, is_open
from tfmq_fx.graph.channels import count_readers, layer_of
from tfmq_fx.graph.nodes import weight_argument
from tfmq_fx.passes import find_temporal
from tfmq_fx.passes.quantize.plan import plan
from tfmq_fx.recipe import AUTO, Recipe, Rule

NEAREST = tfmq_fx.Reconstruction(method="nearest")
OPEN = Recipe(
    weight_bits=8, smooth=AUTO, keyed=AUTO, float_flops=0.03, double_flops=0.05, float_bytes=0.05, reconstruction=NEAREST
)  # fmt: skip


class Uneven(nn.Module):
    """A network whose inner 1x1 convolution reads one channel a thousand times as large as the others."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(8, 8)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.even, self.uneven = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.even.weight[3] *= 1000
            self.uneven.weight[:, 3] /= 1000

    def forward(self, sample, timestep):
        h = torch.tanh(self.first(sample)) + self.time(sinusoid(timestep, 8))[:, :, None, None]
        return self.last(torch.tanh(self.uneven(self.even(h))))


@functools.cache
def chosen(cls=TinyUNet, recipe=OPEN, seed=0):
    gm = tfmq_fx.capture(make(cls), {k: v[:20] for k, v in calibration().tensors.items()})
    return choose(gm, recipe, calibration(), temporal=find_temporal(gm), seed=seed)


def rules(choices):
    return {r.pattern: r for r in choices.recipe.chosen}


def output_error(q):
    return sum(row["output_relative_mse"] for row in q.report["errors_by_timestep"])


def test_ranges_are_those_of_each_timestep_and_of_the_rest():
    gm, data = captured(), calibration()
    node = next(n for n in gm.graph.nodes if n.op == "call_function" and "conv2d" in str(n.target))
    t = data.tensors["timestep"]
    found = input_ranges(gm, data, {node.name: -3}, t.unique()[:2])[node.name]
    low, high = found.low_TC, found.high_TC
    x = data.tensors["sample"]
    for i, rows in enumerate([t == t.unique()[0], t == t.unique()[1], t > t.unique()[1]]):
        torch.testing.assert_close(low[i], x[rows].amin((0, 2, 3)))
        torch.testing.assert_close(high[i], x[rows].amax((0, 2, 3)))


def test_the_effect_of_a_last_layers_input_is_that_of_its_weights():
    # y = conv(x): an error of variance 1 in channel c has the effect sum over outputs and taps of w^2, but at the border.
    gm, data = captured(), calibration()
    planned = plan(
        gm, recipe=dataclasses.replace(OPEN, edge_activation_bits=8), temporal=find_temporal(gm)
    ).layers
    nodes = {n.name: n for n in gm.graph.nodes}
    (p,) = [p for p in planned if p.path == "conv_out.weight"]
    reader = Reader(
        plan=p,
        node=nodes[p.node],
        layer=None,
        group=0,
        smoothing={"off": None},
        clipping={},
        weight_bits=(8,),
    )
    qparams = {reader.input: {"off": (torch.full((400,), 0.01), torch.full((400,), 128))}}
    rows = [torch.tensor([i % 40]) for i in range(400)]
    effects = output_effects(gm, data, [reader], qparams, rows)
    w = make(TinyUNet).conv_out.weight.detach()
    size = data.tensors["sample"].shape[-1]
    inside = torch.ones(1, 1, size, size)
    taps = (
        nn.functional.conv2d(inside, torch.ones(1, 1, 3, 3), padding=1).sum() / 9
    )  # of 9 taps, the mean count inside
    expected = (w.square().sum((0, 2, 3)) * taps).double()
    # 400 rows of 64 outputs: the sum of squares of normal numbers is within 5%.
    torch.testing.assert_close(effects.inputs[reader.input].mean(0), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [None, 3])
def test_effects_of_rounding_weights_by_output_channel_are_those_weight_by_weight(groups, kernel):
    layer = nn.Linear(8, 6) if kernel is None else nn.Conv2d(8, 6, kernel, groups=groups)
    x = torch.randn(4, 8) if kernel is None else torch.randn(4, 8, 5, 5)
    gm = torch.export.export(layer, (x,), strict=False).module()
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function" and weight_argument(n) is not None]
    path = next(n for n in gm.graph.nodes if n.target == "weight").target
    plan = SimpleNamespace(path=path, dtype=None, group_size=None, activation_bits=8)
    smoothing = {"off": None, 0.5: torch.rand(8, dtype=torch.float64) + 0.5}
    parameter = layer_of(gm, node, count_readers(gm))
    reader = Reader(
        plan=plan, node=node, layer=parameter, group=0, smoothing=smoothing, clipping={}, weight_bits=(4, 8)
    )
    found = []
    for plain in (True, False):
        probe = _Probe(gm, [reader], {}, {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reader, "plain", plain)
            probe._judge_weight(reader, layer.weight.detach(), layer.weight.detach().sin())
        found.append(probe.found)
    assert len(found[0]) == 4
    torch.testing.assert_close(found[0], found[1])


def test_estimates_tell_the_measured_error():
    choices = chosen()
    q = tfmq_fx.quantize(make(TinyUNet), OPEN, calibration=calibration())
    predicted = torch.tensor([r["after"] for r in choices.report["output_relative_mse"]]).mean()
    measured = torch.tensor([r["output_relative_mse"] for r in q.report["errors_by_timestep"]]).mean()
    # Errors of a small network are not many, so they average less: within a factor of three.
    assert 1 / 3 < predicted / measured < 3
    assert q.report["choices"] == choices.report


def test_the_layers_shares_are_of_the_whole_error_that_is_left():
    report = chosen().report
    both = [layer["input"] + layer["weight"] for layer in report["layers"]]
    assert sum(both) == pytest.approx(1)
    assert both == sorted(both, reverse=True)
    terms = {layer["name"]: layer.get("activation_terms") for layer in report["layers"]}
    assert terms == dict.fromkeys(terms) | {
        path: rule.activation_terms for path, rule in rules(chosen()).items()
    }


def test_an_input_with_one_large_channel_is_smoothed_or_kept_precise():
    rule = rules(chosen(Uneven))["uneven.weight"]
    assert rule.smooth is not None or rule.activation_bits == 16 or rule.activation_terms == 2
    assert chosen(Uneven).report["gain_db"] > 10


def test_the_result_is_better_than_without_a_choice():
    data = calibration()
    closed = dataclasses.replace(
        OPEN, smooth=None, keyed="block", float_flops=0.0, double_flops=0.0, float_bytes=0.0
    )
    errors = [
        output_error(tfmq_fx.quantize(make(Uneven), recipe, calibration=data)) for recipe in (closed, OPEN)
    ]
    assert errors[1] < errors[0] / 10


def test_without_rows_of_each_timestep_none_has_scales_of_its_own():
    assert any(r.keyed == "all" for r in rules(chosen()).values())
    more = [*TIMESTEPS.tolist(), 5]
    q = tfmq_fx.quantize(make(TinyUNet), OPEN, calibration=calibration(), timesteps=more)
    assert not any(r.get("keyed") for r in q.report["choices"]["layers"])
    (reason,) = [n["reason"] for n in q.report["notes"] if n["name"] == "calibration"]
    assert reason == "no scales per timestep were considered: no row has the schedule's 5"


def test_the_same_seed_gives_the_same_recipe_and_choosing_again_changes_nothing():
    assert (
        chosen().recipe == choose(captured(), OPEN, calibration(), temporal=find_temporal(captured())).recipe
    )
    again = choose(captured(), chosen().recipe, calibration(), temporal=find_temporal(captured()))
    assert again.recipe is chosen().recipe
    assert again.report == {}


def test_budgets_hold():
    report = chosen().report
    assert report["double_flops"] <= 0.05
    # First and last layer are in float anyway, and more than the budget of so small a network.
    edges = chosen(recipe=dataclasses.replace(OPEN, float_flops=0.0)).report["float_flops"]
    assert report["float_flops"] <= max(0.03, edges)


def test_beside_float_activations_weights_are_chosen():
    recipe = Recipe(weight_bits=8, activation_bits=16, float_bytes=0.5, reconstruction=NEAREST)
    found = chosen(recipe=recipe)
    # All multiplications are in float, which is more than `float_flops`: a weight in float costs none.
    assert {r.weight_bits for r in found.recipe.chosen} == {16}
    q, plain = (
        tfmq_fx.quantize(make(TinyUNet), r, calibration=calibration())
        for r in (recipe, dataclasses.replace(recipe, float_bytes=0.0))
    )
    assert output_error(q) < output_error(plain) / 2
    sizes = [x.report["sizes"]["quantized_bytes"] for x in (q, plain)]
    assert sizes[0] <= 1.5 * sizes[1]


def test_a_rule_goes_before_what_is_chosen_field_by_field():
    path = "uneven.weight"
    own = dataclasses.replace(
        OPEN, rules=(Rule(pattern=path, smooth="off", activation_bits=8, activation_terms=1),)
    )
    q = tfmq_fx.quantize(make(Uneven), own, calibration=calibration())
    (layer,) = [x for x in q.report["layers"] if x["path"] == path]
    assert (layer["activation_bits"], layer["activation_terms"]) == (8, 1)
    assert not [c for c in q.report["low_bits"].get("smooth", []) if c["name"] == path and c["how"] != "left"]


def test_the_chosen_recipe_is_in_the_artefact_and_gives_the_same_integers(tmp_path):
    q = tfmq_fx.quantize(make(TinyUNet), OPEN, calibration=calibration())
    q.save_pretrained(tmp_path)
    recipe = Recipe.from_json(tfmq_fx.load(tmp_path).recipe)
    assert recipe == chosen().recipe
    again = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())
    a, b = q.network.state_dict(), again.network.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_was_chosen_for_another_network_is_refused():
    with pytest.raises(TFMQError, match=r"Recipe\.chosen: .* is no layer of this network"):
        tfmq_fx.prepare(captured(), chosen(Uneven).recipe, timesteps=TIMESTEPS)


@pytest.mark.parametrize(
    "bad", [{"smooth": "much"}, {"keyed": "some"}, {"float_flops": 1.5}, {"double_flops": -0.1}]
)
def test_wrong_settings_are_refused(bad):
    with pytest.raises(TFMQError, match=next(iter(bad))):
        dataclasses.replace(OPEN, **bad)


def test_an_open_recipe_has_no_stages():
    data, gm = calibration(), captured()
    with pytest.raises(TFMQError, match="stages: the recipe leaves settings open"):
        tfmq_fx.pipeline.stages(OPEN, calibration=data, temporal=find_temporal(gm))


class Constant(Uneven):
    """An inner layer reads a constant, and a channel is zero everywhere."""

    def forward(self, sample, timestep):
        h = torch.tanh(self.first(sample)) + self.time(sinusoid(timestep, 8))[:, :, None, None]
        h = h * torch.tensor([0.0, *[1.0] * 7])[:, None, None]
        return self.last(self.uneven(torch.ones_like(h)) + self.even(h))


def test_constant_and_empty_inputs_get_finite_scales():
    q = tfmq_fx.quantize(make(Constant), dataclasses.replace(OPEN, smooth=0.5), calibration=calibration())
    assert all(torch.isfinite(x).all() for x in q.network.state_dict().values() if x.is_floating_point())
    x, t = calibration().tensors["sample"], calibration().tensors["timestep"]
    assert torch.isfinite(q(x, t)).all()
    assert q.report["choices"]["constant_inputs"] == ["uneven.weight"]
    (even,) = (c for c in q.report["low_bits"]["smooth"] if c["name"] == "even.weight")
    assert even["reason"].endswith("; 1 of 8 input channels are always zero and stay as they are")


class Detached(Uneven):
    """No gradient goes back to one of the layers, as in the last text branch of a ControlNet."""

    def forward(self, sample, timestep):
        h = torch.tanh(self.first(sample)) + self.time(sinusoid(timestep, 8))[:, :, None, None]
        return self.last(self.even(h) + self.uneven(h).detach())


def test_a_layer_to_which_no_gradient_goes_back_is_quantized_as_the_recipe_says():
    q = tfmq_fx.quantize(make(Detached), OPEN, calibration=calibration())
    assert "uneven.weight" in {layer["path"] for layer in q.report["layers"]}


def test_rows_of_one_timestep_are_enough():
    data = calibration()
    one = data.rows(data.tensors["timestep"] == data.tensors["timestep"][0])
    q = tfmq_fx.quantize(make(TinyUNet), OPEN, calibration=one)
    assert q.report["choices"]["rows"] <= 16
    (note,) = (n for n in q.report["notes"] if n["name"] == "calibration")
    assert note["reason"].startswith("all rows have the timestep ")
    assert not note["coarser"]


class Even(nn.Module):
    """A network of three small layers, whose shares are too small for any of them."""

    def __init__(self):
        super().__init__()
        self.time, self.a, self.b = (
            nn.Linear(1, 8),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, sample, timestep):
        return self.b(
            torch.relu(self.a(sample) + self.time(timestep[:, None].float() / 1000)[:, :, None, None])
        )


def test_a_recipe_is_closed_where_nothing_was_chosen():
    recipe = Recipe(weight_bits=8, float_bytes=1e-9, reconstruction=NEAREST)
    found = chosen(Even, recipe)
    assert not found.recipe.chosen
    assert not is_open(found.recipe)
    q = tfmq_fx.quantize(make(Even), recipe, calibration=calibration())
    assert len(q.report["layers"]) == 3


class Tied(Uneven):
    """The uneven convolution is applied twice: what is chosen for its input holds for both."""

    def forward(self, sample, timestep):
        h = torch.tanh(self.first(sample)) + self.time(sinusoid(timestep, 8))[:, :, None, None]
        return self.last(self.uneven(torch.tanh(self.uneven(self.even(h)))))


def test_a_weight_that_two_layers_read_has_one_rule_for_both():
    recipe = dataclasses.replace(OPEN, double_flops=0.5)
    found = chosen(Tied, recipe)
    (rule,) = [r for r in found.recipe.chosen if r.pattern == "uneven.weight"]
    assert rule.activation_terms == 2
    assert 0.1 < found.report["double_flops"] < 0.5  # twice an eighth of the multiplications
    q = tfmq_fx.quantize(make(Tied), recipe, calibration=calibration())
    both = [x for x in q.report["layers"] if x["path"] == "uneven.weight"]
    assert [x["activation_terms"] for x in both] == [2, 2]
    assert max(r["output_relative_mse"] for r in q.report["errors_by_timestep"]) < 0.02  # at 8 bits: 0.1


def ranges_of(x, of):
    return _merged([(of, torch.zeros_like(of), torch.zeros_like(x), x, 1)], 1)


def test_what_other_rows_clip_is_told_from_the_trajectory_with_the_largest_value():
    """Rows of one trajectory are much alike: what it clips is not seen in its own other rows."""
    g = torch.Generator().manual_seed(0)

    def rows(count):
        level_NC = torch.randn(count, 64, generator=g).exp()
        return level_NC[:, None] * (1 + 0.05 * torch.rand(count, 10, 64, generator=g))  # at 10 timesteps

    ratios, of = [], torch.arange(16).repeat_interleave(10)
    for _ in range(20):
        x, others = rows(16).flatten(0, 1), rows(2000).flatten(0, 1)
        found = ranges_of(x, of)
        assert torch.equal(found.largest_C, x.amax(0))
        s, without = found.largest_C, found.second_C  # as an exponent of 1 smooths
        clipped = (others - others.minimum(s * (x / s).amax())).square().mean(0)
        ratios.append(found.clipped(s, without).sum() / clipped.sum())
    assert 0.5 < torch.stack(ratios).median() < 2.0
    at = torch.randperm(160, generator=g)
    batches = [
        (n, torch.zeros_like(n), -x, x, 4) for n, x in zip(of[at].split(7), x[at].split(7), strict=True)
    ]
    split = _merged(batches, 1)
    torch.testing.assert_close(split.clipped(s, without), found.clipped(s, without) / 4)


def test_of_a_single_trajectory_nothing_is_known_about_others():
    x = torch.rand(8, 3)
    found = ranges_of(x, torch.zeros(8, dtype=torch.long))
    assert torch.equal(found.second_C, x.amax(0))
    assert not found.clipped(found.largest_C, found.second_C).any()


@pytest.mark.parametrize("by_step", [True, False])
def test_rows_in_the_order_of_a_sampler_are_told_by_trajectory(by_step):
    of, t = torch.arange(3), torch.tensor([9.0, 5.0, 1.0, 0.0])
    pairs = torch.cartesian_prod(t, of.float()) if by_step else torch.cartesian_prod(of.float(), t).flip(1)
    data = tfmq_fx.CalibrationSet.from_tensors({"x": pairs[:, 1], "timestep": pairs[:, 0]})
    assert torch.equal(data.trajectories(), pairs[:, 1].long())
    alone = tfmq_fx.CalibrationSet.from_tensors({"x": torch.rand(4), "timestep": t})
    assert torch.equal(alone.trajectories(), torch.arange(4))
