"""Scales per group of weights and per token, against plain arithmetic and from the recipe to the loaded artefact."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, calibration, make, sinusoid
from tfmq_fx.artefact.graph_json import quantized_weights, tensors_of
from tfmq_fx.base._torchao import MinMaxObserver, Quantizer
from tfmq_fx.base.arithmetic import (
    IntegerRange,
    choose_qparams,
    fake_quantize_tokens,
    fitting_group_size,
    quantize_tokens,
    search_range,
)
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.inspection import describe
from tfmq_fx.observers import PerChannelWeightFakeQuantize, StaticFakeQuantize, TokenFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.reconstruction.gptq import Moments, gptq

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


class Tokens(nn.Module):
    """A small transformer on patches: convolutions at both ends, one of them transposed, linears between."""

    def __init__(self, width=16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.emb = nn.Linear(32, 2 * width)
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.unpatch = nn.ConvTranspose2d(width, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample, timestep):
        shift, scale = self.emb(F.silu(self.time(sinusoid(timestep, 16)))).chunk(2, dim=1)
        x = self.patch(sample).flatten(2).transpose(1, 2)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        return self.head(F.silu(self.unpatch(F.silu(self.mix(x)))))


LINEARS = ("q", "k", "v", "out", "up", "down")
# Static fake quantize and the converted graph may round a tie the other way; tokens, tables and weights never do.


def recipe(**changes):
    plain = tuple(
        tfmq_fx.Rule(pattern=p, activation_bits=16) for p in ("patch.*", "mix.*", "unpatch.*", "head.*")
    )
    return tfmq_fx.Recipe(**{"rules": plain, "reconstruction": FAST, **changes})


@functools.cache
def captured():
    return tfmq_fx.capture(make(Tokens), {"sample": X[:2], "timestep": T[:2]})


def prepare(data_quantizer=None, **changes):
    return tfmq_fx.prepare(captured(), recipe(**changes), timesteps=TIMESTEPS, data_quantizer=data_quantizer)


def layers(gm):
    return {layer.path.removesuffix(".weight"): layer for layer in gm.meta["plan"].layers}


def weights(gm):
    return {
        str(n.args[0].target).removesuffix(".weight"): o
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    }


# -- the range search


def simple_search(x_RK, integers, p=2.4, steps=80, smallest=0.2):
    """One candidate of all rows after the other, as the reference does it."""
    min_R, max_R = x_RK.amin(1), x_RK.amax(1)
    best_error_R = torch.full_like(min_R, torch.inf)
    best_min_R, best_max_R = min_R.clone(), max_R.clone()
    for i in range(steps):
        shrink = 1.0 - (1.0 - smallest) * i / steps
        scale_R, zero_point_R = choose_qparams(min_R * shrink, max_R * shrink, integers)
        q_RK = torch.round(x_RK / scale_R[:, None]) + zero_point_R[:, None]
        q_RK.clamp_(integers.quant_min, integers.quant_max)
        error_R = ((q_RK - zero_point_R[:, None]) * scale_R[:, None] - x_RK).abs_().pow_(p).sum(1)
        better_R = error_R < best_error_R
        best_error_R = torch.where(better_R, error_R, best_error_R)
        best_min_R = torch.where(better_R, min_R * shrink, best_min_R)
        best_max_R = torch.where(better_R, max_R * shrink, best_max_R)
    return best_min_R, best_max_R


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([2.0, 2.4]),
    st.integers(0, 2**31),
)
def test_all_candidates_at_once_find_what_one_after_the_other_finds(rows, columns, bits, p, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for integers in (IntegerRange.weight(bits), IntegerRange.activation(bits)):
        found, expected = search_range(x, integers, p=p), simple_search(x, integers, p=p)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-38, torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_on_extreme_rows_is_the_simple_one(value, bits):
    x = torch.tensor([[0.0, value, -0.5 * value], [1.0, 2.0, 3.0]])
    if value == torch.inf:
        x[0, 2] = 1.0
    integers = IntegerRange.weight(bits)
    found, expected = search_range(x, integers), simple_search(x, integers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- groups of weights


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [
        (32, 320, 32),
        (128, 2880, 64),  # half of it before 120, the largest divisor
        (32, 72, 24),
        (32, 36, 18),
        (32, 37, None),  # prime
        (32, 34, 17),
        (32, 62, 31),
        (32, 58, 29),
        (7, 12, 6),
        (7, 10, 5),
        (2, 3, None),
        (64, 64, None),  # the row is one group
        (64, 27, None),
    ],
)
def test_the_group_size_that_fits(group_size, columns, expected):
    assert fitting_group_size(group_size, columns) == expected


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 9),
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_groups_are_rows_of_their_own(channels, groups, kernel, size, bits, transposed, seed):
    """Each group against the slice of the weight quantized alone."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, groups * size, kernel, generator=g)  # (C_out, C_in, kernel)
    given_ = w.transpose(0, 1).contiguous() if transposed else w
    observer = PerChannelWeightFakeQuantize(bits=bits, ch_axis=int(transposed), group_size=size)
    observer.initialise(given_)
    back = observer.dequantized()
    assert back.shape == given_.shape
    assert observer.q.shape == given_.shape
    flat = (back.transpose(0, 1) if transposed else back).flatten(1)
    integers = IntegerRange.weight(bits)
    for c in range(channels):
        for i in range(groups * kernel):
            x = w.flatten(1)[c, i * size : (i + 1) * size]
            scale, zero_point = choose_qparams(*simple_search(x[None], integers), integers)
            row = c * groups * kernel + i
            assert (observer.scale[row], observer.zero_point[row]) == (scale[0], zero_point[0])
            q = (torch.round(x * (1 / scale)) + zero_point).clamp(integers.quant_min, integers.quant_max)
            assert torch.equal(flat[c, i * size : (i + 1) * size], (q - zero_point) * scale)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_is_the_channel(axis, bits):
    w = torch.randn(6, 8, 3, 3)
    columns = w.numel() // w.shape[axis]
    both = [
        PerChannelWeightFakeQuantize(bits=bits, ch_axis=axis, group_size=size) for size in (None, columns)
    ]
    for observer in both:
        observer.initialise(w)

    def same():
        assert torch.equal(both[0].q, both[1].q)
        assert torch.equal(both[0].scale, both[1].scale)
        assert torch.equal(both[0](w), both[1](w))

    same()
    for observer in both:
        observer.start_learning(w + 0.01)
    same()
    for observer in both:
        observer.stop_learning()
    same()


