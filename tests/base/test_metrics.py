import math

import pytest
import torch

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.metrics import (
    cosine_distance,
    frechet_distance,
    psnr,
    psnr_by_image,
    relative_mse_by_timestep,
)


def test_psnr_in_closed_form():
    x = torch.zeros(2, 1, 4, 4)
    y = x.clone()
    y[0] += 0.2
    assert psnr_by_image(y, x)[0] == pytest.approx(20.0)  # 10 log10(2^2 / 0.2^2)
    assert psnr_by_image(y, x)[1] == math.inf
    assert psnr(y, x) == pytest.approx(20.0 + 10 * math.log10(2))
    assert psnr(x, x) == math.inf


@pytest.mark.parametrize("measure", [psnr, psnr_by_image])
def test_images_of_two_sizes_are_refused(measure):
    with pytest.raises(
        TFMQError, match=r"images: have shape \(2, 1, 4, 4\), and the reference \(1, 1, 4, 4\)"
    ):
        measure(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))


def test_cosine_distance_ignores_scale_and_sees_angles():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    distance = cosine_distance([a], [b])
    assert distance.shape == (1, 2)
    assert distance[0].tolist() == pytest.approx([0.0, 1 - math.cos(math.pi / 4)])


def test_relative_mse_is_grouped_by_timestep():
    reference = torch.tensor([[2.0], [4.0], [1.0]])
    output = torch.tensor([[1.0], [4.0], [1.5]])
    assert relative_mse_by_timestep(output, reference, torch.tensor([7, 7, 9])) == pytest.approx(
        {7: 0.05, 9: 0.25}
    )


def test_relative_mse_of_videos_is_that_of_all_frames_of_a_sample():
    reference, t = torch.ones(4, 2), torch.tensor([7, 9])  # two frames of each
    output = reference + torch.tensor([0.1, 0.3, 0.0, 0.0])[:, None]
    found = relative_mse_by_timestep(output, reference, t)
    assert found == pytest.approx({7: 0.05, 9: 0.0}, abs=1e-7)


def test_frechet_distance_is_the_closed_form_where_there_is_one():
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    shift, stretch = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    assert abs(frechet_distance(x, x)) < 1e-9
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    # Covariances that commute: the distance of their roots.
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    expected = float((stretch - 1).square().sum())
    assert frechet_distance(white, white * stretch) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_is_that_of_scipy():
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 6, generator=g) @ torch.randn(6, 6, generator=g) + i for i in (0, 1))
    cov_a, cov_b = torch.cov(a.double().T).numpy(), torch.cov(b.double().T).numpy()
    expected = (
        float((a.mean(0) - b.mean(0)).square().sum())
        + (cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real).trace()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
