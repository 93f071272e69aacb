"""Metrics of how far the quantized network is from the float one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a network's output, however nested: the one whose errors are measured."""
    leaf: Tensor = pytree.tree_leaves(output)[0]
    return leaf


def psnr(images: Tensor, reference: Tensor, *, value_range: float = 2.0) -> float:
    """Return the peak signal-to-noise ratio in dB, 10 log10(range^2 / MSE) over all elements; inf if equal.

    value_range: the largest possible difference of two values, 2 for images in [-1, 1].
    """
    mse = _squared_error(images, reference).mean().item()
    return math.inf if mse == 0 else 10 * math.log10(value_range**2 / mse)


def _squared_error(images: Tensor, reference: Tensor) -> Tensor:
    """Return the squared error of each element, in double precision. Raises TFMQError for other shapes than the reference's."""
    if images.shape != reference.shape:
        raise TFMQError(
            f"images: have shape {tuple(images.shape)}, and the reference {tuple(reference.shape)}; give pairs of images of one size."
        )
    return (images.double() - reference.double()).square()


def cosine_distance(features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos between temporal features, (features, T): TFMQ-DM's measure of temporal disturbance."""
    rows = [[x.double().reshape(len(x), -1) for x in values] for values in (features, reference)]
    return torch.stack([1 - torch.cosine_similarity(a, b, dim=1) for a, b in zip(*rows, strict=True)])


def relative_mse_by_timestep(output: Tensor, reference: Tensor, timestep: Tensor) -> dict[float, float]:
    """Return MSE / mean square of the reference, over the samples of each timestep (N,).

    output, reference: (N, ...), or (N * k, ...) with k rows of each sample, such as the frames of a video.
    """
    reference, rows = reference.float(), len(timestep)
    error = (output.float() - reference).square().reshape(rows, -1).mean(1)
    power = reference.square().reshape(rows, -1).mean(1)
    return {
        t: (error[timestep == t].mean() / power[timestep == t].mean()).item()
        for t in timestep.unique().tolist()
    }


def psnr_by_image(images: Tensor, reference: Tensor, *, value_range: float = 2.0) -> Tensor:
    """Return the PSNR in dB of each image (N,).

    One value per image keeps a few images whose trajectories diverge from hiding the others. value_range: see
    `psnr`.
    """
    mse = _squared_error(images, reference).flatten(1).mean(1)
    return 10 * torch.log10(value_range**2 / mse)


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians of two sets of features.

    (Heusel et al. 2017, eq. 6; covariances over n - 1.) Rows are samples. The distance is meaningful only
    with more rows than features.
    """
    a, b = a_ND.double(), b_ND.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C_a C_b has the eigenvalues of this symmetric matrix.
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    return float(difference + cov_a.trace() + cov_b.trace() - 2 * shared)


def ssim_by_image(images: Tensor, reference: Tensor, *, value_range: float = 2.0) -> Tensor:
    """Return the structural similarity of each image (N,), at most 1.

    (Wang et al. 2004; torchmetrics' Gaussian window, sigma 1.5.) value_range: see `psnr`. Raises TFMQError
    when torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise TFMQError(f'SSIM needs torchmetrics ({error}); pip install "tfmq_fx[eval]".') from error
    found = structural_similarity_index_measure(
        images.float(), reference.float(), data_range=value_range, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found


def inception_score(probabilities_NK: Tensor) -> float:
    """Return exp(E_x KL(p(y|x) || p(y))), between 1 and K (Salimans et al. 2016, section 4; one split)."""
    p = probabilities_NK.double()
    marginal = p.mean(0, keepdim=True)
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)
    return float(divergence.sum(1).mean().exp())


def precision_recall(a_ND: Tensor, b_ND: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Return the share of `a` in the manifold of the reference `b`, and the share of `b` in that of `a`.

    A set's manifold is the union of balls around its rows, each reaching to its k-th nearest other row
    (Kynkäänniemi et al. 2019, eq. 1-2). neighbours: k. Raises TFMQError when a set has at most k rows.
    """
    for name, x in (("a", a_ND), ("b", b_ND)):
        if len(x) <= neighbours:
            raise TFMQError(f"precision_recall: {name} has {len(x)} rows; more than {neighbours} are needed.")
    a, b = a_ND.double(), b_ND.double()
    between = torch.cdist(a, b)

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values  # + 1: the nearest is the row itself

    precision = (between <= radii(b)).any(1).double().mean()
    recall = (radii(a) >= between.T).any(1).double().mean()
    return float(precision), float(recall)
