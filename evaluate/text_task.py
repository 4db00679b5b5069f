"""Text as an lm-eval task: a causal model's perplexity on it, a masked one's pseudo-perplexity."""

from collections.abc import Callable, Sequence

from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import PerplexityTask


class TextTask(PerplexityTask):
    """Documents whose log-likelihood is asked for, one metric: exp of the mean loss of a token."""

    VERSION = 1

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        count_tokens: Callable[[str], int],
        metric: str,
    ) -> None:
        """`count_tokens` says over how many tokens a text's log-likelihood is a sum; texts of none
        are left out.

        Raises ValueError where there is no token in any.
        """
        self.num_tokens = {text: count for text in texts if (count := count_tokens(text))}
        self.texts = [text for text in texts if text in self.num_tokens]
        if not self.texts:
            raise ValueError(f"{name}: there is no text in it")
        self.metric = metric
        super().__init__(config={"task": name, "num_fewshot": 0, "metadata": {"version": 1}})

    def download(self, *_, **__) -> None:
        """The documents are here already."""

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[str]:
        return self.texts

    def process_results(self, doc: str, results: tuple[float]) -> dict[str, tuple[float, int]]:
        (log_likelihood,) = results
        return {self.metric: (log_likelihood, self.num_tokens[doc])}

    def aggregation(self) -> dict[str, Callable]:
        return {self.metric: weighted_perplexity}

    def higher_is_better(self) -> dict[str, bool]:
        return {self.metric: False}
