"""`SMC` with one part taken out, for the table: what each part is worth."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian import dot
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Descent, Island, Request
from scoreinv.samplers.smc import FINER, SMC, Weighted


@dataclass(frozen=True)
class Ablated(SMC):
    """`SMC` without one part.

    Args:
        without: What is taken out.

            - "local covariance": the global one stays in kernel and twist.
            - "finer steps": one step from a level to the next.
            - "skipping": always the finer steps.
            - "network's twist": particles are resampled by the likelihood of m_s(x) under the global covariance, before what
              the denoised image says beyond it counts; so the local covariance is out, too.
            - "spare particles": one for each draw.
    """

    without: str = "local covariance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.without not in PARTS:
            raise ValueError(f"without is {self.without!r}, expected one of {', '.join(PARTS)}")
        if self.without == "spare particles":
            object.__setattr__(self, "particles", 1)

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        kind = PARTS[self.without]
        return kind(
            posterior, self._path(posterior), n, generator, self._stride, self.resample_below
        )

    @property
    def _stride(self) -> int:
        return 1 if self.without == "finer steps" else FINER

    def _path(self, posterior: Posterior) -> list[float]:
        path = super()._path(posterior)
        return path[::FINER] if self.without == "finer steps" else path


class OneCovariance(Weighted):
    """The covariance of the moments throughout."""

    def _weigh(self, foreseen: Tensor, measure: bool) -> Generator[Request, Tensor, Tensor]:
        return (yield from super()._weigh(foreseen, measure=False))


class Unskipping(Weighted):
    """Never takes several levels in one step."""

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        self.news = float("inf")
        return (yield from super()._step(i))


class Behind(OneCovariance):
    """What the denoised image says beyond m_s(x) counts one step later."""

    _pending: Tensor | None = None

    def _weigh(self, foreseen: Tensor, measure: bool) -> Generator[Request, Tensor, Tensor]:
        due = 0.0 if self._pending is None else self._pending
        log_w = yield from super()._weigh(foreseen, measure)
        shift, expected = self.level.conditioned.shift, self.level.expected(self.x)
        beyond = self.level.precision.apply(self.denoised - expected)
        self._pending = 0.5 * dot(beyond, shift(self.denoised) + shift(expected))
        self.log_w += due - self._pending
        return log_w + due - self._pending

    def _keep(self, kept: Tensor) -> None:
        super()._keep(kept)
        self._pending = self._pending[kept]

    def _end(self) -> Descent:
        self.log_w += self._pending
        yield from super()._end()


PARTS: dict[str, type[Weighted]] = {
    "local covariance": OneCovariance,
    "finer steps": Weighted,
    "skipping": Unskipping,
    "network's twist": Behind,
    "spare particles": Weighted,
}
