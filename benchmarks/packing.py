"""Useful tokens per second with packed rows, whose documents see each other, or do not by a mask or
by attention document after document, against one padded document per row.

All sides take turns training the demo's student on the demo's corpus, the source of Python's
standard library, for the same number of micro-batches.

    python -m benchmarks.packing
"""

import argparse
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ratios import ratio_of_pairs
from examples.stdlib.corpus import write_corpus
from patching.blocks import LayerMap, default_kept_layers
from patching.running.varlen import VARLEN
from train.batches import collate
from train.data import load_rows
from train.data_args import DataArguments
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count
from train.student import new_student

TEACHER = Path(__file__).parents[1] / "examples" / "stdlib" / "teacher"
SIDES = {
    "documents": ("documents", "sdpa"),
    "varlen": ("documents", VARLEN),
    "cross": ("cross", "sdpa"),
    "padded": ("False", "sdpa"),
}
"""Values of `--packing` and `--attn_implementation`, by the names of the sides."""
WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.1, cosine=2.0, temperature=1.0)


def main(max_length: int, batch_size: int, num_batches: int, repeats: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16)
    num_layers = teacher.config.num_hidden_layers
    layer_map = LayerMap(default_kept_layers(num_layers, 2, 1, 2), num_layers)
    student = new_student(teacher, layer_map).train()
    install_distillation_forward(student, teacher, layer_map, WEIGHTS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        rows = {
            name: load_rows(
                DataArguments(
                    dataset=str(Path(folder) / "train.jsonl"),
                    max_length=max_length,
                    packing=packing,
                    heldout_documents=0,
                ),
                tokenizer,
                seed=0,
            ).train.shuffle(seed=0)
            for name, (packing, _) in SIDES.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in rows}
        padding = {}
        for repeat in range(repeats + 1):
            for name, side in rows.items():
                for model in (student, teacher):
                    model.config._attn_implementation = SIDES[name][1]
                useful, slots, start = 0, 0, time.perf_counter()
                for first in range(0, batch_size * num_batches, batch_size):
                    indices = [i % len(side) for i in range(first, first + batch_size)]
                    batch = collate([side[i] for i in indices])
                    counts = count(batch["labels"])
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = student(**batch, counts=counts).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    useful += int(counts.positions)
                    slots += batch["labels"].numel()
                if repeat:  # the first round warms up
                    rates[name].append(useful / (time.perf_counter() - start))
                padding[name] = 1 - useful / slots
        tokens = {name: sum(map(len, side["input_ids"])) for name, side in rows.items()}
    for name, values in rates.items():
        print(
            f"{name}: {statistics.median(values):,.0f} useful tokens/s, padding "
            f"{padding[name]:.1%}, {tokens[name] / tokens['cross']:.0%} of the text in rows"
        )
    for one, other in product(("documents", "varlen"), ("cross", "padded")):
        ratios = [ours / theirs for ours, theirs in zip(rates[one], rates[other])]
        print(f"{one} against {other}: {ratio_of_pairs(ratios)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))
