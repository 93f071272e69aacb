"""Let an int8 kernel for GPUs compute what follows it before it writes its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, hinted_shape, meta_value, op_name
from tfmq_fx.passes.int8.kernels import GPU_KERNELS, arguments_of, set_arguments
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.int8.share_quantized import QUANTIZE
from tfmq_fx.passes.pass_manager import declare

_RESHAPES = ("view", "reshape", "unsqueeze", "slice")  # of a vector to one that has as many numbers


@declare(after=("cuda_kernels",))
def fuse_epilogues(gm: GraphModule) -> PassResult:
    """Fold what alone reads a kernel's output into the kernel, in this order, each at most once.

        mul(kernel(..), s)         ==>  kernel(.., row_scale=s)     s: one number for each sample, or for each token
        add(kernel(..), b)         ==>  kernel(.., bias=b)          b: a constant for each output channel
        add(kernel(..), r)         ==>  kernel(.., residual=r)      r: any tensor that broadcasts to the output
        div or mul(kernel(..), 1)  ==>  kernel(..)                  networks divide by factors that are 1 by default
        silu or gelu(kernel(..))   ==>  kernel(.., activation)
        quantize(mul(kernel(..), f))  ==>  quantize(kernel(.., y_factor=f))      f as s; see `share_quantized`

    Numerics: the same operations on float32, in the same order; a GPU may round a product and a sum once instead of twice.
    Nodes marked PRECISE keep their outputs.
    """
    fused = sum(_fuse(kernel) for kernel in list(gm.graph.nodes) if kernel.target in GPU_KERNELS)
    if fused:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(fused))


def _fuse(kernel: Node) -> int:
    """Fold all that follows a kernel into it, and return how many nodes that were."""
    fused = 0
    while len(kernel.users) == 1 and not kernel.meta.get(PRECISE):
        user = next(iter(kernel.users))
        changes = {} if _is_by_one(user) else _changes(kernel, user)
        if changes is None or not _is_alike(kernel, user):
            break
        set_arguments(kernel, **changes)
        user.prepend(kernel)  # what it reads now may come later than it did
        kernel.meta["val"] = meta_value(user)
        user.replace_all_uses_with(kernel)
        user.graph.erase_node(user)
        fused += 1
    return fused


def _is_by_one(user: Node) -> bool:
    scales = user.target in (aten.mul.Tensor, aten.div.Tensor) and not user.kwargs
    return scales and isinstance(user.args[1], (int, float)) and user.args[1] == 1


def _is_alike(kernel: Node, user: Node) -> bool:
    x, y = meta_value(kernel), meta_value(user)
    same = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype == torch.float32
    return same and hinted_shape(kernel) == hinted_shape(user)


def _changes(kernel: Node, user: Node) -> dict[str, Any] | None:
    """Return the kernel's new arguments if it can compute `user`, its only reader; None if it cannot."""
    done = arguments_of(kernel)
    before_factor = done["y_factor"] is None
    before_activation = before_factor and done["activation"] == "none"
    before_sums = before_activation and done["bias"] is None and done["residual"] is None
    if user.target in (aten.silu.default, aten.gelu.default):
        return {"activation": _activation(user)} if before_activation else None
    other = _other(kernel, user)
    if other is None:
        return None
    if user.target is aten.mul.Tensor and _is_by_row(kernel, other):
        if before_sums and done["row_scale"] is None:
            return {"row_scale": other}
        feeds = all(u.target is QUANTIZE for u in user.users)
        return {"y_factor": other} if before_factor and feeds else None
    if user.target is aten.add.Tensor and before_activation and done["residual"] is None:
        bias = _bias(kernel, other) if done["bias"] is None else None
        return {"residual": other} if bias is None else {"bias": bias}
    return None


def _activation(user: Node) -> str:
    if op_name(user) == "silu":
        return "silu"
    kind = user.kwargs.get("approximate", user.args[1] if len(user.args) > 1 else "none")
    return "gelu" if kind == "none" else "gelu_tanh"


def _other(kernel: Node, user: Node) -> Node | None:
    """Return the other operand, a float tensor, of a product or sum; None if there is no such thing."""
    if len(user.args) != 2 or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    (other,) = (n for n in user.all_input_nodes if n is not kernel)
    value = meta_value(other)
    return other if isinstance(value, Tensor) and value.is_floating_point() else None


def _is_by_row(kernel: Node, factor: Node) -> bool:
    """Return True if a factor has one number for each of an output's leading dimensions, channels not among them."""
    shape, sizes = hinted_shape(kernel), hinted_shape(factor)
    sizes = [1] * (len(shape) - len(sizes)) + sizes
    leading = 1 if op_name(kernel) == "int8_conv2d" else len(shape) - 1
    given = max((i + 1 for i, size in enumerate(sizes) if size != 1), default=0)
    return len(sizes) == len(shape) and given <= leading and sizes[:given] == shape[:given]


def _bias(kernel: Node, other: Node) -> Node | None:
    """Return the constant (C_out,) that is added to each channel; None if `other` is not made of one."""
    constant = other
    while op_name(constant) in _RESHAPES and isinstance(constant.args[0], Node):
        constant = constant.args[0]
    if constant.op != "get_attr":
        return None
    axis = -3 if op_name(kernel) == "int8_conv2d" else -1
    shape, channels = hinted_shape(other), hinted_shape(kernel)[axis]
    expected = [channels] + [1] * (-1 - axis)
    flat = hinted_shape(constant) == [channels]
    return constant if flat and shape[len(shape) - len(expected) :] == expected else None
