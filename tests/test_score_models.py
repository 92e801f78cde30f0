"""Foreign checkpoints: the files that score_models writes, and the scores that it computes."""

import json
import math
import shutil
import warnings

import pytest
import score_models  # noqa: E402
import torch
from score_models.sde import TSVESDE, VESDE, VPSDE  # noqa: E402

from scoreinv import (
    SMC,
    GaussianNoise,
    GaussianPrior,
    Likelihood,
    MixturePrior,
    Posterior,
    PSFConvolution,
    sample,
)
from scoreinv.gaussian import Gaussian, Scalar
from scoreinv.priors.score_models import (
    ScoreModelsPrior,
    VarianceExploding,
    VariancePreserving,
    load_score_models,
)

SDES = {
    "ve": dict(sde="ve", sigma_min=0.01, sigma_max=50.0),
    "vp": dict(sde="vp", beta_min=0.1, beta_max=20.0),
    "tsve": dict(sde="tsve", sigma_min=0.01, sigma_max=50.0, t_star=0.4, beta=5.0),
}
NETWORK = dict(nf=8, ch_mult=(1, 1), num_res_blocks=1, attention=False)


def train(folder, sde, seed=0, epochs=1, **network):
    """Let score_models train and save, as its users do; init_scale makes the output visible."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # score_models calls float(loss) on a loss with a gradient, which torch warns about.
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
        torch.manual_seed(seed)
        net = score_models.NCSNpp(**{**NETWORK, "init_scale": 1.0, **network})
        model = score_models.ScoreModel(net, device="cpu", **sde)
        model.fit(
            torch.randn(4, net.channels, 16, 16),
            epochs=epochs,
            checkpoints=1,
            models_to_keep=epochs,
            batch_size=4,
            learning_rate=1e-2,
            ema_decay=0.5,
            checkpoints_directory=str(folder),
        )
    return folder


@pytest.fixture(scope="module", params=SDES)
def folder(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("priors") / request.param, SDES[request.param])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A VE folder with three checkpoints; tests that change it copy it first."""
    return train(tmp_path_factory.mktemp("priors") / "saved", SDES["ve"], epochs=3)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def latest(folder):
    return max(folder.glob("checkpoint_*.pt"), key=lambda file: file.stem[-3:])


def edit(folder, **changes):
    """Change keys of model_hparams.json; None removes one."""
    file = folder / "model_hparams.json"
    hparams = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in hparams.items() if v is not None}))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_same_score_as_score_models(folder):
    """score of x_sigma = mu(t) times score_models' score of z = mu(t) x_sigma, at every time."""
    theirs = score_models.ScoreModel(checkpoints_directory=str(folder), device="cpu")
    ours = load_score_models(folder)
    # Below t = 0.1 score_models rounds 1 - mu^2 of the VP, in float32, by more than the tolerance.
    t = torch.tensor([0.125, 0.25, 0.5, 0.75, 1.0])
    z = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    mu, sigma = (v.reshape(-1, 1, 1, 1) for v in theirs.sde.marginal_prob_scalars(t.double()))
    with torch.no_grad():
        expected = mu * theirs.score(t, z)
    score = ours.score(z / mu, (sigma / mu).reshape(-1))
    for i in range(5):
        assert relative(score[i], expected[i]) < 1e-5


def exact(sde, mean, variance):
    """sigma(t) grad log p_t(z) for x_0 ~ N(mean, diag(variance)) under an SDE of score_models."""

    def net(t, z):
        mu, sigma = (v.reshape(-1, 1, 1, 1) for v in sde.marginal_prob_scalars(t))
        return -sigma * (z - mu * mean) / (mu**2 * variance + sigma**2)

    return net


def test_every_form_of_one_denoiser_agrees():
    """E[x_0 | x_sigma] of N(mean, diag(variance)) in closed form, through VE, VP and TSVE."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    variance = torch.rand(1, 4, 4, generator=generator, dtype=torch.float64) + 0.1
    forms = [
        (VESDE(0.01, 200.0, T=2.0), VarianceExploding(0.01, 200.0, T=2.0)),
        (VPSDE(0.1, 20.0), VariancePreserving(0.1, 20.0)),
        (VPSDE(5.0, 5.0, T=2.0), VariancePreserving(5.0, 5.0, T=2.0)),
        (TSVESDE(0.01, 200.0, 0.4, 5.0), VarianceExploding(0.01, 200.0, 1.0, 5.0, 0.4)),
    ]
    sigma = torch.tensor([0.02, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    x = torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    x = mean + x * (variance + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()
    slope = variance / (variance + sigma.reshape(-1, 1, 1, 1) ** 2)
    for sde, schedule in forms:
        prior = ScoreModelsPrior(
            exact(sde, mean, variance), schedule, (1, None, None), torch.float64
        )
        denoised = prior.denoise(x, sigma)
        for i in range(5):
            assert relative(denoised[i], (mean + slope * (x - mean))[i]) < 1e-8


def test_the_same_posterior_in_every_form():
    """Draws for data of a mixture prior: given as it is, as a VE network, and as a VP network."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    mixture = MixturePrior([0.3, 0.7], [GaussianPrior(m, 0.2) for m in means])
    A = PSFConvolution(torch.full((3, 3), 1 / 9), (1, 4, 4))
    likelihood = Likelihood(A, GaussianNoise(std=0.1))
    y = likelihood.simulate(mixture.sample(1, seed=1), seed=2)[0]

    def network(sde):
        def net(t, z):
            mu, sigma = (v.reshape(-1, 1, 1, 1) for v in sde.marginal_prob_scalars(t))
            return (mu * mixture.denoise(z / mu, (sigma / mu).flatten()) - z) / sigma

        return net

    vp = VariancePreserving(0.1, 20.0)
    forms = [
        (VESDE(vp.sigma_min, 100.0), VarianceExploding(vp.sigma_min, 100.0)),
        (VPSDE(0.1, 20.0), vp),
    ]
    draws = []
    for sde, schedule in forms:
        prior = ScoreModelsPrior(network(sde), schedule, (1, 4, 4), torch.float64)
        posterior = Posterior(prior.with_moments(mixture.moments), likelihood, y)
        draws.append(sample(posterior, 128, SMC(levels=12), seed=3))
    torch.testing.assert_close(draws[0].x, draws[1].x, rtol=0.0, atol=1e-6)
    assert draws[0].log_evidence == pytest.approx(draws[1].log_evidence, abs=1e-6)
    # and they are that posterior, found over other levels
    direct = sample(Posterior(mixture, likelihood, y), 128, SMC(levels=12), seed=3)
    assert float((direct.x.mean(0) - draws[0].x.mean(0)).abs().max()) < 0.3


def test_trained_range_is_that_of_the_sde():
    """The levels are sigma(t) / mu(t) at the ends, and t(sigma) is the inverse between them."""
    forms = [
        (VESDE(0.01, 50.0), VarianceExploding(0.01, 50.0), 0.0),
        (VPSDE(0.1, 20.0, epsilon=1e-3), VariancePreserving(0.1, 20.0, epsilon=1e-3), 1e-3),
        (TSVESDE(0.01, 50.0, 0.4, 5.0), VarianceExploding(0.01, 50.0, 1.0, 5.0, 0.4), 0.0),
    ]
    for sde, schedule, first in forms:
        t = torch.linspace(first, 1, 9, dtype=torch.float64)
        mu, sigma = sde.marginal_prob_scalars(t)
        assert schedule.sigma_min == pytest.approx(float(sigma[0] / mu[0]), rel=1e-9)
        assert schedule.sigma_max == pytest.approx(float(sigma[-1] / mu[-1]), rel=1e-9)
        torch.testing.assert_close(schedule.time(sigma / mu), t, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(schedule.scale(t), mu, rtol=1e-12, atol=0)


def test_draws_follow_a_known_prior():
    """Draws through a VP network of a Gaussian have its mean and variance.

    512 draws of 16 pixels: the standard errors are 0.011 sd for the mean and 1.6 % for the
    variance; the tolerances are 4.5 of them (false alarms: 1 in 10^5). Negative control: the same
    network, taken for one of a VE.
    """
    mean, variance = torch.tensor(0.5).double(), torch.tensor(0.25).double()
    net = exact(VPSDE(0.1, 20.0), mean, variance)
    moments = Gaussian(torch.full((1, 4, 4), 0.5).double(), Scalar(0.25))
    size, dtype = (1, None, None), torch.float64
    right = ScoreModelsPrior(net, VariancePreserving(0.1, 20.0), size, dtype, moments)
    draws = right.sample(512, seed=0)
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.05 * 0.5)
    assert float(draws.var()) == pytest.approx(0.25, rel=0.07)
    wrong = ScoreModelsPrior(net, VarianceExploding(0.001, 150.0), size, dtype, moments)
    assert abs(float(wrong.sample(512, seed=0).var()) / 0.25 - 1) > 0.07


