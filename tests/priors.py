"""Priors whose answers are known, for tests of what is built on them."""

import torch

import scoreinv as si
from scoreinv.kernels import conditional


class Knowing(si.GaussianPrior):
    """A stationary Gaussian prior that says what it knows of x_0, wrong by a factor if asked to be."""

    factor = 1.0

    def denoise_with_error(self, x, sigma):
        C = self.moments.covariance
        variance = [conditional(C, float(s)).marginal_variance(self.shape) for s in sigma.unique()]
        width = torch.tensor(variance, dtype=x.dtype).sqrt()[sigma.unique(return_inverse=True)[1]]
        a = self.factor * width.reshape(-1, 1, 1, 1) * torch.ones_like(x)
        return self.denoise(x, sigma), a[:, None]

    def correlation(self, sigma):
        C = conditional(self.moments.covariance, float(sigma))
        width = C.marginal_variance(self.shape)
        return C.map(lambda v: v / width)
