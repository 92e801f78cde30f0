"""What estimators of scalar parameters have in common: pairs are fitted by an ensemble, one observation gives a posterior.

    estimator = si.NPE(prior).fit(theta, x, seed=0)
    draws = estimator.condition(x_observed).sample(1000, seed=1)

Several members make a mixture, log sum_m w_m exp(score_m), whose weights make the loss of held-out pairs least: stacking.
Yao, Vehtari, Simpson & Gelman, Using Stacking to Average Bayesian Predictive Distributions (2018, arXiv:1704.02030).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreinv.npe.conditioned import Estimated
from scoreinv.npe.data import (
    ALONE,
    INVALID,
    Inputs,
    Standardise,
    count,
    mapped,
    masked,
    named,
    usable,
    whole,
)
from scoreinv.npe.featurizers import Data, Named, featurizer_for
from scoreinv.npe.fitting import Fitting, Pairs, fit, scores
from scoreinv.npe.members import Member
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import integer, seeded, stream
from scoreinv.tensors import as_tensor

FORMAT = 3  # of the files of an estimator
FEWEST = 50  # pairs that are worth a fit
HELD_OUT = 10  # pairs, at least
MEASURED = 10_000  # pairs that set units and usual features
ITERATIONS = 100  # of the search for the weights


class Estimator(ABC):
    """An ensemble that is fitted to pairs of parameters and data.

    Args:
        prior: Of the parameters.
        featurizer: A function of no argument that makes one; one that suits the data's shape if not given.
        members: Of the ensemble.
        invalid: What to do with numbers that are not finite, see `NPE`.

    Attributes:
        members: Networks, after `fit`.
        weights: Of the members, with shape (M,).
        history: Of each member's fit.
        dropped: Pairs that were left out.
    """

    name: ClassVar[str]
    given: ClassVar[type[Estimated]]  # what `condition` makes
    posterior: ClassVar[bool] = False  # whether the prior is learned along with the rest

    def __init__(
        self,
        prior: ParameterPrior,
        featurizer: Callable[[], nn.Module] | None,
        members: int,
        invalid: str,
    ) -> None:
        if members < 1:
            raise ValueError(f"members is {members}, expected at least 1")
        if invalid not in INVALID:
            raise ValueError(f"invalid is {invalid!r}, expected one of {', '.join(INVALID)}")
        if isinstance(featurizer, nn.Module):
            raise ValueError(
                "featurizer is a module, expected a function that makes one, for each member its own: lambda: ..."
            )
        self.prior, self.featurizer, self.invalid = prior, featurizer, invalid
        self.size, self.members, self.dropped = members, nn.ModuleList(), 0
        self.weights = torch.full((members,), 1 / members, dtype=torch.float64)
        self.shapes: dict[str, list[int]] = {}
        self.history: list[list[dict[str, float]]] = []
        self.usual: list[Usual] = []

    @property
    @abstractmethod
    def options(self) -> dict:
        """What it is made with, beside the prior, the size and the featurizer; values of JSON."""

    @abstractmethod
    def new(self, units: dict[str, Standardise]) -> Member:
        """A member that has not been fitted."""

    def fit(
        self,
        theta: Tensor,
        x: Data,
        seed: int,
        plan: Fitting | None = None,
        validation: float = 0.1,
        noise: Callable[[Data, torch.Generator], Data] | None = None,
        pair_weights: Tensor | None = None,
        device: str = "cpu",
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Self:
        """Learn from pairs; returns itself.

        Args:
            theta: With shape (n, d), drawn from the prior, but for `pair_weights`, or a likelihood that is learned.
            x: Data of each, with shape (n, ...), or several by name.
            seed: Decides everything random.
            plan: How long and how fast.
            validation: Share of the pairs that are held out, which stop the fit and weigh the members.
            noise: Makes data of stored ones, anew in every epoch: of a batch like x, and a generator, one like it. What it
                makes must be finite, unless `invalid` is mask: no pair is dropped from a batch.
            pair_weights: Prior over what theta was drawn from, up to a factor, with shape (n,).
            device: Where the networks are fitted; data stay where they are, but for a batch.
            progress: Show a progress bar.
            checkpoint: Folder in which the state of the fit is kept, from which the same call goes on.

        Raises:
            ValueError: Lengths that differ, too few pairs, parameters outside of the prior, features that never change,
                numbers that are not finite where `invalid` does not allow them.
        """
        theta, inputs = as_tensor(theta), named(x)
        if pair_weights is not None:
            pair_weights = as_tensor(pair_weights)
        if theta.ndim != 2:
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, expected (n, {len(self.prior)})"
            )
        if len(theta) != count(inputs):
            raise ValueError(f"{len(theta)} parameters and {count(inputs)} data, expected as many")
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation:g}, expected between 0 and 1")
        if pair_weights is not None and tuple(pair_weights.shape) != (len(theta),):
            raise ValueError(
                f"pair_weights has shape {tuple(pair_weights.shape)}, expected ({len(theta)},)"
            )
        if pair_weights is not None and not self.posterior:
            raise ValueError(
                f"pair_weights are for NPE, not for {type(self).__name__}, which learns no prior; leave them out"
            )
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {device!r} is not there ({error}); expected cpu, or cuda where there is one"
            ) from None
        w = torch.ones(len(theta)) if pair_weights is None else pair_weights
        theta, inputs, kept = usable(theta, inputs, self.invalid)
        self.dropped = int((~kept).sum())
        if self.dropped and not self.posterior:
            raise ValueError(
                f"{self.dropped} simulations are not finite; without them {type(self).__name__} would not know how often "
                "that is so for each theta: take NPE, or a prior without such theta"
            )
        if len(theta) < FEWEST:
            raise ValueError(f"{len(theta)} pairs, expected at least {FEWEST}, better thousands")
        u, w = self.prior.to_normal(theta), w[kept].double()
        if not bool((w >= 0).all() & (w.sum() > 0) & w.isfinite().all()):
            raise ValueError("pair_weights are negative or not finite, or all are 0")
        w = (w / w.mean()).float()
        held_out = torch.zeros(len(u), dtype=torch.bool)
        share = max(HELD_OUT, round(validation * len(u)))
        if len(u) - share < FEWEST // 2:
            raise ValueError(
                f"validation is {validation:g}, which leaves {len(u) - share} of {len(u)} pairs to learn from, expected "
                f"{FEWEST // 2} or more; 0.1 is usual"
            )
        held_out[torch.randperm(len(u), generator=stream(seed))[:share]] = True
        self.alone = not isinstance(x, Mapping)

        def fresh(some: Inputs, generator: torch.Generator) -> Inputs:
            if noise is not None:
                some = named(noise(some[ALONE] if self.alone else some, generator))
                some = whole(some, self.invalid)
            return mapped(some, masked) if self.invalid == "mask" else some

        # what units and usual features are of
        some = (~held_out).nonzero().flatten()[:MEASURED]
        seen = fresh(mapped(inputs, lambda v: v[some]), stream(seed, 3))
        self.shapes = {name: list(v.shape[1:]) for name, v in seen.items()}
        members = nn.ModuleList([self._new(integer(seed, 5, i)) for i in range(self.size)])
        for name, v in seen.items():
            members[0].units[name].measure(v, name)
        # a member is the same in an ensemble of any size
        history, about = [], {k: v for k, v in self._card.items() if k != "members"}
        for i, member in enumerate(members):
            member.units.load_state_dict(members[0].units.state_dict())
            state = None if checkpoint is None else Path(checkpoint) / f"member-{i}.pt"
            own = integer(seed, 6, i)
            pairs = Pairs(u, inputs, w, held_out, fresh)
            history.append(
                fit(member, pairs, plan or Fitting(), own, device, progress, state, about)
            )
        x_held = fresh(mapped(inputs, lambda v: v[held_out]), stream(seed, 7))
        if self.size > 1:
            own = integer(seed, 8)
            each = torch.stack([scores(m, u[held_out], x_held, own) for m in members])
            self.weights = stacked(each, members[0].criterion, w[held_out].double())
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
        return self.given(self, mapped(one, masked) if self.invalid == "mask" else one)

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
        save_file(tensors, folder / "estimator.safetensors")
        learned = {"shapes": self.shapes, "history": self.history, "dropped": self.dropped}
        card = {**self._card, **learned, "alone": self.alone}
        (folder / "estimator.json").write_text(json.dumps(card, indent=1) + "\n")

    def load(self, folder: str | Path) -> Self:
        """Take up what an estimator like this one has kept in a folder; returns itself.

        Raises:
            ValueError: Another format, other parameters, another flow, other sizes, a broken file.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "estimator.json").read_text())
            tensors = load_file(folder / "estimator.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no estimator that can be read: {error}") from error
        other = [k for k, v in self._card.items() if card.get(k) != v]
        if other:
            seen = ", ".join(f"{k} {card.get(k)!r}" for k in other)
            expected = ", ".join(f"{k} {self._card[k]!r}" for k in other)
            raise ValueError(
                f"{folder} holds an estimator of {seen}, expected {expected}; load it as it was made, or fit anew"
            )
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
            "kind": self.name,
            "parameters": self.prior.card,
            **self.options,
            "members": self.size,
            "invalid": self.invalid,
        }

    def _masks(self, shape: Sequence[int]) -> int:
        """How many channels of data of this shape are masks."""
        return shape[0] // 2 if self.invalid == "mask" else 0

    def mixed(self, log_ratios: Sequence[Tensor]) -> Tensor:
        """log r of the ensemble, with shape (B,), in float64, for that of each member."""
        each = torch.stack(list(log_ratios)).double()
        return torch.logsumexp(each + self.weights.log()[:, None], 0)

    def new_featurizer(self) -> nn.Module:
        """One that was asked for, or suits the data.

        Raises:
            ValueError: One that does not say how many features it makes.
        """
        featurizer = self.featurizer() if self.featurizer else self._suited()
        if not isinstance(getattr(featurizer, "features", None), int):
            raise ValueError(
                f"the featurizer, a {type(featurizer).__name__}, does not say how many features it makes; give it an "
                "attribute `features`"
            )
        return featurizer

    def _new(self, seed: int) -> Member:
        with seeded(seed):
            units = {k: Standardise(shape, self._masks(shape)) for k, shape in self.shapes.items()}
            return self.new(units)

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


def stacked(scores: Tensor, criterion: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """Weights under which a mixture has the least loss of pairs, with shape (M,).

    Args:
        scores: Of the members, with shape (M, n, ...).
        criterion: Loss of each pair, with shape (n,), for scores with shape (n, ...).
        w: Weights of the pairs, with shape (n,).
    """
    logits = torch.zeros(len(scores), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    shaped = lambda v: v.reshape(-1, *[1] * (scores.ndim - 1))

    def loss() -> Tensor:
        search.zero_grad()
        mixed = torch.logsumexp(scores + shaped(torch.log_softmax(logits, 0)), 0)
        found = (w * criterion(mixed)).mean()
        found.backward()
        return found

    with torch.enable_grad():
        search.step(loss)
    return torch.softmax(logits.detach(), 0)
