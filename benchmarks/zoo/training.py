"""The training loop of all models of the zoo."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def fit(
    net: Net,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    decay: float | None,
    warmup: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.99),
    fused: bool = True,
    every: int = 100,
    name: str = "",
) -> Net:
    """Minimize `loss(step)` by AdamW with a one-cycle learning rate. Return the averaged network, in eval mode.

    decay: of the running mean of the weights; None: return the network itself.
    warmup: the share of the steps in which the rate rises to `lr`.
    every: the number of steps between two lines of progress, which begin with `name`.
    """
    ema = net if decay is None else copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0, betas=betas, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=warmup)
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        found = loss(step)
        opt.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        schedule.step()
        if decay is not None:
            with torch.no_grad():
                for p_ema, p in zip(ema.parameters(), net.parameters(), strict=True):
                    p_ema.lerp_(p, 1 - min(decay, step / (step + 10)))
        running += found.item()
        if step % every == 0:
            seconds = time.monotonic() - started
            print(
                f"{name}step {step}/{steps} loss {running / every:.5f} {seconds:.0f} s, "
                f"{seconds / step * (steps - step):.0f} s to go",
                flush=True,
            )
            running = 0.0
    return ema.eval()
