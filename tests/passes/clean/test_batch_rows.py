"""A graph of the first row becomes one of every row: the operators it has then, its values, a second run, what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import aten, meta_value, op_name
from tfmq_fx.passes.clean.batch_rows import batch_rows
from tfmq_fx.passes.clean.remove_noops import remove_noops


def exported(forward, *inputs, more=()):
    """The graph of a function of the first rows of `inputs`, whose number of rows may differ."""

    class OfFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv, self.norm = (
                nn.Linear(6, 4),
                nn.Conv2d(3, 4, 3, padding=1),
                nn.GroupNorm(2, 4),
            )

        def forward(self, *given):
            if any(x.shape[0] != given[0].shape[0] for x in given):
                raise ValueError
            return forward(self, *(x[0] for x in given))

    torch.manual_seed(0)
    network = OfFirst().eval()
    dynamic = tuple(dict.fromkeys((0, *more), torch.export.Dim.AUTO) for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(network, inputs, dynamic_shapes=(dynamic,), strict=False)
    gm = program.module(check_guards=False)
    remove_noops(gm)
    return network, gm


def convolutions(m, x):
    h = m.norm(m.conv(x.unsqueeze(0)))
    return F.interpolate(h, scale_factor=2)[0]


def frames(m, x):  # each is a row of a batch of the sample's own
    return m.norm(m.conv(x.unflatten(-1, (2, -1)).movedim(-2, 0))).mean((0, 2), keepdim=True)


def tokens(m, x):
    h = m.linear(x)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(0, 1)[None] for y in (h, h * 2, h.sin()))
    made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.layer_norm(made + h.mean(0), (4,)).squeeze(0).t()


def places(m, x):  # of a row, and by two numbers
    h = m.linear(x)
    h = torch.index_put(h, [torch.arange(5) > 2], m.linear.bias)
    h = torch.index_put(h[None], [torch.tensor([0]), torch.tensor([1])], h.sum(1)[:4])[0]
    h = aten.index_put(h, [None, torch.tensor([3, 1])], h[:, :2])
    h = torch.index_put(h, [x[:, 0] > 0], m.linear.bias)  # other places in each row
    return h + torch.index_put(torch.zeros(5, 4), [torch.tensor([3, 0])], h[:2])


def queries(m, x):  # the same for all rows, so attention has another kernel for several than for one
    h = m.linear(x).unflatten(-1, (2, -1)).transpose(0, 1)[None]
    q = torch.arange(12.0).view(1, 3, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, h, h * 2).transpose(1, 2).view(1, 3, 4)[0]


def views(_m, x):
    table = torch.arange(24.0).view(6, 4)
    chosen = table[(x[:, 0] > 0).long() + torch.arange(len(x)) % 2]
    parts = torch.cat([x, torch.ones(2, 6)]).split([2, len(x)], dim=0)
    stacked = torch.stack([parts[1], x.flip(0)], dim=1).sum((1,))
    return torch.cat([chosen, stacked, x[torch.tensor([1, 0])].repeat(2, 1)[: len(x)]], dim=-1), x.softmax(
        0
    ).amax()[None]


def padded(_m, x):  # by numbers, and by values at the edges, with a batch of the sample's own and without
    own = F.pad(x.unflatten(-1, (2, 3)).movedim(1, 0), (2, 0), mode="replicate").mean(0)
    return F.pad(x, (1, 0, 2, 0)) * F.pad(x[:4], (0, 1), mode="reflect").mean() + F.pad(own, (0, 2, 2, 0))


def diagonals(m, x):  # with a batch of the sample's own, and without one
    matrices = torch.diag_embed(m.linear(x)) + torch.diag_embed(x[:, 0])[:, :4, None]
    return matrices + torch.diagonal(matrices, dim1=-1, dim2=1)[:, None]


def vectors(m, t, x):
    e = m.linear(torch.cat([t[None] * torch.arange(1, 4), t[None].cos().expand(3)])[None])
    scale, shift = e.chunk(2, dim=1)
    h = x[None] * (1 + scale[:, None]).mean() + shift.unsqueeze(1).amax()
    return torch.where(h > 0, h, h.permute(0, 1, 2).tanh()).select(0, 0)


def writes(m, x):  # into tensors that are the same for all rows until then
    place = x.new_zeros(1, len(x) + 3, 6)
    place = place.slice_scatter(x[None] * 2, 1, 2, len(x) + 2)
    row = place[0].select_scatter(m.linear(x).sum(1)[:6], 0, 1)
    return m.linear(row + torch.zeros(1, len(x) + 3, 6).select_scatter(row, 0, 0)[0])


CASES = {
    "writes": (writes, [(6, 6)]),
    "convolutions": (convolutions, [(3, 6, 6)]),
    "frames": (frames, [(3, 6, 8)]),
    "places": (places, [(5, 6)]),
    "queries": (queries, [(5, 6)]),
    "tokens": (tokens, [(5, 6)]),
    "vectors": (vectors, [(), (5, 6)]),
    "diagonals": (diagonals, [(5, 6)]),
    "padded": (padded, [(5, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_computed_as_the_first_was(name):
    forward, shapes = CASES[name]
    network, gm = exported(forward, *(torch.randn(3, *s) for s in shapes))
    assert batch_rows(gm).modified
    inputs = [torch.randn(5, *s) for s in shapes]
    with torch.no_grad():
        expected = torch.stack([network(*(x[i : i + 1] for x in inputs)) for i in range(5)])
        # Sums of a batch may have another order.
        torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert not batch_rows(gm).modified


def test_indices_lists_and_views_are_those_of_each_row():
    network, gm = exported(lambda m, x: views(m, x)[0], torch.randn(3, 2, 6))
    batch_rows(gm)
    x = torch.randn(4, 2, 6)
    assert torch.equal(gm(x), torch.stack([network(x[i:]) for i in range(4)]))


def test_operators_stay_what_they_are_and_a_batch_of_one_becomes_the_batch():
    _, gm = exported(tokens, torch.randn(3, 5, 6))
    batch_rows(gm)
    (attention,) = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert list(meta_value(attention).shape[1:]) == [2, 5, 2]  # not (N, 1, ..)
    assert [op_name(n) for n in gm.graph.nodes].count("linear") == 1
    assert not gm.graph.find_nodes(op="call_function", target=aten.select.int)


def test_what_mixes_all_of_a_row_in_a_number_is_refused_by_its_name():
    _, gm = exported(lambda _m, x: x - x.median(), torch.randn(3, 2, 6))
    with pytest.raises(
        TFMQError, match=r"node median: .* cannot be computed for all samples of a list at once"
    ):
        batch_rows(gm)
