"""Text as an lm-eval task: a causal model's perplexity on it, a masked one's pseudo-perplexity."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import PerplexityTask
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.pseudo_perplexity import METRIC, encode, what_was_cut
from patching.auto_class import predicts_masked_tokens
from train.data import load_documents
from train.data_args import DataArguments


@dataclass
class TextArguments:
    """Flags that name text to evaluate on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "text to measure the (pseudo-)perplexity of: a .txt, .jsonl or .parquet file, "
            "a folder of them, or a hub dataset. In .txt files blank lines separate documents"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset"}
    )
    dataset_split: str = field(default="test", metadata={"help": "split of a hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})

    @property
    def text_name(self) -> str | None:
        """What the text is called in results."""
        if self.dataset is None:
            return None
        return "_".join(filter(None, (Path(self.dataset).stem, self.dataset_config)))


def read_texts(arguments: TextArguments, limit: float | None) -> list[str]:
    """The documents that the flags name, empty ones left out, the first ones where there is a
    limit; a limit below 1 is a share of them.

    Raises ValueError or OSError where there are none.
    """
    data = DataArguments(
        dataset=arguments.dataset,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
        text_column=arguments.text_column,
    )
    texts: list[str] = []
    for document in load_documents(data, arguments.dataset):
        if document["text"] and document["text"].strip():
            texts.append(document["text"].strip())
        if limit is not None and limit >= 1 and len(texts) == int(limit):
            break
    if not texts:
        raise ValueError(f"dataset={arguments.dataset}: there is no text in it")
    return texts[: max(1, round(len(texts) * limit))] if limit is not None and limit < 1 else texts


def task_of_texts(
    name: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> "TextTask":
    """Perplexity of a causal model, pseudo-perplexity of a masked one; says where texts are cut."""
    if not predicts_masked_tokens(config):
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return TextTask(name, texts, map(len, ids), "perplexity")
    encoded = encode(texts, tokenizer, config)
    if line := what_was_cut(encoded):
        print(f"{name}: {line}")
    return TextTask(name, texts, (len(text.positions) for text in encoded), METRIC)


class TextTask(PerplexityTask):
    """Documents whose log-likelihood is asked for, one metric: exp of the mean loss of a token."""

    VERSION = 1

    def __init__(
        self, name: str, texts: Sequence[str], num_tokens: Iterable[int], metric: str
    ) -> None:
        """`num_tokens` says over how many tokens a text's log-likelihood is a sum; texts of none
        are left out.

        Raises ValueError where there is no token in any.
        """
        documents = ({"text": text, "num_tokens": n} for text, n in zip(texts, num_tokens))
        self.documents = [document for document in documents if document["num_tokens"]]
        if not self.documents:
            raise ValueError(f"{name}: there is no text in it")
        self.metric = metric
        super().__init__(config={"task": name, "output_type": self.OUTPUT_TYPE, "num_fewshot": 0})

    def download(self, *_, **__) -> None:
        """The documents are here already."""

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self.documents

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return doc["text"]

    def process_results(
        self, doc: dict[str, Any], results: tuple[float]
    ) -> dict[str, tuple[float, int]]:
        (log_likelihood,) = results
        return {self.metric: (log_likelihood, doc["num_tokens"])}

    def aggregation(self) -> dict[str, Callable]:
        return {self.metric: weighted_perplexity}

    def higher_is_better(self) -> dict[str, bool]:
        return {self.metric: False}
