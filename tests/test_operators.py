"""Operators against dense matrices, direct sums and known transforms.

Statistical tests have a fixed seed and a false-alarm rate of 1e-4 each.
"""

import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve

from scoreinv.noise import GaussianNoise
from scoreinv.operators import (
    NUFFT,
    DenseOperator,
    Identity,
    Mask,
    PSFConvolution,
    gaussian_psf,
)
from scoreinv.operators.information import POWERS
from tests.analytic import (
    ARCSEC,
    PIXEL,
    baselines,
    dense,
    gaussian,
    normal,
    p_value,
    power_law,
    rng,
    uniform,
    visibilities,
)

# torch's own forward-mode derivatives warn when they are first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

FALSE_ALARMS = 1e-4


def psf(*shape):
    """An asymmetric kernel, so that a flip or a shift shows."""
    return 0.1 + uniform(*shape)


ODD, EVEN = NUFFT(baselines(20), (1, 7, 9), PIXEL), NUFFT(baselines(20), (1, 8, 6), PIXEL)
OPERATORS = {
    "identity": Identity((2, 5, 6)),
    "mask": Mask(uniform(2, 5, 6) > 0.3),
    "dense": DenseOperator(normal(9, 30), (1, 5, 6)),
    "dense-complex": DenseOperator(normal(9, 30, dtype=torch.complex128), (1, 5, 6)),
    "psf-odd": PSFConvolution(psf(5, 3), (1, 7, 8)),
    "psf-even": PSFConvolution(psf(4, 6), (1, 7, 8)),
    "psf-cutout": PSFConvolution(psf(7, 6), (1, 8, 9), data_shape=(4, 5)),
    "psf-circular": PSFConvolution(psf(5, 4), (1, 7, 8), boundary="circular"),
    "psf-circular-cutout": PSFConvolution(psf(5, 4), (1, 7, 8), (4, 4), boundary="circular"),
    "psf-channels": PSFConvolution(psf(2, 4, 5), (2, 7, 8)),
    "psf-all-channels": PSFConvolution(psf(4, 5), (2, 7, 8)),
    "nufft-odd": ODD,
    "nufft-even": EVEN,
    "mask@psf": Mask(uniform(1, 7, 8) > 0.3) @ PSFConvolution(psf(5, 3), (1, 7, 8)),
    "mask@psf-cutout": Mask(uniform(1, 4, 5) > 0.3) @ PSFConvolution(psf(3, 3), (1, 8, 9), (4, 5)),
    "psf@mask": PSFConvolution(psf(3, 3), (1, 5, 6)) @ Mask(uniform(1, 5, 6) > 0.3),
    "nufft@psf": EVEN @ PSFConvolution(psf(3, 4), (1, 8, 6)),
    "mask@dense": Mask(uniform(9) > 0.3) @ DenseOperator(normal(9, 30), (1, 5, 6)),
}
each = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)


def data_like(A, n, seed=1):
    kind = torch.complex128 if A.complex else torch.float64
    return normal(n, *A.data_shape, seed=seed, dtype=kind)


def inner(a, b):
    """Re sum conj(a) b of each pair."""
    return (a.conj() * b).real.flatten(1).sum(1)


@each
def test_adjoint(A):
    x, y = normal(3, *A.shape), data_like(A, 3)
    scale = float(A(x).abs().max()) * math.prod(A.data_shape)
    torch.testing.assert_close(
        inner(A(x), y), inner(x, A.adjoint(y)), rtol=0.0, atol=1e-10 * scale
    )


@each
def test_forward_is_its_matrix(A):
    x = normal(3, *A.shape)
    y = A(x)
    assert y.shape == (3, *A.data_shape) and y.is_complex() == A.complex
    y = torch.view_as_real(y) if A.complex else y
    torch.testing.assert_close(y.reshape(3, -1), x.flatten(1) @ A.matrix().T)


@each
def test_adjoint_is_the_transposed_matrix(A):
    y = data_like(A, 3)
    x = A.adjoint(y).flatten(1)
    y = torch.view_as_real(y) if A.complex else y
    torch.testing.assert_close(x, y.reshape(3, -1) @ A.matrix())


