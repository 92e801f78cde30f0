"""Arrays as files leave them: bytes in either order, axes in either direction."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import scoreinv as si
from scoreinv.npe.fitting import Fitting
from scoreinv.npe.stages import read_observation
from scoreinv.tensors import as_tensor

RNG = np.random.default_rng(0)
SHAPE = (1, 8, 8)
IMAGE, PSF, UV = RNG.normal(size=SHAPE), RNG.random((3, 4)), 1e4 * RNG.normal(size=(20, 2))
MATRIX, MASK = RNG.normal(size=(5, 64)), RNG.random(SHAPE) > 0.5
THETA, X = RNG.normal(size=(60, 1)), RNG.normal(size=(60, 4))
DRAWS, TRUTHS = RNG.normal(size=(20, 30, 3)), RNG.normal(size=(20, 3))
SKY = torch.from_numpy(IMAGE)[None]


def foreign(array):
    """As on a machine of the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def reversed_twice(array):
    """The same numbers, in memory from the last to the first."""
    return np.flip(np.flip(array).copy())


def posterior_mean(arrange):
    prior = si.GaussianPrior(arrange(0.1 * IMAGE), 1.0)
    likelihood = si.Likelihood(si.Identity(SHAPE), si.GaussianNoise(std=arrange(1 + MASK[0])))
    amplitude = si.amplitude_by_evidence(prior, likelihood, arrange(IMAGE))[0]
    posterior = si.Posterior(prior.rescaled(amplitude), likelihood, arrange(IMAGE))
    return si.sample(posterior, 4, si.Guided(levels=3), seed=0, island=4).x


def likelihood_of_arrays(arrange):
    seen = si.Likelihood(si.Identity(SHAPE), si.GaussianNoise(std=2.0))
    y = seen.simulate(arrange(IMAGE[None]), seed=1)[0].numpy()
    verdicts = (f(arrange(y), arrange(IMAGE[None])) for f in (seen.log_prob, seen.chi2))
    return torch.cat([*verdicts, seen.residual(arrange(y), arrange(IMAGE[None])).flatten()])


def estimated(arrange):
    prior = si.ParameterPrior(a=Normal(0.0, 1.0))
    w = arrange(np.linspace(1, 2, 60))
    plan = Fitting(epochs=1)
    fitted = si.NPE(prior, "mixture").fit(
        arrange(THETA), {"x": arrange(X)}, 0, plan, pair_weights=w
    )
    return fitted.condition({"x": arrange(X[0])}).sample(4, seed=0)


@pytest.mark.parametrize("arrange", [foreign, reversed_twice])
@pytest.mark.parametrize(
    "door",
    [
        lambda f: si.PSFConvolution(f(PSF), SHAPE)(SKY),
        lambda f: si.NUFFT(f(UV), SHAPE, 1.0)(SKY),
        lambda f: si.DenseOperator(f(MATRIX), SHAPE)(SKY),
        lambda f: si.Mask(f(MASK))(SKY),
        lambda f: si.Visibilities(f(UV), f(UV[:, 0] + 1j), f(UV[:, 1] ** 2)).shifted(1, 2).data,
        lambda f: si.diagnostics.coverage(f(DRAWS), f(TRUTHS), 0, swaps=99).ranks,
        likelihood_of_arrays,
        posterior_mean,
        estimated,
    ],
    ids=[
        "psf",
        "uv",
        "matrix",
        "mask",
        "visibilities",
        "coverage",
        "likelihood",
        "posterior",
        "npe",
    ],
)
def test_the_order_of_bytes_and_axes_changes_nothing(door, arrange):
    assert torch.equal(door(arrange), door(np.array))


def test_an_observation_of_either_byte_order(tmp_path):
    np.save(tmp_path / "a.npy", X[0].astype(">f8"))
    np.save(tmp_path / "b.npy", X[0].astype("<f8"))
    a, b = (read_observation(tmp_path / name) for name in ("a.npy", "b.npy"))
    assert torch.equal(a, b)


def test_memory_is_shared_where_it_can_be():
    assert as_tensor(X).data_ptr() == X.ctypes.data
    with pytest.raises(ValueError, match="of type <U1, expected numbers"):
        as_tensor(np.array(["a"]))
