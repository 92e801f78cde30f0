"""The symmetries of a square, one at random for each image of a batch.

A network that saw images in all orientations knows that none is special, up to its errors: its upsampling treats the four
pixels of a square of two by two each in a way of its own, which leaves a grid on blank sky. Turned at random before every
step, such errors differ from one noise level to the next, and average out on the way. Where there are data, images are
turned back after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLIPPED, UPSIDE_DOWN, TRANSPOSED = 1, 2, 4


class Turns:
    """Flips and rotations of the images of a batch.

    Args:
        which: Of the eight for each image, with shape (B,); 0 leaves it as it is. None leaves all.
    """

    def __init__(self, which: Tensor | None) -> None:
        self.which = which

    def there(self, x: Tensor) -> Tensor:
        """Turned images, with the shape of x, (B, ..., H, W)."""
        if self.which is None:
            return x
        turned = torch.empty_like(x)
        for k in self.which.unique().tolist():
            v = x[self.which == k]
            v = v.mT if k & TRANSPOSED else v
            turned[self.which == k] = v.flip(_flipped(k))
        return turned

    def back(self, x: Tensor) -> Tensor:
        """Undo `there`."""
        if self.which is None:
            return x
        found = torch.empty_like(x)
        for k in self.which.unique().tolist():
            v = x[self.which == k].flip(_flipped(k))
            found[self.which == k] = v.mT if k & TRANSPOSED else v
        return found


def _flipped(k: int) -> list[int]:
    return [axis for axis, bit in ((-1, FLIPPED), (-2, UPSIDE_DOWN)) if k & bit]