@each
def test_gradients(A):
    x, y = normal(2, *A.shape).requires_grad_(), data_like(A, 2).requires_grad_()
    assert torch.autograd.gradcheck(A, (x,), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(A.adjoint, (y,), fast_mode=True)


@each
def test_single_precision(A):
    x = normal(3, *A.shape)
    y, exact = A(x.float()), A(x)
    torch.testing.assert_close(
        y.to(exact.dtype), exact, rtol=0.0, atol=1e-5 * float(exact.abs().max())
    )


@pytest.mark.parametrize("name", ["mask@psf", "psf@mask", "nufft@psf", "mask@dense"])
def test_composition_multiplies_matrices(name):
    A = OPERATORS[name]
    torch.testing.assert_close(A.matrix(), A.outer.matrix() @ A.inner.matrix())


def test_mask_zeroes():
    mask = uniform(2, 5, 6) > 0.3
    x = normal(3, 2, 5, 6)
    assert torch.equal(Mask(mask)(x)[:, mask], x[:, mask])
    assert not Mask(mask)(x)[:, ~mask].any()


def test_dense_operator_of_integers_keeps_fractions():
    A = DenseOperator(torch.tensor([[1, 0], [1, 1]]), (1, 1, 2))
    assert A(torch.tensor([[[[0.5, 0.25]]]])).tolist() == [[0.5, 0.75]]


# Convolution


@pytest.mark.parametrize("boundary", ["zero", "circular"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 6), (5, 4), (7, 8)])
def test_delta_kernel_is_the_identity(size, boundary):
    delta = torch.zeros(size, dtype=torch.float64)
    delta[size[0] // 2, size[1] // 2] = 1
    x = normal(2, 1, 7, 8)
    torch.testing.assert_close(PSFConvolution(delta, (1, 7, 8), boundary=boundary)(x), x)


@pytest.mark.parametrize("size", [(3, 5), (4, 6), (7, 8)])
@pytest.mark.parametrize("field", [(7, 8), (4, 5), (3, 3)])
def test_convolution_by_scipy(size, field):
    # all pixels, edges included: beyond the canvas the sky is dark
    x, h = normal(1, 7, 8), psf(*size)
    full = fftconvolve(x[0].numpy(), h.numpy())
    low = [k // 2 + (n - f) // 2 for k, n, f in zip(size, (7, 8), field, strict=True)]
    expected = full[low[0] : low[0] + field[0], low[1] : low[1] + field[1]]
    np.testing.assert_allclose(
        PSFConvolution(h, (1, 7, 8), field)(x[None])[0, 0], expected, atol=1e-12
    )


def test_circular_convolution_by_rolls():
    x, h = normal(2, 1, 7, 8), psf(4, 5)
    expected = sum(h[i, j] * x.roll((i - 2, j - 2), (-2, -1)) for i in range(4) for j in range(5))
    A = PSFConvolution(h, (1, 7, 8), boundary="circular")
    torch.testing.assert_close(A(x), expected)


def test_channels_have_their_own_kernels():
    x, h = normal(3, 2, 7, 8), psf(2, 4, 5)
    together = PSFConvolution(h, (2, 7, 8))(x)
    for c in range(2):
        torch.testing.assert_close(
            together[:, c : c + 1], PSFConvolution(h[c], (1, 7, 8))(x[:, c : c + 1])
        )


def test_light_from_outside_the_cutout_enters_it():
    # a kernel larger than the data; the canvas holds a source that the data do not
    A = PSFConvolution(psf(7, 7), (1, 9, 9), data_shape=(3, 3))
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 1, 1] = 1.0
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:2, :2] = psf(7, 7)[5:, 5:]
    torch.testing.assert_close(A(x)[0, 0], expected)


def test_normalised_kernels_keep_the_flux():
    A = PSFConvolution(5 * psf(2, 3, 4), (2, 9, 9), normalise=True)
    x = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    x[..., 4, 4] = 3.0
    torch.testing.assert_close(A(x).sum((-2, -1)), torch.full((1, 2), 3.0, dtype=torch.float64))


# Visibilities


