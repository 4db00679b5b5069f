"""Compare the family with the pruned teacher where both are rescaled.

Where a patched model passes between student and teacher layers, the family has factors of its own
(matched scale). Here the pruned teacher gets the same help: a factor at each gap in its layers, a
power of the median by which the stream grows over the missing layers, chosen by KL from the teacher
on the text that the family's factors were chosen on.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.studies.scale.pruned import baseline_scores
from examples.studies.scale.scores import Scorer, Variant, text_sizes
from patching.family import Family
from patching.files.outputs import write_json, write_text
from patching.running.calibration import Calibration

COLUMNS = {
    ("family", "plain"): "family",
    ("family", "matched"): "family, rescaled",
    ("naive", "plain"): "naively pruned",
    ("naive", "matched"): "naively pruned, rescaled",
    ("block influence", "plain"): "pruned by block influence",
    ("block influence", "matched"): "pruned by block influence, rescaled",
}


def write_pruned(
    parents: Sequence[Path], order: Path, calibration: Calibration, held_out: Calibration, to: Path
) -> None:
    """Write the table to `to/pruned.md` and all figures to `to/pruned.json`, unless they are there.
    `parents` are the teacher and the student.
    """
    if (to / "pruned.json").is_file():
        print(f"{to / 'pruned.json'} is already there")
        return
    plain, matched = (
        Family.from_pretrained(*parents, order, match_scale=match_scale, dtype="float32")
        for match_scale in (False, True)
    )
    batches = held_out.batches(plain.tokenizer, plain.configs["teacher"])
    scorer, sizes = Scorer(plain, batches), range(plain.max_layers_to_patch)
    found = baseline_scores(plain, calibration, held_out)
    found["baselines"]["family"] = [
        {
            name: scorer.of(Variant(family.recipe(k)))._asdict()
            for name, family in (("plain", plain), ("matched", matched))
        }
        for k in sizes
    ]
    found["text"] = text_sizes(plain, batches)
    layers = [plain.recipe(k).depth for k in sizes]
    write_text(to / "pruned.md", _page(found, layers))
    write_json(to / "pruned.json", found)


def _page(found: dict[str, Any], layers: Sequence[int]) -> str:
    rows = [["layers", *COLUMNS.values()], ["---:"] * (1 + len(COLUMNS))]
    for k, depth in enumerate(layers):
        scores = [found["baselines"][name][k][how] for name, how in COLUMNS]
        rows.append([str(depth), *(f"{_bits_per_byte(found, score):.4f}" for score in scores)])
    whole = f"{_bits_per_byte(found, found['teacher']):.4f}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "# The family and the pruned teacher, each as it is and rescaled\n\n"
        f"Bits per byte of {len(found['text']['bytes'])} held-out texts of at most "
        f"{max(found['text']['tokens'])} tokens, in fp32. The teacher has {whole}.\n\n{table}\n"
    )


def _bits_per_byte(found: dict[str, Any], score: dict[str, Any]) -> float:
    return sum(score["cross_entropy"]) / math.log(2) / sum(found["text"]["bytes"])
