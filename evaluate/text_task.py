"""Text as an lm-eval task: a causal model's perplexity on it, a masked one's pseudo-perplexity."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.pseudo_perplexity import METRIC, encode, stderr_of_perplexity, what_was_cut
from patching.architectures.models import predicts_masked_tokens
from patching.files.texts import load_documents


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
    """The documents that the flags name, empty ones left out; no more than a limit asks for, unless
    it is a share of them (below 1), which lm-eval takes.

    Raises ValueError or OSError where there are none.
    """
    documents = load_documents(
        arguments.dataset,
        text_column=arguments.text_column,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
    )
    texts: list[str] = []
    for document in documents:
        if document["text"] and document["text"].strip():
            texts.append(document["text"].strip())
        if limit is not None and limit >= 1 and len(texts) == int(limit):
            break
    if not texts:
        raise ValueError(f"dataset={arguments.dataset}: there is no text in it")
    return texts


def task_of_texts(
    name: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> ConfigurableTask:
    """Perplexity of a causal model, pseudo-perplexity of a masked one; says where texts are cut."""
    if not predicts_masked_tokens(config):
        ids = tokenizer(list(texts), verbose=False)["input_ids"]  # as the harness does
        return text_task(name, texts, map(len, ids), "perplexity")
    encoded = encode(texts, tokenizer, config)
    is_first_rank = os.environ.get("RANK", "0") == "0"
    if is_first_rank and (line := what_was_cut(encoded)):
        print(f"{name}: {line}")
    return text_task(name, texts, (len(text.positions) for text in encoded), METRIC)


def text_task(
    name: str, texts: Sequence[str], num_tokens: Iterable[int], metric: str
) -> ConfigurableTask:
    """A task that asks for each text's log-likelihood, with exp of the mean loss of a token as its
    metric, and its standard error over texts.

    `num_tokens` says over how many tokens a text's log-likelihood is a sum; texts of none are left
    out. Raises ValueError where there is no token in any.
    """
    documents = [
        {"text": text, "num_tokens": count} for text, count in zip(texts, num_tokens) if count
    ]
    if not documents:
        raise ValueError(f"{name}: there is no text in it")

    aggregations = {metric: weighted_perplexity, f"{metric}_stderr": stderr_of_perplexity}

    def process_results(doc: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
        # The harness has no error of its own for such a mean, and this key stands where it would.
        return dict.fromkeys(aggregations, (results[0], doc["num_tokens"]))

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has advice for task files
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["text"],
            "process_results": process_results,
            "metric_list": [
                {"metric": name, "aggregation": aggregation, "higher_is_better": False}
                for name, aggregation in aggregations.items()
            ],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )
