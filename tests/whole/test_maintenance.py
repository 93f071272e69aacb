"""A model whose temporal features are cached: saved, compiled, exported, lowered, reported."""

import pytest
import torch
from safetensors.torch import load_file

import tfmq_fx
from benchmarks.networks.small import TinyUNet, make
from tests.helpers.command_line import run
from tests.helpers.lowered import lower
from tests.helpers.maintenance import BATCH, quantized
from tfmq_fx.artefact.saving import WEIGHTS
from tfmq_fx.maintenance.measuring import stored_bytes

X, T = BATCH["sample"][:6], torch.tensor([900, 0, 300, 300, 100, 800])


@pytest.mark.parametrize("cache_type", ["float16", "int8"])
def test_it_is_saved_and_loaded_bit_by_bit(tmp_path, cache_type):
    q = quantized(cache_type=cache_type)
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(X, T), q(X, T))
    assert not [n for n in load_file(tmp_path / "q" / WEIGHTS) if "time_mlp" in n or "emb" in n]
    assert loaded.report["maintenance"]["maintain"] == "cache"


def test_it_compiles_without_a_recompile_between_steps():
    q = quantized()
    torch._dynamo.reset()
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (900, 300, 0):
            step = torch.full((6,), t)
            torch.testing.assert_close(compiled(X, step), q(X, step))


def test_it_exports_as_pt2(tmp_path):
    q = quantized()
    q.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(sample=X, timestep=T), q(X, T))


@pytest.mark.parametrize("cache_type", ["float16", "int8"])
def test_it_is_lowered(cache_type):
    pytest.importorskip("openvino", reason="lowering needs the openvino extra")
    q = quantized(cache_type=cache_type)
    low = lower(q, "cpu", precision="float32", batch=6)
    with torch.no_grad():
        expected, got = q(X, T), low(X, T)
    step = (expected.max() - expected.min()) / 255  # rounding ties may fall the other way
    assert (got - expected).abs().max() <= 3 * step


def test_timesteps_outside_the_table_take_the_nearest_features():
    q = quantized()
    block = q.temporal_block
    with torch.no_grad():
        for t, nearest in ((449, 400), (451, 500), (5000, 900)):
            for a, b in zip(block(torch.tensor([t])), block(torch.tensor([nearest])), strict=True):
                assert torch.equal(a, b)
        q(X[:2], torch.tensor([449, 900]))
    assert q.report["unseen_timesteps"] == {"449": 1}
    q.reset_unseen()


def test_the_report_counts_what_is_there():
    report = quantized().report
    paths = {layer["path"] for layer in report["layers"]} | {f["name"] for f in report["float"]}
    assert not {p for p in paths if "time_mlp" in p or ".emb." in p}
    network = make(TinyUNet)
    left = sum(p.numel() for n, p in network.named_parameters() if "time_mlp" not in n and ".emb." not in n)
    assert report["sizes"]["quantized_weights"] + report["sizes"]["float_parameters"] == left
    assert report["sizes"]["quantized_bytes"] == sum(stored_bytes(quantized().network).values())


def test_the_command_line_passes_it_on_and_says_what_was_cached(monkeypatch, capsys, tmp_path):
    taken = []

    def instead(_pipe, recipe, **_):
        taken.append(recipe.maintain)
        return quantized()

    monkeypatch.setattr("tfmq_fx.pipeline.quantize", instead)
    options = (tmp_path / "q", "--num-samples", 1, "--steps", 1)
    code, _, err = run(monkeypatch, capsys, "quantize", *options, "--maintain", "remember")
    assert code == 2
    assert "Recipe.maintain: 'remember' is unknown; use one of reconstruct, cache, auto" in err
    code, out, _ = run(monkeypatch, capsys, "quantize", *options, "--maintain", "cache")
    assert code == 0
    assert taken == ["cache"]
    assert (
        "maintenance: 2 of 2 temporal features cached; 0.4 kB in total, 2.4 kB if all were reconstructed"
        in out
    )
