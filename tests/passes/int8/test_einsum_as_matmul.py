"""Einsums as matrix products: values, and no copy of an operand where the sum is over any of its dimensions."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes.int8.einsum_as_matmul import einsum_as_matmul

SIZES = {"b": 2, "h": 3, "c": 4, "t": 5, "s": 6}


def operands(equation):
    torch.manual_seed(0)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [torch.randn([SIZES[i] for i in term if i in SIZES]) for term in terms]


@pytest.mark.parametrize(
    "equation",
    [
        "bct,bcs->bts", "bts,bcs->bct", "bhtc,bhsc->bhts", "bthc,bshc->bhts", "bhts,bshc->bthc", "tc,cs->st", "b t c, b c s -> b s t",
    ],
)  # fmt: skip
def test_products_are_one_matmul_of_transposed_operands(equation):
    given = operands(equation)
    torch.testing.assert_close(einsum_as_matmul(equation, given), torch.einsum(equation, *given))
    gm = make_fx(lambda *x: einsum_as_matmul(equation, x))(*given)
    found = [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]
    assert found.count("bmm") + found.count("mm") == 1
    assert "unsqueeze" not in found


@pytest.mark.parametrize(
    "equation",
    [
        "bt,bt->b",
        "bcc->b",
        "bct,cs->bts",
        "btc,bcs->bt",
        "hbct,bcs->hbts",
        "bct->bc",
        "b,b->b",
        "...c,...c->...",
    ],
)
def test_everything_else_is_torchs(equation):
    sizes = operands(equation) if "." not in equation else [torch.randn(2, 4), torch.randn(2, 4)]
    torch.testing.assert_close(einsum_as_matmul(equation, sizes), torch.einsum(equation, *sizes))
