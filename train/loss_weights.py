"""Weights of the loss terms, which flags set. This imports no models, so that --help stays fast."""

from typing import NamedTuple

COSINE_WEIGHT, CHAT_COSINE_WEIGHT = 2.0, 10.0
"""Default weights of the cosine term, without chats and with them."""
TERMS = ("cross_entropy", "kl", "cosine")


class LossWeights(NamedTuple):
    """Weight of each term. A term of weight 0 is not computed."""

    cross_entropy: float
    kl: float
    cosine: float
    temperature: float
    compile_backend: str | None = None
    """Backend of torch.compile that fuses the elementwise passes, None to run them one by one."""

    @property
    def needs_logits(self) -> bool:
        return bool(self.cross_entropy or self.kl)

    @property
    def active_terms(self) -> list[str]:
        return [name for name in TERMS if getattr(self, name)]

    def for_evaluation(self) -> "LossWeights":
        """Return the same weights, with cross entropy and KL switched on if they are off."""
        return self._replace(cross_entropy=self.cross_entropy or 1.0, kl=self.kl or 1.0)
