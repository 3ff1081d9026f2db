"""How like two sets of images are, image by image: mean squared error, PSNR, SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WINDOW = 7  # pixels, where images are at least as large
_K1, _K2 = 0.01, 0.03


def squared_error(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean squared difference of each pair, (N,), of two sets (N, ...)."""
    return (images - others).square().flatten(1).mean(dim=1)


def psnr(images: Tensor, others: Tensor, data_range: float) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair, (N,), in decibels; 120 at most."""
    return 10 * torch.log10(data_range**2 / squared_error(images, others).clamp_min(1e-12 * data_range**2))


def ssim(images: Tensor, others: Tensor, data_range: float) -> Tensor:
    """Return the structural similarity of each pair, (N,), from -1 to 1.

    As scikit-image computes it unless told otherwise: means, sample variances and covariances over windows of 7 x 7
    pixels that lie within the image, all weighted alike (Wang et al. 2004, doi:10.1109/TIP.2003.819861). Smaller images
    have smaller windows, of an odd side; channels are averaged.

    Parameters
    ----------
    images, others : (N, C, H, W) float
    data_range : float
        The largest value there can be minus the least.
    """
    side = min(_WINDOW, *images.shape[-2:])
    side -= 1 - side % 2
    pixels = side * side

    def mean(values: Tensor) -> Tensor:
        means: Tensor = functional.avg_pool2d(values, side, stride=1)
        return means

    a, b = images.double(), others.double()
    mean_a, mean_b = mean(a), mean(b)
    sample = pixels / max(pixels - 1, 1)
    var_a, var_b, covariance = (
        sample * (mean(x * y) - m * n)
        for x, y, m, n in ((a, a, mean_a, mean_a), (b, b, mean_b, mean_b), (a, b, mean_a, mean_b))
    )
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    alike = alike / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    each: Tensor = alike.flatten(1).mean(dim=1)
    return each
