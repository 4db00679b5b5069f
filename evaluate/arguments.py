"""The flags of `evaluate.evaluate`. Nothing here imports torch, transformers' models or lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from evaluate.baselines import BASELINES
from patching.arguments import DTYPES, CalibrationArguments, MeasuringArguments

PAPER_SUITE = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "race",
    "mmlu",
    "rte",
    "wikitext",
    "gsm8k_cot",
    "ifeval",
    "hendrycks_math",
)
"""The suite of arXiv 2510.05064: classification, perplexity and generation."""


@dataclass
class TextArguments:
    """Flags that name text to evaluate on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "text to measure the (pseudo-)perplexity on: a .txt, .jsonl or .parquet file, "
            "a folder of such files, or a hub dataset. In .txt files blank lines separate documents"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset"}
    )
    dataset_split: str = field(default="test", metadata={"help": "split of a hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})

    @property
    def text_name(self) -> str | None:
        """The name of the text in results."""
        if self.dataset is None:
            return None
        return "_".join(filter(None, (Path(self.dataset).stem, self.dataset_config)))

    def read_texts(self, limit: float | None) -> list[str]:
        """The documents these flags name, without empty ones.

        A `limit` of 1 or more is their number. One below 1 is a share, which lm-eval takes itself.
        Raises ValueError or OSError if there are none.
        """
        from patching.files.texts import load_documents

        documents = load_documents(
            self.dataset,
            text_column=self.text_column,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
        )
        with_text = (d["text"].strip() for d in documents if d["text"] and d["text"].strip())
        texts = list(islice(with_text, int(limit) if limit is not None and limit >= 1 else None))
        if not texts:
            raise ValueError(f"dataset={self.dataset}: there is no text in it")
        return texts


@dataclass
class EvaluationArguments(TextArguments, CalibrationArguments, MeasuringArguments):
    """Flags of `evaluate.evaluate`. Raises ValueError naming every flag with an unusable value."""

    save_directory: Path = field(kw_only=True, metadata={"help": "folder for results"})
    num_layers_to_patch: str = field(
        default="all", metadata={"help": "sizes to evaluate: 4, or 1,3,5, or 0-5, or all"}
    )
    baselines: str | None = field(
        default=None,
        metadata={
            "help": "baselines to evaluate at each size, separated by commas: "
            + ", ".join(f"{name} ({row.description})" for name, row in BASELINES.items())
        },
    )
    random_student: str | None = field(
        default=None,
        metadata={
            "help": "a second student of the same teacher, such as one distilled from random "
            "weights, whose family is evaluated too"
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "another model, or a folder of models, to evaluate alongside the family; "
            "repeatable",
            "action": "extend",
        },
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks, separated by commas (by default the paper's suite, or none "
            "with --dataset)"
        },
    )
    include_path: str | None = field(
        default=None, metadata={"help": "folder with your own task files"}
    )
    limit: float | None = field(
        default=None, metadata={"help": "documents per task; below 1, the share of each task"}
    )
    num_fewshot: int | None = field(
        default=None,
        metadata={"help": "examples in the prompt (by default each task's own number)"},
    )
    seed: str = field(
        default="0,1234,1234,1234",
        metadata={
            "help": "seeds of Python, NumPy, torch and the choice of examples in prompts: one for "
            "all or four, separated by commas, None to leave one out"
        },
    )
    log_samples: bool = field(
        default=False, metadata={"help": "also write each document with its answers and scores"}
    )
    eval_batch_size: str = field(default="4", metadata={"help": "rows per forward pass, or auto"})
    dtype: str = field(
        default="bfloat16", metadata={"help": "dtype of the weights", "choices": DTYPES}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        reasons = [BASELINES[n].needs_text for n in self.baseline_names if n in BASELINES]
        if self.searches_order:
            reasons.append(f"--order {self.order} is measured on text")
        problems = self.check_calibration(next(filter(None, reasons), None))
        if self.limit is not None and self.limit <= 0:
            problems.append(f"limit={self.limit}: choose a number above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot={self.num_fewshot}: choose 0 or more")
        batch_size = self.eval_batch_size
        if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
            problems.append(f"eval_batch_size={batch_size}: choose 1 or more, or auto")
        try:
            _ = self.seeds
        except ValueError:
            problems.append(f"seed={self.seed}: choose one number or four, such as 0,None,8,52")
        if set(self.baseline_names) - set(BASELINES):
            problems.append(f"baselines={self.baselines}: choose from {', '.join(BASELINES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def baseline_names(self) -> list[str]:
        return split_names(self.baselines or "")

    @property
    def task_names(self) -> list[str]:
        if self.tasks is None:
            return [] if self.dataset else list(PAPER_SUITE)
        return split_names(self.tasks)

    @property
    def seeds(self) -> list[int | None]:
        """Four seeds, as lm-eval reads them. Raises ValueError for another number of them."""
        values = [None if part.strip() == "None" else int(part) for part in self.seed.split(",")]
        if len(values) not in (1, 4):
            raise ValueError(f"seed={self.seed}")
        return values * (4 // len(values))

    @property
    def batch_size(self) -> int | str:
        return self.eval_batch_size if self.eval_batch_size == "auto" else int(self.eval_batch_size)


def split_names(text: str) -> list[str]:
    """Names separated by commas, without repetition."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