def test_latest_checkpoint_is_read_unless_one_is_named(saved):
    files = {k: next(saved.glob(f"checkpoint_*_{k:03d}.pt")) for k in (1, 2, 3)}
    for k, prior in [
        (3, load_score_models(saved)),
        (1, load_score_models(saved, checkpoint=1)),
        (2, load_score_models(saved, checkpoint=2)),
    ]:
        assert prior.identity["checkpoint"] == files[k].name
        weights = torch.load(files[k], weights_only=True)
        assert all(torch.equal(w, weights[n]) for n, w in prior.network.state_dict().items())


def test_latest_means_the_largest_number(copy):
    """Not the last name in the alphabet, nor the lowest loss."""
    shutil.copy(latest(copy), copy / "checkpoint_1.0000e-09_1000.pt")
    assert load_score_models(copy).identity["checkpoint"] == "checkpoint_1.0000e-09_1000.pt"


def test_early_files(copy, saved):
    """Old names of the SDEs, and weights that were saved with the whole ScoreModel."""
    file = latest(copy)
    weights = torch.load(file, weights_only=True)
    torch.save({f"model.{k}": w for k, w in weights.items()}, file)
    edit(copy, sde="vesde", model_architecture=None, T=None)
    x, sigma = torch.ones(1, 1, 16, 16), torch.ones(1)
    expected = load_score_models(saved).denoise(x, sigma)
    torch.testing.assert_close(load_score_models(copy).denoise(x, sigma), expected)
    edit(copy, sde=None)
    torch.testing.assert_close(load_score_models(copy).denoise(x, sigma), expected)
    edit(copy, sde="vpsde", sigma_min=None, sigma_max=None, beta_min=0.1, beta_max=20)
    assert load_score_models(copy).schedule == VariancePreserving(0.1, 20.0)


def test_ddpm_networks_load(tmp_path):
    net = score_models.DDPM(nf=8, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    model = score_models.ScoreModel(net, device="cpu", **SDES["vp"])
    (tmp_path / "model_hparams.json").write_text(json.dumps(model.hyperparameters))
    torch.save(net.state_dict(), tmp_path / "checkpoint_1.0000e+00_001.pt")
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 1.0])
    mu, sigma = model.sde.marginal_prob_scalars(t)
    with torch.no_grad():
        score = load_score_models(tmp_path).score(x / mu.reshape(-1, 1, 1, 1), sigma / mu)
        expected = mu.reshape(-1, 1, 1, 1) * model.score(t, x)
    assert relative(score, expected) < 1e-5


def test_loading_leaves_the_generator_and_the_output_alone(saved, capsys):
    before = torch.random.get_rng_state()
    load_score_models(saved)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr() == ("", "")


def test_shape_and_moments_are_asked_for_once(saved):
    """The files hold neither: each is refused until given, and the moments bring the shape."""
    prior = load_score_models(saved)
    with pytest.raises(ValueError, match=r"does not record the size .*with_shape\(\(1, \.\.\."):
        prior.shape  # noqa: B018
    with pytest.raises(ValueError, match=r"does not record the mean .*with_moments"):
        prior.moments  # noqa: B018
    assert load_score_models(saved, shape=(1, 16, 16)).shape == (1, 16, 16)
    moments = Gaussian(torch.zeros(1, 16, 16), Scalar(1.0))
    given = load_score_models(saved, moments=moments)
    assert given.shape == (1, 16, 16) and given.moments is moments
    assert given.identity == prior.identity
    scaled = given.rescaled(10.0)
    x, sigma = torch.ones(1, 1, 16, 16), torch.ones(1)
    torch.testing.assert_close(
        scaled.denoise(10 * x, 10 * sigma), 10 * prior.denoise(x, sigma), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "x, sigma, message",
    [
        (
            (2, 1, 16, 16),
            [1.0, 51.0],
            "from 1 to 51, but this network was trained from 0.01 to 50",
        ),
        ((1, 1, 16, 16), [0.0], "sigma goes from 0 to 0"),
        ((1, 1, 16, 16), [math.nan], "sigma goes from nan"),
        ((2, 1, 16, 16), [1.0], r"sigma has shape \(1,\), expected \(2,\)"),
        ((1, 3, 16, 16), [1.0], r"images have shape \(3, 16, 16\), expected \(1, any, any\)"),
        ((1, 16, 16), [1.0], r"images have shape \(16, 16\), expected \(1, any, any\)"),
        ((1, 1, 17, 17), [1.0], "every side must be a multiple of 2"),
    ],
)
def test_refused_inputs(saved, x, sigma, message):
    with pytest.raises(ValueError, match=message):
        load_score_models(saved).denoise(torch.zeros(x), torch.tensor(sigma))


