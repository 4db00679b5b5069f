"""`student_config.json`: the file next to a student's weights that says which teacher layers it was
made from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from patching.blocks import LayerMap, Order
from patching.files.json_files import load_json
from patching.files.outputs import write_text
from patching.matched_scale import MatchedScales
from patching.patch_order import order_from_json

FILE_NAME = "student_config.json"

DISTILLED_FROM_12 = LayerMap((0, 2, 4, 7, 9, 11), 12)

KNOWN_STUDENTS = {
    f"{owner}{name}": DISTILLED_FROM_12
    for name in (
        "distilbert-base-cased",
        "distilbert-base-multilingual-cased",
        "distilbert-base-uncased",
        "distilgpt2",
        "distilroberta-base",
    )
    for owner in ("", "distilbert/")
}
"""Layers of public students without a student_config.json, by repository.

They were made with transformers' example `research_projects/distillation`, whose scripts
`scripts/extract_distilbert.py` (BERT) and `scripts/extract.py` (RoBERTa and GPT-2) copy these.
"""


@dataclass(frozen=True)
class StudentConfig:
    """The contents of student_config.json. Published students have only the two lists of layers."""

    layer_map: LayerMap
    patch_order: Order | None = None
    """The order that the student's author recommends, if any."""
    scales: MatchedScales | None = None
    """Factors that were measured for some sizes, if any."""

    def to_dict(self) -> dict[str, object]:
        kept = self.layer_map.kept
        pruned = sorted(set(range(self.layer_map.num_teacher_layers)) - set(kept))
        values: dict[str, object] = {
            "pruned_teacher_layers": pruned,
            "copied_teacher_layers": list(kept),
        }
        if self.patch_order is not None:
            values["patch_order"] = self.patch_order
        if self.scales is not None:
            values["scales"] = self.scales.to_dict()
        return values

    def save(self, folder: Path) -> None:
        write_text(folder / FILE_NAME, json.dumps(self.to_dict(), indent=2) + "\n")


def read_student_config(student_name_or_path: str, revision: str | None = None) -> StudentConfig:
    """Read `student_config.json` from a local folder or a hub repository, or look the student up in
    KNOWN_STUDENTS.

    Raises ValueError if the file is missing or not JSON, if one of the two lists is missing, or if
    the lists do not name every teacher layer exactly once.
    """
    if student_name_or_path in KNOWN_STUDENTS and not Path(student_name_or_path).exists():
        return StudentConfig(KNOWN_STUDENTS[student_name_or_path])
    where = f"{student_name_or_path}/{FILE_NAME}"
    try:
        path = cached_file(student_name_or_path, FILE_NAME, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read: a student needs it next to its weights to say which teacher "
            f"layers it was made from, or give --kept_layers ({_first_line(error)})"
        ) from error
    try:
        values = load_json(Path(path))
        copied, pruned = values["copied_teacher_layers"], values["pruned_teacher_layers"]
        if not all(type(layer) is int for layer in (*copied, *pruned)):
            raise ValueError("the two lists must hold whole numbers")
        if sorted([*copied, *pruned]) != list(range(len(copied) + len(pruned))):
            raise ValueError("the two lists must name every teacher layer exactly once")
        layer_map = LayerMap(tuple(copied), len(copied) + len(pruned))
        order = values.get("patch_order")
        if order is not None:
            order = order_from_json(order, "patch_order")
            layer_map.sequence(order)
        scales = values.get("scales")
        if scales is not None:
            scales = MatchedScales.from_dict(scales, FILE_NAME)
    except KeyError as error:
        raise ValueError(f"{where} lacks the list {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not a valid student config: {_first_line(error)}") from error
    return StudentConfig(layer_map, order, scales)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
