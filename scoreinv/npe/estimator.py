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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreinv.finetune.evidence import Evidence, evidence
from scoreinv.npe.data import (
    ALONE,
    INVALID,
    ROWS,
    Inputs,
    Standardise,
    count,
    mapped,
    masked,
    named,
    usable,
)
from scoreinv.npe.featurizers import Data, Named, featurizer_for
from scoreinv.npe.fitting import Fitting, fit, log_prob
from scoreinv.npe.flows import KINDS, new_flow, seeded
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import integer, stream

FORMAT = 1  # of the files of an estimator
FEWEST = 50  # pairs that are worth a fit
HELD_OUT = 10  # pairs, at least
MEASURED = 10_000  # pairs that set units and usual features
STEPS = 200  # of expectation maximisation
NOTHING = 700.0  # below the largest log-weight [nat]
LOG_TWO_PI = math.log(2 * math.pi)


class Density(nn.Module):
    """q(u | x): units, features, flow.

    Args:
        units: Of each input, by name.
        featurizer: Makes features of standardised data; of one input alone, or of several by name.
        flow: A distribution of u for features, see `scoreinv.npe.flows`.
        alone: Whether there is one input, which the featurizer takes without its name.
    """

    def __init__(
        self,
        units: dict[str, Standardise],
        featurizer: nn.Module,
        flow: nn.Module,
        alone: bool,
    ) -> None:
        super().__init__()
        self.units = nn.ModuleDict(units)
        self.featurizer, self.flow, self.alone = featurizer, flow, alone

    def features(self, x: Inputs) -> Tensor:
        """With shape (B, features)."""
        standard = {name: self.units[name](v) for name, v in x.items()}
        return self.featurizer(standard[ALONE] if self.alone else standard)

    @torch.no_grad()
    def many_features(self, x: Inputs) -> Tensor:
        """Of many data, some at a time, with shape (n, features), in float64."""
        parts = torch.arange(count(x)).split(ROWS)
        some = (mapped(x, lambda v, rows=rows: v[rows]) for rows in parts)
        return torch.cat([self.features(part).double() for part in some])

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
        featurizer: A function of no argument that makes one, called once for each member; one that suits the data's shape if
            not given (`scoreinv.npe.featurizers`).
        members: Of the ensemble.
        invalid: What to do with numbers that are not finite: raise; drop such simulations; or mask, which sets missing ones
            of the data to the mean and tells the featurizer where, by as many channels more.

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
        if isinstance(flow, str) and flow not in KINDS:
            raise ValueError(f"flow is {flow!r}, expected one of {', '.join(KINDS)}")
        if invalid not in INVALID:
            raise ValueError(f"invalid is {invalid!r}, expected one of {', '.join(INVALID)}")
        if isinstance(featurizer, nn.Module):
            raise ValueError(
                "featurizer is a module, expected a function that makes one, for each member its own: lambda: ..."
            )
        self.prior, self.flow, self.featurizer, self.invalid = prior, flow, featurizer, invalid
        self.size, self.members, self.dropped = members, nn.ModuleList(), 0
        self.weights = torch.full((members,), 1 / members, dtype=torch.float64)
        self.shapes: dict[str, list[int]] = {}
        self.history: list[list[dict[str, float]]] = []
        self.usual: list[Usual] = []

    def fit(
        self,
        theta: Tensor,
        x: Data,
        seed: int,
        plan: Fitting | None = None,
        validation: float = 0.1,
        noise: Callable[[Data, torch.Generator], Data] | None = None,
        device: str = "cpu",
        progress: bool = False,
    ) -> NPE:
        """Learn from pairs; returns itself.

        Args:
            theta: With shape (n, d), drawn from the prior.
            x: Data of each, with shape (n, ...), or several by name.
            seed: Decides everything random.
            plan: How long and how fast.
            validation: Share of the pairs that are held out, which stop the fit and weigh the members.
            noise: Makes data of stored ones, anew in every epoch: of a batch like x, and a generator, one like it.
            device: Where the networks are fitted; data stay where they are, but for a batch.
            progress: Show a progress bar.

        Raises:
            ValueError: Lengths that differ, too few pairs, parameters outside of the prior, features that never change.
        """
        theta, inputs = torch.as_tensor(theta), named(x)
        if theta.ndim != 2:
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, expected (n, {len(self.prior)})"
            )
        if len(theta) != count(inputs):
            raise ValueError(f"{len(theta)} parameters and {count(inputs)} data, expected as many")
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation:g}, expected between 0 and 1")
        theta, inputs, self.dropped = usable(theta, inputs, self.invalid)
        if len(theta) < FEWEST:
            raise ValueError(f"{len(theta)} pairs, expected at least {FEWEST}, better thousands")
        u = self.prior.to_normal(theta)
        held_out = torch.zeros(len(u), dtype=torch.bool)
        some = max(HELD_OUT, round(validation * len(u)))
        held_out[torch.randperm(len(u), generator=stream(seed))[:some]] = True
        self.alone = not isinstance(x, Mapping)

        def fresh(some: Inputs, generator: torch.Generator) -> Inputs:
            if noise is not None:
                some = named(noise(some[ALONE] if self.alone else some, generator))
            return mapped(some, masked) if self.invalid == "mask" else some

        # what units and usual features are of
        seen = fresh(mapped(inputs, lambda v: v[~held_out][:MEASURED]), stream(seed, 3))
        self.shapes = {name: list(v.shape[1:]) for name, v in seen.items()}
        members = nn.ModuleList([self._new(integer(seed, 5, i)) for i in range(self.size)])
        for name, v in seen.items():
            members[0].units[name].measure(v, name)
        history = []
        for i, density in enumerate(members):
            density.units.load_state_dict(members[0].units.state_dict())
            own = integer(seed, 6, i)
            history.append(
                fit(density, u, inputs, held_out, plan or Fitting(), own, fresh, device, progress)
            )
        x_held = fresh(mapped(inputs, lambda v: v[held_out]), stream(seed, 7))
        self.weights = stacked(torch.stack([log_prob(m, u[held_out], x_held) for m in members]))
        self.usual = [Usual.of(m.many_features(seen), m.many_features(x_held)) for m in members]
        self.members, self.history = members, history
        return self

    def condition(self, x: Data) -> Estimated:
        """The posterior of one observation, with the shape (...) of one simulation, or several inputs by name.

        Raises:
            ValueError: Nothing was fitted; data of another shape, or not finite.
        """
        if not self.members:
            raise ValueError("this estimator has not been fitted; call fit first")
        one = mapped(named(x), lambda v: v[None])
        if set(one) != set(self.shapes):
            raise ValueError(f"inputs are {sorted(one)}, expected {sorted(self.shapes)}")
        for name, v in one.items():
            shape = list(self.shapes[name])
            shape[0] -= self._masks(shape)
            if list(v.shape[1:]) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape[1:])}, unlike the simulations: {tuple(shape)}"
                )
            if self.invalid != "mask" and not bool(v.isfinite().all()):
                raise ValueError(
                    f"{name} has {int((~v.isfinite()).sum())} numbers that are not finite; fit with invalid='mask' for data "
                    "with missing ones"
                )
        return Estimated(self, mapped(one, masked) if self.invalid == "mask" else one)

    def save(self, folder: str | Path) -> None:
        """Keep what was fitted; `load` reads it into an estimator that is made as this one was."""
        if not self.members:
            raise ValueError("this estimator has not been fitted; there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"members.{k}": v.contiguous() for k, v in self.members.state_dict().items()}
        tensors["weights"] = self.weights
        for i, usual in enumerate(self.usual):
            tensors |= {f"usual.{i}.{k}": v.contiguous() for k, v in asdict(usual).items()}
        save_file(tensors, folder / "npe.safetensors")
        learned = {"shapes": self.shapes, "history": self.history, "dropped": self.dropped}
        card = {**self._card, **learned, "alone": self.alone}
        (folder / "npe.json").write_text(json.dumps(card, indent=1) + "\n")

    def load(self, folder: str | Path) -> NPE:
        """Take up what an estimator like this one has kept in a folder; returns itself.

        Raises:
            ValueError: Another format, other parameters, another flow, other sizes, a broken file.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "npe.json").read_text())
            tensors = load_file(folder / "npe.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no estimator that can be read: {error}") from error
        other = [k for k, v in self._card.items() if card.get(k) != v]
        if other:
            seen = ", ".join(f"{k} {card.get(k)!r}" for k in other)
            expected = ", ".join(f"{k} {self._card[k]!r}" for k in other)
            raise ValueError(f"{folder} holds an estimator of {seen}, expected {expected}")
        part = lambda name: {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        self.shapes, self.alone = card["shapes"], card["alone"]
        members = nn.ModuleList([self._new(i) for i in range(self.size)])
        try:
            members.load_state_dict(part("members"))
        except RuntimeError as error:
            raise ValueError(f"{folder} holds networks of other sizes: {error}") from None
        members.eval()
        self.members, self.weights = members, tensors["weights"]
        self.usual = [Usual(**part(f"usual.{i}")) for i in range(self.size)]
        self.history, self.dropped = card["history"], card["dropped"]
        return self

    @property
    def _card(self) -> dict:
        return {
            "format": FORMAT,
            "parameters": self.prior.card,
            "flow": self.flow if isinstance(self.flow, str) else "own",
            "members": self.size,
            "invalid": self.invalid,
        }

    def _masks(self, shape: Sequence[int]) -> int:
        """How many channels of data of this shape are masks."""
        return shape[0] // 2 if self.invalid == "mask" else 0

    def _new(self, seed: int) -> Density:
        make = self.flow if callable(self.flow) else lambda d, c: new_flow(self.flow, d, c)
        with seeded(seed):
            featurizer = self.featurizer() if self.featurizer else self._suited()
            if not isinstance(getattr(featurizer, "features", None), int):
                raise ValueError(
                    f"the featurizer, a {type(featurizer).__name__}, does not say how many features it makes; give it an "
                    "attribute `features`"
                )
            units = {k: Standardise(shape, self._masks(shape)) for k, shape in self.shapes.items()}
            flow = make(len(self.prior), featurizer.features)
            return Density(units, featurizer, flow, self.alone)

    def _suited(self) -> nn.Module:
        if self.alone:
            return featurizer_for(self.shapes[ALONE])
        return Named(**{name: featurizer_for(shape) for name, shape in self.shapes.items()})


@dataclass(frozen=True)
class Usual:
    """Where features of simulations lie.

    Attributes:
        middle: Their mean, with shape (F,).
        precision: Of their covariance, with shape (F, F), whose least directions are taken to be a hundredth of the widest.
        reach: Within which 99 of 100 held-out simulations lie, a Mahalanobis distance.
    """

    middle: Tensor
    precision: Tensor
    reach: Tensor

    @classmethod
    def of(cls, features: Tensor, held_out: Tensor) -> Usual:
        """Of features with shape (n, F), set by those of other simulations."""
        middle = features.mean(0)
        left = features - middle
        values, vectors = torch.linalg.eigh(left.T @ left / len(left))
        values = values.clamp_min(1e-2 * float(values.max()))
        usual = cls(middle, (vectors / values) @ vectors.T, torch.ones((), dtype=torch.float64))
        return replace(usual, reach=usual.distance(held_out).quantile(0.99).clamp_min(1e-12))

    def distance(self, features: Tensor) -> Tensor:
        """Over the reach, with shape (B,)."""
        left = features - self.middle
        return ((left @ self.precision) * left).sum(1).clamp_min(0).sqrt() / self.reach


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
        wrong = log_l.isnan() | (log_l == math.inf)
        if bool(wrong.any()):
            raise ValueError(
                f"the log-likelihood of {int(wrong.sum())} of {n} draws is {float(log_l[wrong][0]):g} (first: theta = "
                f"{theta[wrong][0].tolist()}); expected a number, or -inf where data cannot be"
            )
        log_w = log_l - self._ratio(u)
        if not bool((log_w > -math.inf).any()):
            raise ValueError(f"the log-likelihood of all {n} draws is -inf")
        # draws that the likelihood forbids count as almost nothing
        return Weighted(theta, log_w, evidence(log_w.clamp_min(float(log_w.max()) - NOTHING)))

    def strangeness(self) -> float:
        """Distance of the data's features from those of simulations, over that within which 99 of 100 of these lie.

        Above 1 the data are stranger than all but one in a hundred simulations; far above, the estimate means nothing. Of
        several members the median.
        """
        e = self.estimator
        each = [
            u.distance(m.many_features(self.x)) for u, m in zip(e.usual, e.members, strict=True)
        ]
        return float(torch.cat(each).median())

    @torch.no_grad()
    def _draw(self, n: int, seed: int) -> Tensor:
        e = self.estimator
        which = torch.multinomial(e.weights, n, replacement=True, generator=stream(seed))
        counts = which.bincount(minlength=e.size).tolist()
        parts = [
            m.sample(k, self.x, integer(seed, 2, i))[:, 0]
            for i, (m, k) in enumerate(zip(e.members, counts, strict=True))
            if k
        ]
        return torch.cat(parts)[torch.randperm(n, generator=stream(seed, 1))]

    @torch.no_grad()
    def _ratio(self, u: Tensor) -> Tensor:
        """log q(u | x) - log N(u; 0, 1), with shape (B,)."""
        e, each = self.estimator, []
        for m in e.members:
            f = m.features(self.x)
            parts = u.float().split(10 * ROWS)
            each.append(torch.cat([m.flow(f.expand(len(v), -1)).log_prob(v) for v in parts]))
        log_q = torch.stack(each).double() + e.weights.log()[:, None]
        return torch.logsumexp(log_q, 0) + 0.5 * (u.square() + LOG_TWO_PI).sum(1)


def stacked(log_q: Tensor) -> Tensor:
    """Weights under which a mixture makes pairs likeliest, with shape (M,), for log q of its members, with shape (M, n)."""
    w = log_q.new_full((len(log_q),), 1 / len(log_q))
    for _ in range(STEPS):
        w = torch.softmax(log_q + w.log()[:, None], 0).mean(1).clamp_min(1e-12)
        w = w / w.sum()
    return w