@pytest.mark.parametrize("A", [ODD, EVEN], ids=["odd", "even"])
def test_visibilities_by_direct_sum(A):
    x = normal(3, *A.shape)
    torch.testing.assert_close(A(x), visibilities(x, A.uv, PIXEL), rtol=0.0, atol=1e-10)


def test_visibilities_in_single_precision():
    uv, x = baselines(500), normal(2, 1, 32, 32)
    y = NUFFT(uv, (1, 32, 32), PIXEL)(x.float())
    assert y.dtype == torch.complex64
    exact = visibilities(x, uv, PIXEL)
    assert float((y - exact).abs().max() / exact.abs().max()) < 1e-5


def test_gaussian_source():
    # F exp(-2 pi^2 s^2 |q|^2 - 2 pi i (u l + v m)) for a source of width s, East and North of
    # the centre; sampled and truncated finely enough for 1e-8
    H = W = 64
    s, flux, east, north = 3 * PIXEL, 2.5, 4.0 * PIXEL, -7.0 * PIXEL
    l = -(torch.arange(W, dtype=torch.float64) - W // 2) * PIXEL
    m = (torch.arange(H, dtype=torch.float64) - H // 2) * PIXEL
    r2 = (l - east) ** 2 + (m[:, None] - north) ** 2
    x = flux * PIXEL**2 / (2 * math.pi * s**2) * torch.exp(-r2 / (2 * s**2))
    uv = 0.4 * baselines(200)
    u, v = ARCSEC * uv.T
    phase = -2 * math.pi * (u * east + v * north)
    expected = torch.polar(flux * torch.exp(-2 * math.pi**2 * s**2 * (u**2 + v**2)), phase)
    actual = NUFFT(uv, (1, H, W), PIXEL)(x[None, None])[0]
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("H, W", [(8, 6), (7, 9)])
def test_point_source(H, W):
    # two rows North and three columns East of the centre, the column index falling towards East
    x = torch.zeros(1, 1, H, W, dtype=torch.float64)
    x[0, 0, H // 2 + 2, W // 2 - 3] = 1.5
    uv = baselines(20)
    phase = -2 * math.pi * PIXEL * ARCSEC * (3 * uv[:, 0] + 2 * uv[:, 1])
    expected = torch.polar(torch.full_like(phase, 1.5), phase)
    actual = NUFFT(uv, (1, H, W), PIXEL)(x)[0]
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-10)


def chi2(A, y):
    """0.5 |y - A x|^2 of one image with shape (1, H, W)."""
    return lambda x: 0.5 * (y - A(x[None])[0]).abs().square().sum()


@pytest.mark.parametrize("A", [ODD, EVEN], ids=["odd", "even"])
def test_function_transforms(A):
    x, v, y = normal(4, *A.shape), normal(4, *A.shape, seed=2), data_like(A, 1)[0]
    M = dense(lambda x: visibilities(x, A.uv, PIXEL), A.shape)
    rows = lambda z: torch.view_as_complex((z.flatten(1) @ M.T).reshape(len(z), -1, 2))
    back = lambda r: (torch.view_as_real(r).flatten(1) @ M).reshape(-1, *A.shape)
    gradients = back(rows(x) - y)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9)
    close(torch.func.grad(chi2(A, y))(x[0]), gradients[0])
    close(torch.func.vmap(torch.func.grad(chi2(A, y)))(x), gradients)
    close(torch.func.vmap(lambda x: A(x[None])[0])(x), rows(x))
    close(torch.func.vmap(lambda x: A(x[None])[0], in_dims=1)(x.movedim(0, 1)), rows(x))
    close(torch.func.jvp(A, (x,), (v,))[1], rows(v))
    along = torch.func.jvp(torch.func.grad(chi2(A, y)), (x[0],), (v[0],))[1]
    close(along, back(rows(v[:1]))[0])
    close(torch.func.vmap(lambda r: A.adjoint(r[None])[0])(rows(x)), back(rows(x)))


def test_gradient_through_conjugated_visibilities():
    # autograd hands conjugated tensors back lazily; their memory must not be read as it is
    x = normal(1, *EVEN.shape).requires_grad_()
    y = data_like(EVEN, 1)
    (EVEN(x).conj() * y).imag.sum().backward()
    torch.testing.assert_close(x.grad, EVEN.adjoint(-1j * y).detach())


# H = A^T S^-1 A


def noises(A):
    """Noises that fit the data of A."""
    variance = 0.5 + uniform(*A.data_shape, seed=3)
    variance.view(-1)[0] = math.inf
    found = {"white": GaussianNoise(std=0.7), "each": GaussianNoise(variance=variance)}
    if not A.complex and len(A.data_shape) == 3:
        found["spectrum"] = GaussianNoise(spectrum=power_law(*A.data_shape[-2:]))
    if not A.complex:
        m = math.prod(A.data_shape)
        found["matrix"] = GaussianNoise(covariance=torch.eye(m) + 0.1 * torch.ones(m, m))
    return found


PAIRS = {f"{n} {k}": (A, S) for n, A in OPERATORS.items() for k, S in noises(A).items()}
pairs = pytest.mark.parametrize("A, noise", PAIRS.values(), ids=PAIRS)


def information_matrix(A, noise):
    """A^T S^-1 A by matrices; for visibilities by direct sums."""
    M = dense(A, A.shape)
    return M.T @ dense(lambda x: noise.weigh(A.forward(x)), A.shape)


@pairs
def test_information_is_dense(A, noise):
    H = information_matrix(A, noise)
    actual = dense(A.information(noise, torch.float64).apply, A.shape)
    torch.testing.assert_close(actual, H, rtol=0.0, atol=1e-10 * float(H.abs().max()))


@pairs
def test_exact_information(A, noise):
    exact = A.information(noise, torch.float64).exact
    if exact is not None:
        torch.testing.assert_close(dense(exact.apply, A.shape), information_matrix(A, noise))


@pairs
def test_what_data_know_best(A, noise):
    """Powers of H never pass its largest eigenvalue; short of it by the average (Kuczynski & Wozniakowski 1992) at most."""
    found = A.information(noise, torch.float64).largest()
    exact = float(torch.linalg.eigvalsh(information_matrix(A, noise))[-1])
    short = 0.871 * math.log(math.prod(A.shape)) / (POWERS - 1)
    assert (1 - short) * exact <= found <= exact * (1 + 1e-9)


def test_data_that_know_nothing():
    blind = DenseOperator(torch.zeros(1, 4, dtype=torch.float64), (1, 2, 2))
    assert blind.information(GaussianNoise(std=1.0), torch.float64).largest() == 0


def test_where_the_information_is_exact():
    kinds = {name: type(A.information(S, torch.float64).exact) for name, (A, S) in PAIRS.items()}
    found = {name: kind.__name__ for name, kind in kinds.items() if kind is not type(None)}
    assert found == {
        "identity white": "Scalar",
        "identity each": "Diagonal",
        "identity spectrum": "Fourier",
        "mask white": "Diagonal",
        "mask each": "Diagonal",
        "psf-circular white": "Fourier",
        "psf-circular spectrum": "Fourier",
    }


@pairs
def test_draws_of_the_information(A, noise):
    # A^T S^-1/2 z, from two generators in turn
    draws = A.information(noise, torch.float64).draw(6000, rng(1)).flatten(1)
    H = information_matrix(A, noise)
    zero = torch.zeros(len(H), dtype=torch.float64)
    assert p_value(draws, gaussian(zero, H)) > FALSE_ALARMS
    # negative control: 10 % too wide in variance
    assert p_value(draws, gaussian(zero, H / 1.1)) < 1e-6


def test_draws_of_many_visibilities_do_not_go_through_them(monkeypatch):
    """By the factor of H they have its covariance, but for a millionth of the variance."""
    uv = EVEN.uv.repeat(1 + 400 // len(EVEN.uv), 1)
    A, noise = NUFFT(uv, (1, 8, 10), EVEN.pixel_scale), GaussianNoise(std=2.0)
    information, H = A.information(noise, torch.float64), information_matrix(A, noise)
    monkeypatch.setattr(NUFFT, "_image", None)
    draws = information.draw(6000, rng(1)).flatten(1)
    H = H + 1e-6 * H.diagonal().mean() * torch.eye(len(H))
    zero = torch.zeros(len(H), dtype=torch.float64)
    assert p_value(draws, gaussian(zero, H)) > FALSE_ALARMS
    assert p_value(draws, gaussian(zero, H / 1.1)) < 1e-6


@pytest.mark.parametrize("A", [ODD, EVEN], ids=["odd", "even"])
def test_toeplitz_by_direct_sum(A):
    weight = 0.5 + uniform(*A.data_shape)
    M = dense(lambda x: visibilities(x, A.uv, PIXEL), A.shape)
    H = M.T @ (weight.repeat_interleave(2)[:, None] * M)
    noise = GaussianNoise(variance=1 / weight)
    double = dense(A.information(noise, torch.float64).apply, A.shape)
    torch.testing.assert_close(double, H, rtol=0.0, atol=1e-10)
    apply = A.information(noise, torch.float32).apply
    single = dense(lambda x: apply(x.float()).double(), A.shape)
    assert float((single - H).abs().max() / H.abs().max()) < 5e-6


def test_single_precision_information_is_exact_in_double():
    # the evidence is summed in double precision whatever the particles are
    noise = GaussianNoise(std=0.1)
    x = normal(2, *EVEN.shape)
    single, double = (EVEN.information(noise, t).apply(x) for t in (torch.float32, torch.float64))
    torch.testing.assert_close(single, double, rtol=1e-12, atol=0.0)


def trace_per_pixel(uv, weight):
    A = NUFFT(uv, (1, 8, 6), PIXEL)
    H = dense(A.information(GaussianNoise(variance=1 / weight), torch.float64).apply, A.shape)
    return float(H.trace()) / 48


def test_each_visibility_counts_once():
    # A pixel is seen by every visibility with modulus one: trace(H) / d = sum of the weights
    uv, weight = baselines(30), 0.5 + uniform(30)
    assert trace_per_pixel(uv, weight) == pytest.approx(float(weight.sum()), rel=1e-10)
    # negative control: V(-u, -v) = conj V(u, v) is the same datum, counted twice if appended
    both, twice = torch.cat([uv, -uv]), torch.cat([weight, weight])
    assert trace_per_pixel(both, twice) == pytest.approx(2 * float(weight.sum()), rel=1e-10)


@pytest.mark.parametrize("A", [ODD, EVEN], ids=["odd", "even"])
def test_nearest_circulant(A):
    # the circulant nearest to H in the Frobenius norm has the diagonal of F H F* as spectrum
    noise = GaussianNoise(variance=0.5 + uniform(*A.data_shape))
    information = A.information(noise, torch.float64)
    H, (h, w) = information_matrix(A, noise), A.shape[-2:]
    rows = torch.fft.fft2(H.reshape(-1, h, w), norm="ortho").reshape(h, w, -1).movedim(2, 0)
    diagonal = torch.fft.ifft2(rows.movedim(0, 2).reshape(h, w, h, w), dim=(0, 1), norm="ortho")
    diagonal = torch.einsum("ijij->ij", diagonal).real
    torch.testing.assert_close(information.nearby.spectrum, diagonal)


# Messages


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: NUFFT(baselines(50).T, (1, 8, 8), PIXEL),
            r"\(2, 50\), expected \(N, 2\); transpose it\?",
        ),
        (
            lambda: NUFFT(torch.zeros(5), (1, 8, 8), PIXEL),
            r"uv has shape \(5,\), expected \(N, 2\)$",
        ),
        (
            lambda: NUFFT(torch.zeros(0, 2), (1, 8, 8), PIXEL),
            "no rows: every visibility was flagged",
        ),
        (
            lambda: NUFFT(
                torch.tensor([[0.0, math.nan], [1.0, 2.0], [math.inf, 0.0]]), (1, 8, 8), PIXEL
            ),
            "uv has 2 rows that are not finite",
        ),
        (
            lambda: NUFFT(baselines(5), (8, 8), PIXEL),
            r"\(8, 8\), expected \(1, H, W\): one channel",
        ),
        (lambda: NUFFT(baselines(5), (3, 8, 8), PIXEL), r"\(3, 8, 8\), expected \(1, H, W\)"),
        (
            lambda: NUFFT(baselines(5), (1, 8, 8), -PIXEL),
            "pixel_scale is -0.1, expected a positive",
        ),
        (
            lambda: NUFFT(torch.tensor([[0.0, 1e6]]), (1, 8, 8), 0.2),
            r"0.2 arcsec is too coarse for .* 1e\+06 lambda: expected at most 0.1031 arcsec",
        ),
        (
            lambda: PSFConvolution(psf(9, 5), (1, 8, 8)),
            r"\(9, 5\) pixels, larger than the model canvas \(8, 8\)",
        ),
        (
            lambda: PSFConvolution(psf(3, 3) - 2, (1, 8, 8)),
            "psf sums to -.*, expected a positive sum",
        ),
        (
            lambda: PSFConvolution(torch.stack([psf(3, 3), -psf(3, 3) / 9]), (2, 8, 8)),
            "psf sums to -.*, expected a positive sum",
        ),
        (lambda: PSFConvolution(psf(2, 3, 3), (3, 8, 8)), r"\(2, 3, 3\), expected .* with C = 3"),
        (lambda: PSFConvolution(psf(3), (1, 8, 8)), r"expected \(h, w\) or \(C, h, w\)"),
        (lambda: PSFConvolution(psf(3, 3) / 0, (1, 8, 8)), "psf has 9 values that are not finite"),
        (
            lambda: PSFConvolution(psf(3, 3), (8, 8)),
            r"canvas has shape \(8, 8\), expected \(C, H, W\)",
        ),
        (
            lambda: PSFConvolution(psf(3, 3), (1, 8, 8), (9, 4)),
            r"data are \(9, 4\) pixels, larger than",
        ),
        (
            lambda: PSFConvolution(psf(3, 3), (1, 8, 8), (1, 4, 4)),
            r"data_shape is \(1, 4, 4\), expected pixels",
        ),
        (
            lambda: PSFConvolution(psf(3, 3), (1, 8, 8), (0, 4)),
            r"data are \(0, 4\) pixels, expected at least 1 on each side",
        ),
        (lambda: gaussian_psf(0.0), r"fwhm is 0 and size 19, expected .* above 0"),
        (lambda: gaussian_psf(math.nan), "fwhm is nan"),
        (
            lambda: PSFConvolution(psf(3, 3), (1, 8, 8), boundary="mirror"),
            "'mirror', expected 'zero' or 'circular'",
        ),
        (lambda: Mask(torch.ones(1, 4, 4)), r"dtype torch.float32, expected torch.bool"),
        (
            lambda: DenseOperator(normal(16, 5), (1, 4, 4)),
            r"\(16, 5\), expected \(m, 16\) .*; transpose it\?",
        ),
        (
            lambda: DenseOperator(normal(5, 7), (1, 4, 4)),
            r"\(5, 7\), expected \(m, 16\) for .* \(1, 4, 4\)$",
        ),
        (
            lambda: DenseOperator(normal(5, 16) / 0, (1, 4, 4)),
            "matrix has values that are not finite",
        ),
        (
            lambda: Identity((1, 4, 4)) @ Identity((1, 5, 5)),
            r"data of shape \(1, 5, 5\), .* shape \(1, 4, 4\)",
        ),
        (lambda: Mask(uniform(20) > 0) @ EVEN, "the inner operator makes complex data"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@each
def test_wrong_shapes_are_refused(A):
    shape = ", ".join(map(str, A.shape))
    with pytest.raises(
        ValueError, match=rf"image has shape .*, expected \(B, {shape}\) \(add the batch"
    ):
        A(normal(*A.shape))
    with pytest.raises(ValueError, match=rf"image has shape .*, expected \(B, {shape}\)$"):
        A(normal(1, *A.shape[:-1], A.shape[-1] + 1))
    with pytest.raises(ValueError, match=r"data has shape .*, expected \(B, "):
        A.adjoint(normal(1, *A.data_shape[:-1], A.data_shape[-1] + 1))
