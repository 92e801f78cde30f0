"""Amplitudes |A x| of a complex measurement, whose phases are lost."""

from __future__ import annotations

from torch import Tensor

from scoreinv.operators.base import LinearOperator, check_shape


class Amplitude:
    """y = |A x|, a measurement that is not linear in x.

    Args:
        inner: A, with complex data.

    Attributes:
        shape: Shape (C, H, W) of the image.
        data_shape: Shape of the data.
        complex: False, amplitudes are real.

    Raises:
        ValueError: A makes real data.
    """

    complex = False

    def __init__(self, inner: LinearOperator) -> None:
        if not inner.complex:
            raise ValueError(
                f"{type(inner).__name__} makes real data; amplitudes are of complex ones, as visibilities are"
            )
        self.inner = inner
        self.shape, self.data_shape = inner.shape, inner.data_shape

    def __call__(self, x: Tensor) -> Tensor:
        """|A x|, with shape (B, *data_shape), for x with shape (B, *shape)."""
        check_shape("image", x, self.shape)
        return self.inner.forward(x).abs()

    def pull(self, x: Tensor, y: Tensor) -> Tensor:
        """The slope of |A x| at x transposed, times y, with shape (B, *shape)."""
        v = self.inner.forward(x.double())
        return self.inner.transpose(y * v / v.abs().clamp_min(1e-300)).to(x.dtype)

    def blurred(self, x: Tensor, roots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|A x|, and the variances along A x and across it of A x_0, where x_0 is known up to a Gaussian error around x.

        Args:
            x: Images, with shape (B, *shape).
            roots: Draws of the error, with shape (P, *shape).

        Returns:
            All with shape (B, *data_shape).
        """
        v, error = self.inner.forward(x), self.inner.forward(roots)
        # moments of the complex error: E|e|^2 and E e^2 say how it lies to the phase of v
        power = error.abs().square().mean(0)
        turn = v.conj() / v.abs().clamp_min(1e-300)
        lean = (error.square().mean(0) * turn.square()).real
        return v.abs(), 0.5 * (power + lean), 0.5 * (power - lean)
