"""Neural posterior estimation of scalar parameters: p(theta | x), learned from simulated pairs.

    estimator = si.NPE(prior)
    estimator.fit(theta, x, seed=0)
    draws = estimator.condition(x_observed).sample(1000, seed=1)

Densities are learned in the space of `scoreinv.npe.parameters`, so that no draw leaves the prior's support. Several members
make a mixture, log sum_m w_m q_m, whose weights maximise the likelihood of the held-out pairs: stacking, by expectation
maximisation. Where the likelihood is known, draws are weighted to the exact posterior, and the weights say how good the
estimate was.

Papamakarios & Murray, Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation (2016,
arXiv:1605.06376); stacking: Yao, Vehtari, Simpson & Gelman (2018, arXiv:1704.02030).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreinv.finetune.evidence import Evidence, evidence
from scoreinv.npe.data import (
    ALONE,
    Inputs,
    Standardise,
    count,
    mapped,
    masked,
    named,
    usable,
)
from scoreinv.npe.featurizers import Data, Named, featurizer_for
from scoreinv.npe.fitting import Fitting, Noise, fit
from scoreinv.npe.flows import new_flow, seeded
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import stream

FORMAT = 1  # of the files of an estimator
FEWEST = 20  # pairs that are worth a fit
STEPS = 200  # of expectation maximisation
NOTHING = 700.0  # below the largest log-weight [nat]
STRANGE = 5.0  # times the usual distance of features: data beyond are unlike any of the training
LOG_TWO_PI = math.log(2 * math.pi)


class Density(nn.Module):
    """q(u | x): units, features, flow.

    Args:
        units: Of each input, by name.
        featurizer: Makes features of standardised data; of one input alone, or of several by name.
        flow: A distribution of u for features, see `scoreinv.npe.flows`.
    """

    def __init__(
        self, units: dict[str, Standardise], featurizer: nn.Module, flow: nn.Module
    ) -> None:
        super().__init__()
        self.units = nn.ModuleDict(units)
        self.featurizer, self.flow = featurizer, flow

    def features(self, x: Inputs) -> Tensor:
        """With shape (B, features)."""
        standard = {name: self.units[name](v) for name, v in x.items()}
        return self.featurizer(standard[ALONE] if set(standard) == {ALONE} else standard)

    def log_prob(self, u: Tensor, x: Inputs) -> Tensor:
        """log q(u | x), with shape (B,), of pairs."""
        return self.flow(self.features(x)).log_prob(u.float())

    @torch.no_grad()
    def sample(self, n: int, x: Inputs, seed: int) -> Tensor:
        """n draws for each x, with shape (n, B, d)."""
        with seeded(seed):
            return self.flow(self.features(x)).sample((n,)).double()


class NPE:
    """An estimator of p(theta | x).

    Args:
        prior: Of the parameters.
        flow: maf, nsf, coupling or mixture, or a function of the numbers of parameters and of features that makes any module
            whose call on features gives a distribution.
        featurizer: Makes one for data, a function of no argument, called once for each member; one that suits the data's
            shape if not given (`scoreinv.npe.featurizers`).
        members: Of the ensemble.
        invalid: What to do with numbers that are not finite: raise, drop, or mask.

    Attributes:
        members: Densities, after `fit`.
        weights: Of the members, with shape (M,).
        history: Of each member's fit.
        dropped: Pairs that were left out.
    """

    def __init__(
        self,
        prior: ParameterPrior,
        flow: str | Callable[[int, int], nn.Module] = "nsf",
        featurizer: Callable[[], nn.Module] | None = None,
        members: int = 1,
        invalid: str = "raise",
    ) -> None:
        if members < 1:
            raise ValueError(f"members is {members}, expected at least 1")
        self.prior, self.flow, self.featurizer, self.invalid = prior, flow, featurizer, invalid
        self.size, self.members, self.dropped = members, nn.ModuleList(), 0
        self.weights = torch.full((members,), 1 / members, dtype=torch.float64)
        self.shapes: dict[str, list[int]] = {}
        self.history: list[list[dict[str, float]]] = []

    def fit(
        self,
        theta: Tensor,
        x: Data,
        seed: int,
        plan: Fitting | None = None,
        validation: float = 0.1,
        noise: Noise | None = None,
        progress: bool = False,
    ) -> NPE:
        """Learn from pairs; returns itself.

        Args:
            theta: With shape (n, d), drawn from the prior.
            x: Data of each, with shape (n, ...), or several by name.
            seed: Decides everything random.
            plan: How long and how fast.
            validation: Share of the pairs that are held out, which stop the fit and weigh the members.
            noise: See `scoreinv.npe.fitting.fit`.
            progress: Show a progress bar.

        Raises:
            ValueError: Lengths that differ, too few pairs, parameters outside of the prior, features that never change.
        """
        x = named(x)
        if len(theta) != count(x):
            raise ValueError(f"{len(theta)} parameters and {count(x)} data, expected as many")
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation:g}, expected between 0 and 1")
        theta, x, self.dropped = usable(theta, x, self.invalid)
        if len(theta) < FEWEST:
            raise ValueError(f"{len(theta)} pairs, expected at least {FEWEST}, better thousands")
        u = self.prior.to_normal(theta)
        held_out = torch.zeros(len(u), dtype=torch.bool)
        some = max(1, round(validation * len(u)))
        held_out[torch.randperm(len(u), generator=stream(seed))[:some]] = True
        seen = noise(x, stream(seed, 3)) if noise is not None else x
        self.shapes = {name: list(v.shape[1:]) for name, v in seen.items()}
        self.members, self.history = nn.ModuleList(), []
        for member in range(self.size):
            density = self._new(seed + member)
            for name, v in seen.items():
                density.units[name].measure(v, name)
            self.history.append(
                fit(density, u, x, held_out, plan or Fitting(), seed + member, noise, progress)
            )
            self.members.append(density)
        x_held = mapped(seen, lambda v: v[held_out])
        with torch.no_grad():
            log_q = torch.stack([m.log_prob(u[held_out], x_held) for m in self.members]).double()
        self.weights = stacked(log_q)
        features = self.members[0].features(x_held).detach().double()
        self._middle, self._spread = features.mean(0), torch.linalg.pinv(torch.cov(features.T))
        return self

    def condition(self, x: Data) -> Estimated:
        """The posterior of one observation, with the shape (...) of one simulation, or several inputs by name.

        Raises:
            ValueError: Nothing was fitted; data of another shape, or not finite.
        """
        if not self.members:
            raise ValueError("this estimator has not been fitted; call fit first")
        one = mapped(named(x), lambda v: torch.as_tensor(v)[None])
        if self.invalid == "mask":
            one = mapped(one, masked)
        if set(one) != set(self.shapes):
            raise ValueError(f"inputs are {sorted(one)}, expected {sorted(self.shapes)}")
        for name, v in one.items():
            if list(v.shape[1:]) != self.shapes[name]:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape[1:])}, unlike the simulations: {tuple(self.shapes[name])}"
                )
            if not bool(v.isfinite().all()):
                raise ValueError(
                    f"{name} has {int((~v.isfinite()).sum())} numbers that are not finite; fit with invalid='mask' for data "
                    "with missing ones"
                )
        return Estimated(self, one)

    def save(self, folder: str | Path) -> None:
        """Keep what was fitted; `load` reads it into an estimator that is made as this one was."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"members.{k}": v.contiguous() for k, v in self.members.state_dict().items()}
        tensors |= {"weights": self.weights, "middle": self._middle, "spread": self._spread}
        save_file(tensors, folder / "npe.safetensors")
        learned = {"shapes": self.shapes, "history": self.history, "dropped": self.dropped}
        card = {**self._card, **learned}
        (folder / "npe.json").write_text(json.dumps(card, indent=1) + "\n")

    def load(self, folder: str | Path) -> NPE:
        """Take up what an estimator like this one has kept in a folder; returns itself.

        Raises:
            ValueError: Another format, other parameters, another flow, other sizes.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "npe.json").read_text())
            tensors = load_file(folder / "npe.safetensors")
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no estimator that can be read: {error}") from error
        other = [k for k, v in self._card.items() if card.get(k) != v]
        if other:
            seen = ", ".join(f"{k} {card.get(k)!r}" for k in other)
            expected = ", ".join(f"{k} {self._card[k]!r}" for k in other)
            raise ValueError(f"{folder} holds an estimator of {seen}, expected {expected}")
        self.shapes = card["shapes"]
        self.members = nn.ModuleList([self._new(i) for i in range(self.size)])
        part = {
            k.removeprefix("members."): v for k, v in tensors.items() if k.startswith("members.")
        }
        try:
            self.members.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds networks of other sizes: {error}") from None
        self.members.eval()
        self.weights = tensors["weights"]
        self._middle, self._spread = tensors["middle"], tensors["spread"]
        self.history, self.dropped = card["history"], card["dropped"]
        return self

    @property
    def _card(self) -> dict:
        flow = self.flow if isinstance(self.flow, str) else "own"
        return {
            "format": FORMAT,
            "parameters": {
                n: str(p) for n, p in zip(self.prior.names, self.prior._each, strict=True)
            },
            "flow": flow,
            "members": self.size,
            "invalid": self.invalid,
        }

    def _new(self, seed: int) -> Density:
        make = self.flow if callable(self.flow) else lambda d, c: new_flow(self.flow, d, c)
        with seeded(seed):
            featurizer = self.featurizer() if self.featurizer else self._suited()
            units = {name: Standardise(shape) for name, shape in self.shapes.items()}
            return Density(units, featurizer, make(len(self.prior), featurizer.features))

    def _suited(self) -> nn.Module:
        if set(self.shapes) == {ALONE}:
            return featurizer_for(self.shapes[ALONE])
        return Named(**{name: featurizer_for(shape) for name, shape in self.shapes.items()})


@dataclass(frozen=True)
class Weighted:
    """Draws of an estimate, weighted to the exact posterior.

    Attributes:
        theta: With shape (n, d).
        log_w: Log-weights, with shape (n,); the mean of the weights is the evidence.
        evidence: What they prove: log Z, effective size, Pareto's k-hat (above 0.7 they are not to be trusted).
    """

    theta: Tensor
    log_w: Tensor
    evidence: Evidence

    @property
    def n_eff(self) -> float:
        """1 / sum w^2 - 1 of the normalised weights."""
        return float(1 / torch.softmax(self.log_w, 0).square().sum()) - 1


@dataclass(frozen=True)
class Estimated:
    """The posterior of one observation.

    Attributes:
        estimator: Fitted.
        x: The observation, in a batch of one.
    """

    estimator: NPE
    x: Inputs

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws of theta, with shape (n, d), in float64; all of them in the prior's support."""
        return self.estimator.prior.from_normal(self._draw(n, seed))

    @torch.no_grad()
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta | x), with shape (B,), in float64; -inf outside of the prior's support."""
        prior = self.estimator.prior
        log_p = prior.log_prob(theta)
        found, inside = torch.full_like(log_p, -math.inf), log_p > -math.inf
        u = prior.to_normal(theta[inside])
        found[inside] = self._ratio(u) + log_p[inside]
        return found

    def reweighted(
        self, log_likelihood: Callable[[Tensor], Tensor], n: int, seed: int
    ) -> Weighted:
        """n draws, weighted by log p(x | theta), which takes theta with shape (n, d) and answers with shape (n,) [nat]."""
        u = self._draw(n, seed)
        theta = self.estimator.prior.from_normal(u)
        log_l = log_likelihood(theta).double()
        if tuple(log_l.shape) != (n,):
            raise ValueError(f"the log-likelihood has shape {tuple(log_l.shape)}, expected ({n},)")
        log_w = torch.where(log_l.isfinite(), log_l - self._ratio(u), -math.inf)
        if not bool((log_w > -math.inf).any()):
            raise ValueError(f"the log-likelihood of all {n} draws is not finite")
        # draws that the likelihood forbids count as almost nothing
        return Weighted(theta, log_w, evidence(log_w.clamp_min(float(log_w.max()) - NOTHING)))

    def strangeness(self) -> float:
        """Mahalanobis distance of the features from those of held-out simulations, over what such a distance is on average.

        Beyond `STRANGE` the data are unlike any that were simulated, and the estimate means nothing.
        """
        with torch.no_grad():
            f = self.estimator.members[0].features(self.x)[0].double() - self.estimator._middle
        rank = torch.linalg.matrix_rank(self.estimator._spread)
        return float((f @ self.estimator._spread @ f / rank).sqrt())

    @torch.no_grad()
    def _draw(self, n: int, seed: int) -> Tensor:
        e = self.estimator
        which = torch.multinomial(e.weights, n, replacement=True, generator=stream(seed))
        counts = which.bincount(minlength=e.size).tolist()
        parts = [
            m.sample(k, self.x, seed + i)[:, 0]
            for i, (m, k) in enumerate(zip(e.members, counts, strict=True))
            if k
        ]
        u = torch.cat(parts)
        return u[torch.randperm(n, generator=stream(seed, 1))]

    @torch.no_grad()
    def _ratio(self, u: Tensor) -> Tensor:
        """log q(u | x) - log N(u; 0, 1), with shape (B,)."""
        e = self.estimator
        same = mapped(self.x, lambda v: v.expand(len(u), *v.shape[1:]))
        each = torch.stack([m.log_prob(u, same) for m in e.members]).double()
        normal = -0.5 * (u.square() + LOG_TWO_PI).sum(1)
        return torch.logsumexp(each + e.weights.log()[:, None], 0) - normal


def stacked(log_q: Tensor) -> Tensor:
    """Weights under which a mixture makes pairs likeliest, with shape (M,), for log q of its members, with shape (M, n)."""
    w = log_q.new_full((len(log_q),), 1 / len(log_q))
    for _ in range(STEPS):
        w = torch.softmax(log_q + w.log()[:, None], 0).mean(1).clamp_min(1e-12)
        w = w / w.sum()
    return w
