"""Weights that are functions of parameters alone become parameters."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tfmq_fx
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name, weight_argument
from tfmq_fx.passes import captured_of, fold_parameters

X, T = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
NEAREST = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class Normalised(nn.Module):
    """A magnitude-preserving layer (EDM2), of which a gain is a parameter too."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(c_out, c_in, 3, 3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        w = self.weight.to(torch.float32)
        w = w / (1e-4 + torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True))
        return F.conv2d(x, (w * (self.gain / w[0].numel() ** 0.5)).to(x.dtype), padding=1)


class Net(nn.Module):
    """The middle convolution is called twice."""

    def __init__(self, conv):
        super().__init__()
        self.time, self.a, self.m, self.b = nn.Linear(1, 8), conv(3, 8), conv(8, 8), conv(8, 3)

    def forward(self, sample, timestep):
        h = self.a(sample) + self.time(timestep.reshape(-1, 1).float() / 1000)[:, :, None, None]
        return self.b(self.m(self.m(h.relu()).relu()).relu())


CONVOLUTIONS = {
    "weight_norm": lambda i, o: weight_norm(nn.Conv2d(i, o, 3, padding=1)),
    "spectral_norm": lambda i, o: spectral_norm(nn.Conv2d(i, o, 3, padding=1)),
    "standardised": lambda i, o: Standardised(i, o, 3),
    "normalised": Normalised,
}


class Decoder(nn.Module):
    """Cross-attention reads slices of in_proj_weight, self-attention the whole."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.time, self.i, self.d, self.o = nn.Linear(1, 16), nn.Linear(6, 16), layer, nn.Linear(16, 6)

    def forward(self, sample, timestep):
        h = self.i(sample)
        return self.o(self.d(h, h[:, :3] + self.time(timestep.reshape(-1, 1, 1).float() / 1000)))


def built(cls, *args):
    torch.manual_seed(0)
    return cls(*args).eval()


def exported(network, x=X):
    with torch.no_grad():
        return torch.export.export(network, (x, T), strict=False).module(check_guards=False)


def weights(gm):
    """The paths of the layers' weights; the node's name where one is computed."""
    layers = [n for n in gm.graph.nodes if weight_argument(n) is not None]
    found = [n.args[weight_argument(n)] for n in layers]
    return [str(w.target) if w.op == "get_attr" else w.name for w in found]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_weights_are_parameters_with_the_same_values(kind):
    network = built(Net, CONVOLUTIONS[kind])
    gm = exported(network)
    assert fold_parameters(gm).modified
    middle = [w for w in weights(gm) if w.startswith("m.")]
    assert len(middle) == 2
    assert len(set(middle)) == 1  # one weight, read twice
    assert all(isinstance(gm.get_parameter(w), nn.Parameter) for w in weights(gm))
    with torch.no_grad():
        assert torch.equal(gm(X, T), network(X, T))
    before = {n: p.clone() for n, p in network.named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_second_run_changes_nothing(kind):
    gm = exported(built(Net, CONVOLUTIONS[kind]))
    fold_parameters(gm)
    before = str(gm.graph)
    assert not fold_parameters(gm).modified
    assert str(gm.graph) == before


def test_what_was_folded_is_recorded_and_what_is_unread_is_gone():
    gm = exported(built(Net, CONVOLUTIONS["weight_norm"]))
    fold_parameters(gm)
    parts = tuple(f"a.parametrizations.weight.original{i}" for i in (0, 1))
    assert captured_of(gm).folded["a.weight"] == parts
    assert not {*parts} & dict(gm.named_parameters()).keys()


def test_slices_of_a_packed_projection_have_names_of_their_own():
    x = torch.randn(2, 4, 6)
    gm = exported(built(Decoder), x)
    with torch.no_grad():
        expected = gm(x, T)  # the network itself takes torch's fast path
        fold_parameters(gm)
        assert torch.equal(gm(x, T), expected)
    packed = [w for w in weights(gm) if "multihead_attn.in_proj" in w]
    assert packed == ["d.multihead_attn.in_proj_weight_0", "d.multihead_attn.in_proj_weight_1"]
    assert gm.get_parameter(packed[0]).shape == (16, 16)
    assert "d.self_attn.in_proj_weight" in weights(gm)


def test_slices_are_saved_and_loaded(tmp_path):
    x, t = torch.randn(16, 4, 6), torch.arange(0, 800, 100).repeat(2)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": t})
    q = tfmq_fx.quantize(built(Decoder), NEAREST, calibration=data)
    q.save_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(tfmq_fx.load(tmp_path / "q")(x, t), q(x, t))


class Moving(nn.Module):
    """Each weight differs from call to call: by the timestep, a buffer that the network updates, random numbers."""

    def __init__(self):
        super().__init__()
        self.time, self.w = nn.Linear(1, 4), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.ones(4, 1))

    def forward(self, sample, timestep):
        h = sample + self.time(timestep.reshape(-1, 1).float())
        h = F.linear(h, self.w * timestep.float().mean())
        h = F.linear(h, self.w * self.scale)
        self.scale.mul_(0.9)
        return F.linear(h, self.w + torch.randn(4, 4))


def test_what_differs_from_call_to_call_is_left():
    gm = exported(built(Moving), torch.randn(2, 4))
    assert not fold_parameters(gm).modified
    assert [op_name(n) for n in gm.graph.nodes].count("mul") >= 2


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_they_are_quantized_and_the_report_says_so(kind):
    network = built(Net, CONVOLUTIONS[kind])
    x, t = torch.randn(16, 3, 8, 8), torch.arange(0, 800, 100).repeat(2)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": t})
    q = tfmq_fx.quantize(network, dataclasses.replace(NEAREST, weight_bits=8), calibration=data, strict=True)
    assert len(q.report["layers"]) == 5
    notes = [n["name"] for n in q.report["notes"] if n["reason"].startswith("a function of parameters alone")]
    assert len(notes) == 3
    assert not [
        f["name"]
        for f in q.report["float"]
        if f["name"] in dict(network.named_parameters()) and "original" in f["name"]
    ]
    with torch.no_grad():
        expected = network(x, t)
        # 8 bits of weights and activations: each layer adds about 1/256 of its range, and there are five
        assert (q(x, t) - expected).abs().max() < 5 / 128 * expected.abs().max()


def test_an_infinite_weight_is_refused_wherever_it_comes_from():
    network = built(Net, CONVOLUTIONS["weight_norm"])
    with torch.no_grad():
        network.a.parametrizations.weight.original0[0] = torch.inf
    with pytest.raises(TFMQError, match=r"weight a\.weight: holds NaN or infinite"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})
