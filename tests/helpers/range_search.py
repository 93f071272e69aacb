"""Search ranges one candidate at a time, as a reference for `search_range`."""

import torch

from tfmq_fx.base.arithmetic import choose_qparams


def simple_search(x_RK, integers, p=2.4, steps=80, smallest=0.2):
    """Return ranges as `search_range` does, but one candidate at a time, like the reference implementation."""
    min_R, max_R = x_RK.amin(1), x_RK.amax(1)
    best_error_R = torch.full_like(min_R, torch.inf)
    best_min_R, best_max_R = min_R.clone(), max_R.clone()
    for i in range(steps):
        shrink = 1.0 - (1.0 - smallest) * i / steps
        scale_R, zero_point_R = choose_qparams(min_R * shrink, max_R * shrink, integers)
        q_RK = torch.round(x_RK / scale_R[:, None]) + zero_point_R[:, None]
        q_RK.clamp_(integers.quant_min, integers.quant_max)
        error_R = ((q_RK - zero_point_R[:, None]) * scale_R[:, None] - x_RK).abs_().pow_(p).sum(1)
        better_R = error_R < best_error_R
        best_error_R = torch.where(better_R, error_R, best_error_R)
        best_min_R = torch.where(better_R, min_R * shrink, best_min_R)
        best_max_R = torch.where(better_R, max_R * shrink, best_max_R)
    return best_min_R, best_max_R
