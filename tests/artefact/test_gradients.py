"""Gradients with respect to the inputs are straight through: guidance, inversion and DPS need them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TinyUNet, calibration, make
from tests.helpers.lowered import lower
from tfmq_fx.artefact.gradients import _Differentiable, _StraightThrough
from tfmq_fx.base.errors import TFMQError

STEPS = torch.arange(0, 1000, 100)
NEAREST = tfmq_fx.Reconstruction(method="nearest")
T = torch.tensor([900, 300])


class Residual(nn.Module):
    """Blocks of linear layers around a residual stream that stays in float."""

    def __init__(self):
        super().__init__()
        self.inner, self.time, self.outer = nn.Linear(4, 16), nn.Linear(1, 16), nn.Linear(16, 4)
        self.up, self.down = (
            nn.ModuleList(nn.Linear(i, o) for _ in range(2)) for i, o in ((16, 64), (64, 16))
        )

    def forward(self, sample, timestep):
        h = self.inner(sample) + self.time(timestep.float().reshape(-1, 1) / 1000)[:, None]
        for up, down in zip(self.up, self.down, strict=True):
            h = h + 10 * down(F.gelu(up(h)))
        return self.outer(h)


CASES = {
    "one scale": {},
    "per timestep": {"keyed": "all"},
    "per token": {"activation_granularity": "token"},
    "4-bit weights": {"weight_bits": 4, "group_size": 8},
    "float8": {"linear_dtype": "float8_e4m3fn"},
    "float8 per timestep": {"linear_dtype": "float8_e4m3fn", "keyed": "all"},
}


def quantized(**changes):
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": torch.randn(40, 6, 4), "timestep": STEPS.repeat(4)})
    recipe = tfmq_fx.Recipe(**{"weight_bits": 8, "reconstruction": NEAREST, **changes})
    network = make(Residual)
    return network, tfmq_fx.quantize(network, recipe, calibration=data)


def gradient(network, x):
    y = x.clone().requires_grad_()
    return torch.autograd.grad(network(y, T).square().sum(), y)[0]


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_float_networks_but_for_rounding(case):
    """
    Rounding moves the points at which derivatives are taken, and the outputs that the loss squares: both by
    about the relative error of the output, 2% at 8 bits and 10% at 4. An angle of 10% is a cosine of 0.995; a gradient
    that misses the blocks, as without the estimator, has 0.05.
    """
    network, q = quantized(**CASES[case])
    x = torch.randn(2, 6, 4)
    expected, found = gradient(network, x), gradient(q, x)
    assert cosine(found, expected) > 0.95
    assert 0.8 < float(found.norm() / expected.norm()) < 1.25


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_bitwise_the_same_with_and_without(case):
    _, q = quantized(**CASES[case])
    x = torch.randn(2, 6, 4)
    with torch.no_grad():
        expected = q(x, T)
    assert torch.equal(q(x.clone().requires_grad_(), T), expected)
    assert torch.equal(q(x, T), expected)


def test_convolutions_and_attention_have_it(tiny):
    x = calibration().tensors["sample"][:2]
    y = x.clone().requires_grad_()
    with torch.no_grad():
        expected = tiny(x, T)
    assert torch.equal(tiny(y, T), expected)
    # 4-bit weights, reconstructed briefly on noise: the output itself is off by 10 to 20%.
    assert cosine(gradient(tiny, x), gradient(make(TinyUNet), x)) > 0.9


def test_it_is_one_inside_the_range_and_zero_outside():
    ops = torch.ops.quantized_decomposed
    x = torch.tensor([-3.0, -0.1, 0.0, 0.3, 12.7, 12.74, 12.76, 40.0], requires_grad=True)
    qparams = (0.1, 128, 0, 255, torch.uint8)
    y, inside = _StraightThrough.apply(
        x, ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default, *qparams
    )
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert not inside.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at import
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_and_functional_gradients_agree():
    _, q = quantized()
    x, v = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    _, forward = torch.func.jvp(lambda y: q(y, T), (x,), (v,))
    out, back = torch.func.vjp(lambda y: q(y, T), x)
    torch.testing.assert_close((back(torch.ones_like(out))[0] * v).sum(), forward.sum())
    torch.testing.assert_close(torch.func.grad(lambda y: q(y, T).square().sum())(x), gradient(q, x))


def test_nothing_is_added_where_no_gradient_is_wanted(monkeypatch):
    def never(*_):
        raise AssertionError

    network, q = quantized()
    x = torch.randn(2, 6, 4)
    monkeypatch.setattr(_Differentiable, "run", never)
    assert not q(x, T).requires_grad  # the float parameters that are left do not learn
    with torch.no_grad():
        q(x.clone().requires_grad_(), T)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_a_compiled_graph_gets_them_too():
    _, q = quantized()
    x = torch.randn(2, 6, 4)
    torch._dynamo.reset()
    assert torch.equal(gradient(torch.compile(q, backend="eager"), x), gradient(q, x))


def test_copies_and_loaded_networks_have_them(tmp_path):
    _, q = quantized()
    q.save_pretrained(tmp_path / "q")
    x = torch.randn(2, 6, 4)
    for other in (copy.deepcopy(q), tfmq_fx.load(tmp_path / "q")):
        assert torch.equal(gradient(other, x), gradient(q, x))


def test_a_lowered_network_says_that_it_has_none():
    _, q = quantized()
    low = lower(q, engine="torch", compile=False, precision="float32", batch=2)
    x = torch.randn(2, 6, 4, requires_grad=True)
    with pytest.raises(TFMQError, match="a lowered network has none"):
        low(x, T)
    with torch.no_grad():
        assert low(x, T).shape == x.shape


def test_integers_that_something_else_reads_are_refused():
    _, q = quantized()
    node = next(
        n for n in q.network.graph.nodes if "quantize_per_tensor" in str(n.target) and n.op == "call_function"
    )
    with q.network.graph.inserting_after(node):
        q.network.graph.call_function(torch.ops.aten.abs.default, (node,))
    q.network.recompile()
    with pytest.raises(TFMQError, match=f"node {node.name}: .* uses its integers, so it has no gradient"):
        gradient(q, torch.randn(2, 6, 4))
