"""Scales per group of weights and per token, from the recipe to the loaded artefact."""

import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load_file

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, Tokens, calibration, make
from tfmq_fx.artefact.graph_json import quantized_weights, tensors_of
from tfmq_fx.base._torchao import MinMaxObserver, Quantizer
from tfmq_fx.base.arithmetic import IntegerRange, quantize_tokens
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.observers import PerChannelWeightFakeQuantize, StaticFakeQuantize, TokenFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]

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
    return {layer.path.removesuffix(".weight"): layer for layer in state_of(gm).plan.layers}


def weights(gm):
    return {
        str(n.args[0].target).removesuffix(".weight"): o
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    }


@pytest.mark.slow
def test_it_compiles():
    settings = recipe(
        group_size=16, activation_granularity="token", reconstruction=tfmq_fx.Reconstruction(method="nearest")
    )
    q = tfmq_fx.quantize(make(Tokens), settings, calibration=calibration())
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X, T), q(X, T))


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
    loaded.export(tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(converted(X, T), expected)
        assert torch.equal(q(X, T), expected)
        assert torch.equal(loaded(X, T), expected)
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
    notes = {n.name: n for n in state_of(gm).plan.notes}
    assert notes.keys() == {"mix.weight", "head.weight"}
    assert (
        notes["mix.weight"].reason
        == "groups of 8: group_size=16 does not divide its 72 weights per output channel"
    )
    assert not notes["mix.weight"].coarser
    assert {p: len(o.scale) for p, o in weights(gm).items()}["emb"] == 32 * 2
    tfmq_fx.calibrate(gm, calibration())
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method="gptq"))
    assert all(r.error <= r.error_nearest for r in state_of(gm).reconstruction)
    assert state_of(gm).reconstruction[0].error < 0.7 * state_of(gm).reconstruction[0].error_nearest
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
    assert state_of(gm).plan.notes == ()


def test_convolutions_keep_one_scale_and_say_so():
    gm = prepare(activation_granularity="token", rules=(), edge_activation_bits=8)
    found, notes = layers(gm), state_of(gm).plan.notes
    assert {n.name.removesuffix(".weight") for n in notes} == {"patch", "mix", "unpatch", "head"}
    assert all("inside one dot product of a convolution" in n.reason and n.coarser for n in notes)
    assert found["mix"].activation_granularity == "tensor"
    rule = tfmq_fx.Rule(pattern="*", op="linear", activation_granularity="token")
    gm = prepare(rules=(rule,), edge_activation_bits=8)
    assert state_of(gm).plan.notes == ()
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
    assert state_of(gm).plan.notes == ()
