"""GPTQ: choose a layer's integers column by column. Later columns compensate for each rounding error.

Shapes: a layer is G groups of (C, K) weights, with C output channels and K inputs each. A convolution is the linear
layer of its unfolded input, so K = C_in / G * kernel elements. R rows are samples times positions.

X are a layer's inputs in the float network, Xq those in the quantized network: (K, R) for each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from tfmq_fx.base.arithmetic import NumberRange
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import Ranks, Workers
from tfmq_fx.graph.nodes import convolution_arguments, groups_of, op_name

T = TypeVar("T")
PRODUCTS = 2**28  # the most float32 numbers to hold in products at once
COLUMNS = 16  # rounded one by one; their errors are carried to the others in ever larger products


class Moments:
    """The second moments of a layer's inputs, in float64: H = Xq Xq^T, and D = (X - Xq) Xq^T for `corrected`.

    Adding the rows of A, then of B, equals adding both together, up to float addition order.

    pieces: how many pieces of consecutive columns a wide layer's H is cut into to fit in memory. Each piece is
        treated as a separate group, so errors are compensated only within a piece.
    """

    def __init__(
        self, groups: int, columns: int, *, pieces: int = 1, device: torch.device | None = None
    ) -> None:
        self.pieces = pieces
        self.h_GKK = torch.zeros(groups, columns, columns, dtype=torch.float64, device=device)
        self.d_GKK: Tensor | None = None
        self._factors: dict[float, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of(
        layer: Node,
        weight: Tensor,
        inputs: Sequence[Callable[[T], Tensor]],
        parts: Sequence[T],
        *,
        workers: Workers,
        ranks: Ranks,
        pieces: int = 1,
        positions: int | None = None,
    ) -> Moments:
        """Return the moments of a layer's inputs.

        inputs: functions of a part of the data that return the inputs in the quantized network and, for D, in the float one.
        positions: of each sample, at most this many positions drawn at random, the same in every sample. None: all.
        """

        def products(part: T) -> tuple[Tensor, Tensor | None]:
            return _products(
                *[parted(rows(layer, x(part).float(), weight, positions), pieces) for x in inputs]
            )

        groups, columns = groups_of(layer) * pieces, weight[0].numel() // pieces
        found = Moments(groups, columns, pieces=pieces, device=weight.device)
        found.d_GKK = torch.zeros_like(found.h_GKK) if len(inputs) > 1 else None
        # Limit how many parts' float32 products are in memory at once: those of a wide layer are large.
        at_once = max(1, min(8, PRODUCTS // (2 * found.h_GKK.numel())))
        for start in range(0, len(parts), at_once):
            for h, d in workers.map(products, parts[start : start + at_once]):
                found._accumulate(h, d)
        if found.d_GKK is None:
            (found.h_GKK,) = ranks.sum([found.h_GKK])
        else:
            found.h_GKK, found.d_GKK = ranks.sum([found.h_GKK, found.d_GKK])
        return found

    def add(self, seen_GRK: Tensor, given_GRK: Tensor | None = None) -> None:
        """Add rows to the moments.

        seen: the input rows in the quantized network.
        given: those in the float network, in the same order; in all calls, or in none.
        """
        self._accumulate(*_products(seen_GRK, given_GRK))

    def _accumulate(self, h_GKK: Tensor, d_GKK: Tensor | None) -> None:
        # Products in float32 are precise enough, because one batch has few rows. Sums over batches are float64.
        self.h_GKK += h_GKK
        if d_GKK is not None:
            self.d_GKK = d_GKK.double() if self.d_GKK is None else self.d_GKK.add_(d_GKK)
        self._factors.clear()

    def factor(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return the columns by increasing diag H (G, K), and the lower Cholesky factor of the damped H.

        The factor (G, K, K) has its columns in this order. It is computed in float64, and returned in float32.

        Raises TFMQError if H is not finite.
        """
        if damping not in self._factors:
            if not torch.isfinite(self.h_GKK).all():
                raise TFMQError(
                    "gptq: the layer's inputs have NaN or infinite values; check the calibration data."
                )
            diagonal = torch.diagonal(self.h_GKK, dim1=1, dim2=2)
            order = torch.argsort(diagonal, dim=1, descending=True, stable=True).flip(1)
            h = torch.stack([h[o][:, o] for h, o in zip(self.h_GKK, order, strict=True)])
            diagonal = torch.diagonal(h, dim1=1, dim2=2)
            diagonal += damping * diagonal.mean(1, keepdim=True)
            diagonal[diagonal == 0] = 1.0  # so that dead inputs affect no other column
            self._factors[damping] = order, torch.linalg.cholesky(h).float()
        return self._factors[damping]


