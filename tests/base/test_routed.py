"""Tokens that a network sends to a few of its experts: the same values by masks, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.filled import Filled
from tfmq_fx.base.routed import Routed


def sizes(found):
    return found.tolist()


def ends(found):
    return found.cpu().numpy().cumsum(0)


class Experts(nn.Module):
    """By counts, or by where each expert's tokens end; sums by several operators."""

    def __init__(self, *, experts=4, chosen=2, style="counts", sums="index_add"):
        super().__init__()
        self.gate = nn.Linear(6, experts)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))
        self.chosen, self.style, self.sums = chosen, style, sums

    def forward(self, x):
        tokens = x.reshape(-1, 6)
        found = torch.topk(self.gate(tokens).softmax(-1), self.chosen, dim=-1, sorted=False)
        flat = found.indices.view(-1)
        order, counts, made = (
            flat.argsort(),
            flat.bincount(minlength=len(self.experts)),
            torch.zeros_like(tokens),
        )
        start = 0
        for i, number in enumerate(counts.tolist() if self.style == "counts" else ends(counts)):
            end = start + number if self.style == "counts" else number
            if start == end:
                continue
            own = (order // self.chosen)[start:end]
            y = self.experts[i](tokens[own]) * found.values.view(-1, 1)[order[start:end]]
            made = self.added(made, own, y)
            start = end
        return made.view(x.shape)

    def added(self, made, own, y):
        if self.sums == "index_add":
            return made.index_add_(0, own, y)
        if self.sums == "functional":
            return made.index_add(0, own, y)
        index = own.view(-1, 1).repeat(1, 6)
        if self.sums == "scatter_add":
            return made.scatter_add_(0, index, y)
        return made.scatter_reduce_(0, index, y, reduce="sum")


@settings(max_examples=20, deadline=None)
@given(
    experts=st.integers(1, 6),
    chosen=st.integers(1, 3),
    tokens=st.integers(1, 20),
    style=st.sampled_from(["counts", "ends"]),
    sums=st.sampled_from(["index_add", "functional", "scatter_add", "scatter_reduce"]),
    seed=st.integers(0, 99),
)
def test_each_token_gets_what_its_own_experts_make_of_it(experts, chosen, tokens, style, sums, seed):
    torch.manual_seed(seed)
    network = Experts(experts=experts, chosen=min(chosen, experts), style=style, sums=sums).double()
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        with Filled(), Routed() as mode:
            found = network(x)
    assert mode.used
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("style", ["counts", "ends"])
def test_its_graph_has_every_expert_whoever_the_example_needs_and_any_number_of_tokens(style):
    torch.manual_seed(0)
    network = Experts(style=style)
    with torch.no_grad():
        network.gate.bias.copy_(torch.tensor([9.0, 9, 0, 0]))  # nobody takes the last two
        sizes = {"x": {1: torch.export.Dim.AUTO}}
        with Filled(), Routed():
            program = torch.export.export(
                network, (), {"x": torch.randn(1, 5, 6)}, dynamic_shapes=sizes, strict=False
            )
        names = [str(n.target) for n in program.graph.nodes]
        assert sum("aten.linear" in n for n in names) == 5
        assert not any(word in n for n in names for word in ("aten.item", "bincount", "aten.index"))
        network.gate.bias.zero_()  # the program has the same parameters
        x = torch.randn(1, 9, 6)
        torch.testing.assert_close(program.module()(x=x), network(x))


def test_an_expert_sees_zeros_for_the_tokens_of_others():
    torch.manual_seed(0)
    network, x, seen = Experts(), torch.randn(1, 12, 6), {}
    for i, expert in enumerate(network.experts):
        expert.register_forward_pre_hook(lambda _, args, i=i: seen.setdefault(i, args[0]))
    with torch.no_grad(), Routed():
        chosen = network.gate(x[0]).topk(2).indices
        network(x)
    for i, given_to in seen.items():
        own = (chosen == i).any(1)
        assert torch.equal(given_to[own], x[0][own])
        assert not given_to[~own].any()


def test_what_is_not_understood_is_computed_as_it_is():
    torch.manual_seed(0)
    scores, x = torch.randn(7, 4), torch.randn(7, 3)
    with Routed() as mode:
        _, chosen = scores.topk(2)
        flat = chosen.flatten()
        assert torch.equal(flat.bincount(minlength=4), torch.bincount(flat.clone(), minlength=4))
        assert torch.equal(flat.argsort()[3:5], flat.argsort()[3:5])
        assert torch.equal(x[chosen[:, 0]], x.gather(0, chosen[:, :1].expand(-1, 3)))
        assert torch.equal(flat.argsort(descending=True) // 2, torch.argsort(flat, descending=True) // 2)
    assert not mode.used


def test_counts_as_numbers_are_refused():
    with Routed():
        counts = torch.randn(7, 4).topk(2).indices.flatten().bincount(minlength=4)
        first, second, *_ = counts.tolist()
        total = first + second
        assert first != second
        assert total > 0
        for number in (lambda: range(total), lambda: torch.zeros(total)):
            with pytest.raises((TFMQError, TypeError)):
                number()
        with pytest.raises(TypeError):
            second + 3
        assert isinstance(counts.numpy(), np.ndarray)
        assert [*map(str, counts.cumsum(0).tolist())] != [*map(str, counts.tolist())]
