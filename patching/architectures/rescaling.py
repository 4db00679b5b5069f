"""The arithmetic of a rescaled tensor."""

from typing import NamedTuple

from torch import Tensor


class Rescaling(NamedTuple):
    """A change of one tensor: factor * (value + offset) - offset.

    The offset is for norms that multiply by 1 + weight.
    """

    factor: float
    offset: float = 0.0

    def of(self, tensor: Tensor) -> Tensor:
        """Return a new tensor of the same dtype, computed in at least fp32 and rounded once."""
        wide = tensor if tensor.dtype.itemsize > 4 else tensor.float()
        if self.offset:
            return ((wide + self.offset) * self.factor - self.offset).to(tensor.dtype)
        return (wide * self.factor).to(tensor.dtype)
