"""Give a quantized graph gradients: quantization is differentiated as if it only clipped.

Rounding has a derivative of zero almost everywhere, and torch's quantize operators have none. The
straight-through estimator (Bengio et al. 2013) takes one instead: one for values inside the range, and zero
for values that are clipped. The values themselves come from the graph's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule, Interpreter, Node

from tfmq_fx.base.ambient import traced
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.float8 import DTYPE
from tfmq_fx.graph.float8 import is_cast
from tfmq_fx.graph.nodes import is_decomposed, op_name

_BEYOND = 2**24  # integers that a float32 holds exactly, and more than any range of ours


def wants_gradient(inputs: Sequence[Tensor]) -> bool:
    """Return True if autograd, in reverse or forward mode, follows one of the inputs here."""
    # torch.compile leaves the graph for `with_gradients`, which an export cannot do.
    compiled = torch.compiler.is_dynamo_compiling()
    if not torch.is_grad_enabled() or (torch.compiler.is_exporting() if compiled else traced(inputs)):
        return False
    forward = forward_ad._current_level >= 0
    return any(x.requires_grad or (forward and forward_ad.unpack_dual(x).tangent is not None) for x in inputs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def with_gradients(network: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Run a converted graph with straight-through gradients. The outputs are bitwise those of the graph.

    Raises TFMQError for a quantized value that is used as integers: it has no gradient.
    """
    return _Differentiable(network).run(*inputs)


class _Differentiable(Interpreter):
    """An interpreter that runs each pair dequantize(quantize(x)) as one differentiable function.

    It does so at the quantize node, so the value of that node is already the float one.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        if _is(n, "quantize") and n.users:
            x, *qparams = self.fetch_args_kwargs_from_env(n)[0]
            y, _ = _StraightThrough.apply(x, n.target, _dequantize_of(n), *qparams)  # type: ignore[no-untyped-call]
            return y
        if is_cast(
            n, DTYPE
        ):  # the clamp before it, and the cast to float32 behind it, have their own gradients
            return _ThroughFloat8.apply(self.fetch_args_kwargs_from_env(n)[0][0])  # type: ignore[no-untyped-call]
        if _is(n, "dequantize") and _is(n.args[0], "quantize"):
            return self.env[n.args[0]]  # type: ignore[index]
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, GraphModule):  # the temporal block
            return _Differentiable(module).run(*args)
        return super().call_module(target, args, kwargs)


class _StraightThrough(torch.autograd.Function):
    """dequantize(quantize(x)), and which values of x are inside the range; only the first has a gradient."""

    @staticmethod
    def forward(x: Tensor, quantize: Any, dequantize: Any, *qparams: Any) -> tuple[Tensor, Tensor]:
        q = quantize(x, *qparams)
        unclipped = quantize(x, *qparams[:-3], -_BEYOND, _BEYOND, torch.int32)
        return dequantize(q, *qparams), unclipped == q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        inside = output[1]
        ctx.mark_non_differentiable(inside)
        ctx.save_for_backward(inside)
        ctx.save_for_forward(inside)
        ctx.others = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return (gradients[0] * inside, *[None] * ctx.others)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return tangents[0] * inside, None


class _ThroughFloat8(torch.autograd.Function):
    """A cast to float8 and back to float32, with the gradient of the identity: torch would cast that to float8 too."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(DTYPE).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ARG004
        return gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        return tangents[0].clone()


def _is(node: Any, what: str) -> bool:
    """Return True for a call of one of the operators `quantize_*` or `dequantize_*`."""
    return isinstance(node, Node) and is_decomposed(node) and op_name(node).startswith(f"{what}_per_")


def _dequantize_of(quantize: Node) -> Callable[..., Tensor]:
    """Return the function of (integers, *qparams) that turns the integers back into floats in this graph."""
    first, count = next(iter(quantize.users)), len(quantize.args)
    for user in quantize.users:
        same = (user.target, user.args, user.kwargs) == (first.target, first.args, first.kwargs)
        if not same or not _is(user, "dequantize") or user.args[1:count] != quantize.args[1:]:
            raise TFMQError(
                f"node {quantize.name}: {user.name} uses its integers, so it has no gradient; call the network in "
                "torch.no_grad(), or with inputs that need none."
            )
    dequantize: Any = first.target
    more, named = first.args[count:], first.kwargs  # the dtype of the result
    return lambda q, *qparams: dequantize(q, *qparams, *more, **named)