def test_the_error_falls_as_the_groups_shrink():
    w = torch.randn(32, 512) * torch.rand(1, 512).mul(3).exp()  # columns of different size, as trained ones
    errors = []
    for size in (None, 256, 128, 64, 32, 16):
        observer = PerChannelWeightFakeQuantize(bits=4, ch_axis=0, group_size=size)
        observer.initialise(w)
        errors.append(float((observer.dequantized() - w).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_learning_with_groups_starts_at_the_float_weight(axis):
    w = torch.randn(6, 8, 3)
    observer = PerChannelWeightFakeQuantize(bits=4, ch_axis=axis, group_size=6)
    observer.initialise(w)
    nearest = observer.q
    alpha = observer.start_learning(w)
    inside = (nearest > 0) & (nearest < 15)
    assert torch.allclose(observer(w)[inside], w[inside], atol=2e-4)
    soft, _ = observer.soften()
    soft.sum().backward()
    assert alpha.grad.abs().sum() > 0
    observer.stop_learning()
    assert (observer.q.int() - nearest.int()).abs().max() <= 1
    assert torch.equal(observer(w), observer.dequantized())


def plain_gptq(w, h, scale, zero_point, low, high):
    """One layer, one column after the other by falling diagonal, the inverse of what is left computed anew each time."""
    w, q = w.double().clone(), torch.empty_like(w)
    left = h.diagonal().argsort(descending=True, stable=True)
    while len(left):
        k, inverse = left[0], torch.linalg.inv(h[left][:, left])
        s, z = scale[:, k].double(), zero_point[:, k]
        q[:, k] = (torch.round(w[:, k] / s) + z).clamp(low, high).float()
        error = (w[:, k] - (q[:, k] - z) * s) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q


@pytest.mark.parametrize("layer_groups", [1, 2])
def test_second_order_takes_each_columns_own_scale(layer_groups):
    integers = IntegerRange.weight(4)
    w = torch.randn(layer_groups, 5, 12)
    x = torch.randn(layer_groups, 60, 12) @ torch.randn(12, 12)
    moments = Moments(layer_groups, 12)
    moments.add(x, x)
    scale, zero_point = choose_qparams(*search_range(w.reshape(-1, 4), integers), integers)
    scale, zero_point = (v.reshape(layer_groups, 5, 3) for v in (scale, zero_point))
    q = gptq(w, moments, scale, zero_point, integers, damping=0.0)
    for i in range(layer_groups):
        columns = [v[i].repeat_interleave(4, dim=1) for v in (scale, zero_point)]
        assert torch.equal(q[i], plain_gptq(w[i], moments.h_GKK[i], *columns, 0, 15).double())
    # Groups that happen to be equal are no groups.
    one = gptq(w, moments, scale[..., :1], zero_point[..., :1], integers)
    three = [v[..., :1].expand(-1, -1, 3) for v in (scale, zero_point)]
    assert torch.equal(one, gptq(w, moments, *three, integers))


@pytest.mark.parametrize("method", [pytest.param("nearest", marks=pytest.mark.slow), "gptq+adaround"])
def test_prepared_converted_saved_and_loaded_agree_bit_for_bit(method, tmp_path):
    how = dataclasses.replace(FAST, method=method, iterations=2)
    q = tfmq_fx.quantize(
        make(Tokens),
        recipe(group_size=16, activation_granularity="token", reconstruction=how),
        calibration=calibration(),
    )
    gm = tfmq_fx.calibrate(prepare(group_size=16, activation_granularity="token"), calibration())
    tfmq_fx.reconstruct(gm, calibration(), how)
    used = {path: o.dequantized() for path, o in weights(gm).items()}
    with torch.no_grad():
        expected = gm(X, T)
    converted = tfmq_fx.convert(gm)
    stored = {n: tensors_of(converted)[n] for n in quantized_weights(converted)}
    for path, w in used.items():
        rows, scale, zero_point = (
            tensors_of(converted)[f"{path}.weight_{p}"] for p in ("q", "scale", "zero_point")
        )
        if len(scale) != len(w) and path != "unpatch":  # the documented layout
            assert torch.equal(((rows.float() - zero_point[:, None]) * scale[:, None]).reshape(w.shape), w)
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    for name, value in stored.items():
        assert torch.equal(tensors_of(loaded.network)[name], value)
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    loaded.export(tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(converted(X, T), expected)
        assert torch.equal(q(X, T), expected)
        assert torch.equal(loaded(X, T), expected)
        assert torch.equal(compiled(X, T), expected)
        assert torch.equal(program(sample=X, timestep=T), expected)
        alone = torch.cat([loaded(X[i : i + 1], T[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, expected[:3])
    # The report counts what lies on the disk: integers and zero points packed, scales as they are.
    size = sum(
        x.numel() * x.element_size()
        for x in load_file(tmp_path / "q" / "diffusion_pytorch_model.safetensors").values()
    )
    assert abs(size - loaded.report["sizes"]["quantized_bytes"]) < len(
        load_file(tmp_path / "q" / "diffusion_pytorch_model.safetensors")
    )


def test_groups_reach_every_layer_the_temporal_block_too():
    gm = prepare(group_size=16, rules=())
    found = {path: layer.group_size for path, layer in layers(gm).items()}
    assert found == {
        "time.0": None,  # 16 columns: the row is the group
        "time.2": 16,
        "emb": 16,
        "patch": None,  # 4 columns
        **dict.fromkeys(("q", "k", "v", "out", "up"), None),
        "down": 16,
        "mix": 8,  # 72 columns: half of 16 before 12
        "unpatch": 16,  # transposed: 64 columns of each of its 8 outputs
        "head": 8,
    }
    notes = {n.name: n for n in gm.meta["plan"].notes}
    assert notes.keys() == {"mix.weight", "head.weight"}
    assert (
        notes["mix.weight"].reason
        == "groups of 8: group_size=16 does not divide its 72 weights per output channel"
    )
    assert not notes["mix.weight"].coarser
    assert {p: len(o.scale) for p, o in weights(gm).items()}["emb"] == 32 * 2
    tfmq_fx.calibrate(gm, calibration())
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method="gptq"))
    assert all(r.error <= r.error_nearest for r in gm.meta["reconstruction"])
    assert gm.meta["reconstruction"][0].error < 0.7 * gm.meta["reconstruction"][0].error_nearest
    block = tfmq_fx.convert(gm).get_submodule("temporal_block")
    assert [op_name(n) for n in block.graph.nodes].count("reshape") >= 2


def test_smaller_groups_are_nearer_to_the_float_network():
    network, errors = captured(), []
    for size in (None, 16, 8):
        gm = tfmq_fx.calibrate(prepare(group_size=size, activation_bits=16), calibration())
        with torch.no_grad():
            errors.append(float((gm(X, T) - network(X, T)).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_a_stopped_reconstruction_with_groups_goes_on_to_the_same_integers(tmp_path):
    def run():
        gm = tfmq_fx.calibrate(prepare(group_size=8), calibration())
        how = dataclasses.replace(FAST, method="gptq")
        return weights(tfmq_fx.reconstruct(gm, calibration(), how, state=tmp_path / "s"))

    first = run()
    for file in sorted((tmp_path / "s").glob("*.safetensors"))[2:]:
        file.unlink()
    again = run()
    assert all(torch.equal(o.q, again[path].q) for path, o in first.items())


def test_a_rule_sets_the_group_size_and_a_size_past_the_row_is_the_channel():
    rules = (tfmq_fx.Rule(pattern="down.*", group_size=32), tfmq_fx.Rule(pattern="emb.*", group_size=4096))
    gm = prepare(group_size=8, rules=rules)
    assert (layers(gm)["down"].group_size, layers(gm)["emb"].group_size) == (32, None)
    assert layers(gm)["up"].group_size == 8
    assert "group_size" in {f.name for f in dataclasses.fields(layers(gm)["up"])}


def test_inspection_states_both():
    found = describe(
        make(Tokens),
        {"sample": X[:2], "timestep": T[:2]},
        tfmq_fx.Recipe(group_size=16, activation_granularity="token"),
    )
    down = next(layer for layer in found["layers"] if layer["path"] == "down.weight")
    assert (down["group_size"], down["activation_granularity"]) == (16, "token")
    assert {"mix.weight", "unpatch.weight"} <= {n["name"] for n in found["notes"]}


def test_strict_refuses_what_is_coarser_and_not_what_is_finer():
    words = r"mix\.weight: one scale per output channel: group_size=32 does not divide its 99 weights"
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.quantize(Tokens(22).eval(), recipe(group_size=32), calibration=calibration(), strict=True)
    quick = dataclasses.replace(FAST, method="nearest")
    tfmq_fx.quantize(
        make(Tokens),
        recipe(group_size=16, rules=(), reconstruction=quick),
        calibration=calibration(),
        strict=True,
    )


@pytest.mark.parametrize("size", [0, 1, -32, True, 32.0, "32"])
@pytest.mark.parametrize("owner", [tfmq_fx.Recipe, lambda **k: tfmq_fx.Rule(pattern="*", **k)])
def test_a_size_that_is_none_is_refused(owner, size):
    with pytest.raises(
        TFMQError, match=r"(Recipe|Rule\('\*'\))\.group_size: .* is not a valid group size; use an integer"
    ):
        owner(group_size=size)


# -- one scale per token


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 8), st.integers(0, 2**31))
def test_tokens_against_plain_arithmetic(shape, bits, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    high = 2 ** (bits - 1) - 1
    y = quantize_tokens(x, IntegerRange.token(bits)).reshape(-1, shape[-1])
    for row, got in zip(x.reshape(-1, shape[-1]), y, strict=True):
        scale = row.abs().max() / high
        assert torch.equal(got, (row * (1 / scale)).round().clamp(-high, high) * scale)
        assert ((got - row).abs() <= scale * 0.50001).all()


def test_tokens_of_zeros_and_outliers_do_not_touch_the_others():
    x = torch.randn(3, 4, 8)
    x[0, 1], x[1, 2] = 0, x[1, 2] * 1e4
    y = quantize_tokens(x, IntegerRange.token(8))
    assert torch.equal(y[0, 1], torch.zeros(8))
    assert torch.equal(y[2], quantize_tokens(x[2], IntegerRange.token(8)))
    assert ((y - x).abs().amax(2) <= x.abs().amax(2) / 253).all()


def test_the_gradient_goes_straight_through():
    x = torch.randn(2, 3, 8, requires_grad=True)
    grad = torch.randn(2, 3, 8)
    fake_quantize_tokens(x, IntegerRange.token(4)).backward(grad)
    assert torch.equal(x.grad, grad)


def test_tokens_need_no_calibration_and_linears_of_one_input_share_them():
    gm = prepare(activation_granularity="token")
    kinds = [type(o) for _, o in observers(gm)]
    assert kinds.count(TokenFakeQuantize) == 4  # q, k and v read one; out, up, down
    assert kinds.count(StaticFakeQuantize) == 0
    found = layers(gm)
    assert {p for p, layer in found.items() if layer.activation_granularity == "token"} == set(LINEARS)
    assert found["emb"].key == ("timestep",)  # the temporal block keeps its table
    forward, called = gm.forward, []
    gm.forward = lambda *a: called.append(1) or forward(*a)
    tfmq_fx.calibrate(gm, calibration())  # the block's own rows suffice
    assert not called
    q = tfmq_fx.convert(gm)
    names = [op_name(n) for n in q.graph.nodes]
    assert names.count("quantize_per_token") == names.count("dequantize_per_token") == 4
    assert gm.meta["plan"].notes == ()


def test_convolutions_keep_one_scale_and_say_so():
    gm = prepare(activation_granularity="token", rules=(), edge_activation_bits=8)
    found, notes = layers(gm), gm.meta["plan"].notes
    assert {n.name.removesuffix(".weight") for n in notes} == {"patch", "mix", "unpatch", "head"}
    assert all("inside one dot product of a convolution" in n.reason and n.coarser for n in notes)
    assert found["mix"].activation_granularity == "tensor"
    rule = tfmq_fx.Rule(pattern="*", op="linear", activation_granularity="token")
    gm = prepare(rules=(rule,), edge_activation_bits=8)
    assert gm.meta["plan"].notes == ()
    assert {p for p, la in layers(gm).items() if la.activation_granularity == "token"} == set(LINEARS)
    per_tensor = tfmq_fx.Rule(pattern="up.*", activation_granularity="tensor")
    gm = prepare(activation_granularity="token", keyed="all", rules=(per_tensor,))
    assert layers(gm)["up"].key == ("timestep",)
    assert layers(gm)["down"].key == ()


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_nearer_than_one_scale_where_tokens_differ(bits):
    x = torch.randn(16, 64) * torch.linspace(-3, 3, 16).exp()[:, None]
    static = StaticFakeQuantize(
        observer=MinMaxObserver, quant_min=0, quant_max=2**bits - 1, dtype=torch.uint8
    )
    static(x)
    static.freeze()

    def error(y):
        return ((y - x).square().sum(1) / x.square().sum(1)).mean()

    assert error(quantize_tokens(x, IntegerRange.token(bits))) < 0.05 * error(static(x))


class Nothing(Quantizer):  # type: ignore[misc]
    """Another quantizer that leaves the data path as it is."""

    def annotate(self, model):
        return model

    def validate(self, model):
        pass


def test_with_another_quantizer_only_the_temporal_block_has_groups():
    gm = prepare(group_size=16, activation_granularity="token", rules=(), data_quantizer=Nothing())
    assert weights(gm).keys() == {"time.0", "time.2", "emb"}
    assert layers(gm)["emb"].group_size == 16
    assert gm.meta["plan"].notes == ()


def test_an_unknown_granularity_is_refused():
    words = r"activation_granularity: 'row' is unknown; use one of tensor, token"
    with pytest.raises(TFMQError, match=rf"Recipe\.{words}"):
        tfmq_fx.Recipe(activation_granularity="row")
    with pytest.raises(TFMQError, match=rf"Rule\('a\.\*'\)\.{words}"):
        tfmq_fx.Rule(pattern="a.*", activation_granularity="row")