def _products(seen_GRK: Tensor, given_GRK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    transposed = seen_GRK.transpose(1, 2)
    d_GKK = None if given_GRK is None else (transposed @ (given_GRK - seen_GRK)).transpose(1, 2)
    return transposed @ seen_GRK, d_GKK


def supported(layer: Node) -> bool:
    """Return True for linears and convolutions. Transposed convolutions scatter, so their input has no rows."""
    return op_name(layer) in ("linear", "conv1d", "conv2d", "conv3d")


def column_pieces(groups: int, columns: int, blocks: int, limit: float) -> int:
    """Return the smallest number of equal pieces of K columns whose moments and factors take at most `limit` bytes.

    blocks: the number of blocks of consecutive columns that share a scale. A piece consists of whole blocks. If
        all columns share one scale, a piece may be as small as one column.
    """
    for pieces in range(1, columns + 1):
        whole = columns % pieces == 0 and (blocks == 1 or blocks % pieces == 0)
        if whole and 40 * groups * columns**2 / pieces <= limit:  # five matrices of float64
            return pieces
    return columns if blocks == 1 else blocks


def parted(x_GRK: Tensor, pieces: int) -> Tensor:
    """Split the columns into pieces, each a separate group: (G, R, K) -> (G * pieces, R, K / pieces)."""
    groups, count, columns = x_GRK.shape
    x = x_GRK.reshape(groups, count, pieces, columns // pieces)
    return x.transpose(1, 2).reshape(groups * pieces, count, columns // pieces)


def joined(x_GRK: Tensor, pieces: int) -> Tensor:
    """Invert `parted`."""
    groups, count, columns = x_GRK.shape
    x = x_GRK.reshape(groups // pieces, pieces, count, columns)
    return x.transpose(1, 2).reshape(groups // pieces, count, pieces * columns)


def rows(layer: Node, x: Tensor, weight: Tensor, positions: int | None = None) -> Tensor:
    """Return the layer's input as rows (G, R, K), such that its output is rows @ weight.view(G, C, K)^T.

    positions: of each sample, at most this many, drawn at random, the same ones for the same shape. None: all.
    """
    if op_name(layer) == "linear":
        if x.dim() < 3:
            return x.reshape(1, -1, x.shape[-1])
        x = x.flatten(1, -2)
        kept = _drawn(x.shape[1], positions)
        return (x if kept is None else x[:, kept.to(x.device)]).reshape(1, -1, x.shape[-1])
    dims = weight.dim() - 2
    given = convolution_arguments(layer)
    stride, padding, dilation = (given[name] for name in ("stride", "padding", "dilation"))
    kernel = list(weight.shape[2:])
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in padding]
    x = F.pad(x, [side for pair in reversed(pads) for side in pair])
    for i in range(dims):
        x = x.unfold(2 + i, (kernel[i] - 1) * dilation[i] + 1, stride[i])[..., :: dilation[i]]
    groups = groups_of(layer)
    n, channels, sizes = x.shape[0], x.shape[1], x.shape[2 : 2 + dims]
    kept = _drawn(math.prod(sizes), positions)
    if kept is not None:  # before the windows are copied out
        at: list[Any] = [i.to(x.device) for i in torch.unravel_index(kept, sizes)]
        x = x[(slice(None), slice(None), *at)]
    x = x.reshape(n, groups, channels // groups, -1, math.prod(kernel))
    return x.permute(1, 0, 3, 2, 4).reshape(groups, -1, channels // groups * math.prod(kernel))


def _drawn(count: int, wanted: int | None) -> Tensor | None:
    """Return `wanted` of `count` positions in order, the same ones each time, or None for all."""
    if wanted is None or wanted >= count:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].sort().values


def corrected(w_GCK: Tensor, moments: Moments, *, damping: float) -> Tensor:
    """Return the weights that best reproduce the float outputs from the quantized inputs, (G, C, K) in float32.

    argmin over V of ||W X - V Xq||^2 + damping ||W - V||^2 = W + W D H^-1, with H damped (GPTAQ, Li et al. 2025,
    asymmetric calibration, in closed form). Where Xq is X with noise, V is smaller than W (regression dilution): inputs should
    have the errors of weights only.
    """
    assert moments.d_GKK is not None
    order, lower = moments.factor(damping)
    w = w_GCK.float()
    change_GKC = torch.cholesky_solve(_ordered((w @ moments.d_GKK.float()).mT, order), lower)
    return w + _ordered(change_GKC, order.argsort(1)).mT


def gptq(
    w_GCK: Tensor,
    moments: Moments,
    scale_GCB: Tensor,
    zero_point_GCB: Tensor,
    numbers: NumberRange,
    *,
    damping: float = 0.01,
) -> Tensor:
    """Return integers (G, C, K) that preserve W Xq (GPTQ, Frantar et al. 2023, algorithm 1, by decreasing diag H).

    With H = L L^T and the last column first, GPTQ is Babai's nearest plane (Chen et al. 2025, arXiv 2507.18553): column k
    rounds w_k + sum over i > k of e_i L_ik / L_kk, where e_i is what rounding column i left. So H is factored once, and
    not inverted. The weights of dead inputs, which are always zero, are rounded to nearest.

    scale_GCB, zero_point_GCB: for B groups of K / B consecutive columns each. The order in which columns are rounded
        does not change their group.
    damping: added to the diagonal of H, as a share of its mean.

    Raises TFMQError if H is not finite.
    """
    order, lower = moments.factor(damping)
    w_GKC = _ordered(w_GCK.float().mT, order)
    block_GK = order // (w_GKC.shape[1] // scale_GCB.shape[2])
    scale_GKC, zero_point_GKC = (_ordered(x.float().mT, block_GK) for x in (scale_GCB, zero_point_GCB))
    columns = _Columns(w_GKC, lower, scale_GKC, zero_point_GKC, numbers)
    columns.choose(0, w_GKC.shape[1])
    # As files hold them: products of weights that lie in memory otherwise round otherwise.
    return _ordered(columns.q_GKC, order.argsort(1)).mT.contiguous()


class _Columns:
    """The columns of weights that `gptq` rounds, from the last to the first.

    A class, not a function in `gptq` that calls itself: its references to itself would keep all these matrices until Python's
    garbage collector comes.
    """

    def __init__(
        self, w_GKC: Tensor, lower: Tensor, scale_GKC: Tensor, zero_point_GKC: Tensor, numbers: NumberRange
    ) -> None:
        self.w_GKC, self.lower, self.scale_GKC, self.zero_point_GKC = w_GKC, lower, scale_GKC, zero_point_GKC
        self.numbers = numbers
        self.carried, self.error = torch.zeros_like(w_GKC), torch.empty_like(w_GKC)
        self.q_GKC = torch.empty_like(w_GKC)

    def choose(self, start: int, end: int) -> None:
        """Round columns start .. end - 1, and carry their errors to those before."""
        carried, error, lower = self.carried, self.error, self.lower
        if end - start > COLUMNS:
            middle = (start + end) // 2
            self.choose(middle, end)
            carried[:, start:middle].baddbmm_(lower[:, middle:end, start:middle].mT, error[:, middle:end])
            self.choose(start, middle)
            return
        w_GKC, q_GKC, numbers = self.w_GKC, self.q_GKC, self.numbers
        for k in reversed(range(start, end)):
            scale, zero_point = self.scale_GKC[:, k], self.zero_point_GKC[:, k]
            rounded = (
                numbers.round_((w_GKC[:, k] + carried[:, k] / lower[:, k, k, None]) / scale) + zero_point
            )
            q_GKC[:, k] = rounded.clamp_(numbers.quant_min, numbers.quant_max)
            error[:, k] = w_GKC[:, k] - (q_GKC[:, k] - zero_point) * scale
            carried[:, start:k] += lower[:, k, start:k, None] * error[:, k, None]


def _ordered(x_GKC: Tensor, order_GK: Tensor) -> Tensor:
    """Return each group's columns in an order of its own."""
    return torch.stack([x[o] for x, o in zip(x_GKC, order_GK, strict=True)])
