"""A sweep on real English: WikiText-2 and BLiMP as local tasks, for a pair trained on WikiText-2.

The data comes from the folder in the environment variable BOOMERANG_DATA. It is not part of the
project.
"""

import json
import os
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from local_tasks import ROLLING, flags, write_task
from transformers import Qwen3Config, Qwen3ForCausalLM

from evaluate.evaluate import main as evaluate
from evaluate.result import read_results
from examples.smollm2.tasks import ARTICLE, BLIMP_PAIR
from examples.stdlib.corpus import Module
from examples.stdlib.train_teacher import shuffled_rows, tokenize, train_tokenizer
from examples.stdlib.training import next_token_loss
from examples.stdlib.training import train as train_teacher
from train.train import main as train

STEPS = 480


@pytest.fixture(scope="module")
def data() -> Path:
    if not os.environ.get("BOOMERANG_DATA"):
        pytest.skip("BOOMERANG_DATA is not set to a folder with WikiText-2 and BLiMP")
    return Path(os.environ["BOOMERANG_DATA"])


def articles(path: Path) -> list[str]:
    return [text for text in ARTICLE.split(path.read_text(encoding="utf-8")) if text.strip()]


@pytest.fixture(scope="module")
def english_pair(data, tmp_path_factory) -> tuple[Path, Path]:
    """An 8-layer teacher of WikiText-2's validation text, and its student of 5 layers."""
    folder = tmp_path_factory.mktemp("english")
    texts = articles(data / "wikitext-2" / "valid.txt")
    modules = [Module(str(i), text) for i, text in enumerate(texts)]
    tokenizer = train_tokenizer(modules, vocab_size=2048)
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    rows_RT = shuffled_rows(tokenize(modules, tokenizer), torch.Generator().manual_seed(0))
    rows_RT = rows_RT.view(-1, 128)
    rows_RT = rows_RT[: len(rows_RT) // 16 * 16]  # batches of one shape, compiled once
    batches = cycle((batch_BT,) for batch_BT in rows_RT.split(16))
    train_teacher(
        teacher,
        next_token_loss,
        batches,
        steps=STEPS,
        warmup_steps=8,
        muon_lr=0.02,
        adam_lr=4e-3,
    )
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    text = folder / "train.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train(
        [
            *("--teacher_model_name_or_path", str(folder / "teacher"), "--dataset", str(text)),
            *("--save_directory", str(folder / "student"), "--max_length", "128"),
            *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"),
            *("--max_steps", "60", "--learning_rate", "5e-4", "--cosine_loss_weight", "10"),
            *("--heldout_documents", "0", "--eval_strategy", "no", "--save_strategy", "no"),
            *("--measure_order", "False"),
        ]
    )
    return folder / "teacher", folder / "student"


def write_tasks(data: Path, folder: Path) -> None:
    """WikiText-2's test articles, and BLiMP's paradigms as one group."""
    documents = [{"text": text[:2000]} for text in articles(data / "wikitext-2" / "test.txt")[:20]]
    write_task(folder, "wikitext_2", documents, **ROLLING)
    names = []
    for path in sorted((data / "blimp").glob("*.jsonl")):
        pairs = [json.loads(line) for line in path.read_text().splitlines()[:100]]
        kept = [{key: pair[key] for key in ("sentence_good", "sentence_bad")} for pair in pairs]
        names.append(f"blimp_{path.stem}")
        write_task(folder, names[-1], kept, **BLIMP_PAIR)
    group = {
        "group": "blimp_local",
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "metadata": {"version": 1.0},
    }
    (folder / "blimp_local.yaml").write_text(yaml.safe_dump(group))


@pytest.mark.slow
def test_a_family_of_real_english(data, english_pair, tmp_path):
    (tmp_path / "tasks").mkdir()
    write_tasks(data, tmp_path / "tasks")
    out = tmp_path / "out"
    evaluate(
        flags(
            english_pair, out, num_layers_to_patch="all", tasks="wikitext_2,blimp_local",
            include_path=tmp_path / "tasks", baselines="naive,block_influence",
            calibration=data / "wikitext-2" / "valid.txt", eval_batch_size=16,
        )
    )  # fmt: skip
    results = read_results(out)
    bits = {
        name: result.results["wikitext_2"]["bits_per_byte,none"] for name, result in results.items()
    }
    k_max = results["family_k0"].max_layers_to_patch
    assert bits[f"family_k{k_max}"] < bits["family_k0"]
    for k in range(k_max):
        assert bits[f"family_k{k}"] < bits[f"naive_k{k}"]
    teacher = results[f"family_k{k_max}"]
    paradigms = [
        values["acc,none"]
        for task, values in teacher.results.items()
        if task.startswith("blimp_") and task != "blimp_local"
    ]
    assert len(paradigms) == 8
    assert teacher.results["blimp_local"]["acc,none"] == pytest.approx(sum(paradigms) / 8)
    report = (out / "summary.md").read_text()
    assert "\n| wikitext_2 | bits_per_byte ↓ | 0 | " in report
    assert "\n| blimp_local | acc ↑ | 0 | " in report
    assert "classification ↑ | perplexity (bits_per_byte) ↓ |" in report