def test_levels_rounded_to_float32_are_inside_the_range(saved):
    prior = load_score_models(saved)
    for sigma in (prior.sigma_min, prior.sigma_max):
        ends = torch.tensor([sigma], dtype=torch.float32).nextafter(torch.tensor([1e9]))
        prior.denoise(torch.zeros(1, 1, 16, 16), ends)
        prior.denoise(torch.zeros(1, 1, 16, 16), ends.nextafter(torch.tensor([0.0])))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(shape=(3, 16, 16)), r"images have shape \(3, 16, 16\), expected \(1, any, any\)"),
        (dict(shape=(1, 15, 16)), "every side must be a multiple of 2"),
        (dict(checkpoint=7), r"no checkpoint 7, only \[1, 2, 3\]; choose one of these"),
        (
            dict(shape=(1, 16, 16), moments=Gaussian(torch.zeros(1, 8, 8), Scalar(1.0))),
            r"images have shape \(1, 8, 8\), expected \(1, 16, 16\)",
        ),
    ],
)
def test_refused_arguments(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_score_models(saved, **arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sde="edm"), r"model_hparams.json: sde is 'edm', expected 've', 'vp' or 'tsve'"),
        (dict(sde=None, sigma_min=None), "sde is None, expected"),
        (dict(sigma_max=None), "no number for sigma_max"),
        (dict(sigma_max="50"), "no number for sigma_max"),
        (dict(sigma_max=0.001), r"sigma_min is 0.01, sigma_max 0.001 .* expected 0 < sigma_min"),
        (dict(sde="vp", beta_min=20, beta_max=1), "expected 0 < beta_min <= beta_max"),
        (dict(model_architecture="MLP"), "architecture 'MLP', expected 'NCSNpp' or 'DDPM'"),
        (dict(model_architecture="Unet"), "architecture 'Unet', expected 'NCSNpp' or 'DDPM'"),
        (dict(condition=["input"]), r"conditions \['input'\], expected none"),
        (dict(activation_type="snake"), "NCSNpp refuses these settings .*snake"),
        (dict(nf=16), r"does not fit the network .* tensors \(all_modules.*expected .*\.\.\."),
    ],
)
def test_refused_settings(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=message):
        load_score_models(copy)


def no_settings(folder):
    (folder / "model_hparams.json").unlink()


def cut_settings(folder):
    file = folder / "model_hparams.json"
    file.write_text(file.read_text()[:40])


def list_settings(folder):
    (folder / "model_hparams.json").write_text("[]")


def no_weights(folder):
    for file in folder.glob("*.pt"):
        file.unlink()


def cut_weights(folder):
    file = latest(folder)
    file.write_bytes(file.read_bytes()[:1000])


def empty_weights(folder):
    latest(folder).write_bytes(b"")


def html_weights(folder):
    latest(folder).write_text("<html>404 not found</html>")


def code_in_weights(folder):
    torch.save(score_models.NCSNpp(**NETWORK), latest(folder))


def optimizer_as_weights(folder):
    file = latest(folder)
    shutil.copy(next(folder.glob("optimizer*003.pt")), file)


def missing_tensor(folder):
    weights = torch.load(latest(folder), weights_only=True)
    weights.pop("all_modules.1.weight")
    torch.save(weights, latest(folder))


def diverged(folder):
    weights = torch.load(latest(folder), weights_only=True)
    weights["all_modules.1.weight"][0, 0] = math.nan
    torch.save(weights, latest(folder))


def twice_the_same_index(folder):
    shutil.copy(latest(folder), folder / "checkpoint_9.0000e+09_003.pt")


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_settings, "has no model_hparams.json, expected a checkpoint folder of score_models"),
        (cut_settings, "model_hparams.json is not JSON"),
        (list_settings, "holds a list, expected a JSON object"),
        (no_weights, r"has no checkpoint_\*.pt, expected the weights beside"),
        (cut_weights, "cannot be read as a state dict of tensors .* truncated"),
        (empty_weights, "cannot be read as a state dict of tensors .* truncated"),
        (html_weights, "cannot be read as a state dict of tensors .* copy it again"),
        (code_in_weights, "cannot be read as a state dict of tensors"),
        (optimizer_as_weights, "is it an optimizer_.*under another name"),
        (
            missing_tensor,
            r"in 1 of \d+ tensors \(all_modules.1.weight is missing, expected \(32, ",
        ),
        (diverged, "NaN or infinity in all_modules.1.weight: the training diverged"),
        (twice_the_same_index, "has 2 files with the index 3"),
    ],
)
def test_damaged_folders(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        load_score_models(copy)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="has no model_hparams.json"):
        load_score_models(tmp_path / "nowhere")
