"""What baselines measure is kept in the results folder, and read again only if it is whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluate.baselines import collapsed_teachers, teacher_influences
from patching.running.layer_collapse import collapse

NUM_LAYERS, DEPTHS = 6, (4, 5)
MADE_FROM = {"teacher": "a", "dtype": "float32", "text": "b"}
INFLUENCES = {"block_influence": [0.5, 0.1, 0.2, 0.3, 0.4, 0.6], "made_from": MADE_FROM}
FOUND = [collapse(NUM_LAYERS, depth, lambda collapsed: 1 / collapsed.depth) for depth in DEPTHS]
MERGED = {
    "laco": [found._asdict() | {"teacher": found.teacher.layers} for found in FOUND],
    "made_from": MADE_FROM | {"depths": DEPTHS},
}


class MeasuredAgain(Exception):
    """What is kept was not used."""


def plan_of(folder: Path) -> Any:
    """A plan whose teacher cannot be loaded."""

    def load(names: list[str]) -> None:
        raise MeasuredAgain

    settings = {"teacher": "a", "dtype": "float32"}
    return SimpleNamespace(
        arguments=SimpleNamespace(save_directory=folder),
        settings={"laco": settings, "block_influence": settings},
        calibration=SimpleNamespace(sha256="b", name="text", texts=[], length=9),
        family=SimpleNamespace(
            layer_map=SimpleNamespace(num_teacher_layers=NUM_LAYERS),
            max_layers_to_patch=len(DEPTHS),
            recipe=lambda k: SimpleNamespace(depth=DEPTHS[k]),
            parents=SimpleNamespace(load=load),
        ),
    )


def test_what_is_kept_is_read_again(tmp_path):
    (tmp_path / "laco.json").write_text(json.dumps(MERGED))
    (tmp_path / "block_influence.json").write_text(json.dumps(INFLUENCES))
    expected = {found.teacher.depth: found.teacher for found in FOUND}
    assert collapsed_teachers(plan_of(tmp_path)) == expected
    assert teacher_influences(plan_of(tmp_path)) == INFLUENCES["block_influence"]
    other = json.dumps(MERGED | {"made_from": MADE_FROM | {"text": "c"}})
    (tmp_path / "laco.json").write_text(other)
    with pytest.raises(MeasuredAgain):
        collapsed_teachers(plan_of(tmp_path))


def layer(place: Any, weights: Any) -> list[dict[str, Any]]:
    """What is kept, with the second layer of the first depth replaced."""
    kept = json.loads(json.dumps(MERGED["laco"]))
    kept[0]["teacher"][1] = [place, weights]
    return kept


@pytest.mark.parametrize(
    "kept",
    [
        5, [], [5, 5], MERGED["laco"][:1], MERGED["laco"][::-1], [{}, {}],
        layer(1, 5), layer("1", [[1, 1]]), layer(6, [[6, 1]]), layer(1, [[1, 1, 1]]),
        layer(1, [[1, 0.5]]), layer(1, [[[], 1]]), layer(-1, [[1, 1]]),
    ],
)  # fmt: skip
def test_merged_layers_that_are_damaged(kept, tmp_path):
    (tmp_path / "laco.json").write_text(json.dumps(MERGED | {"laco": kept}))
    with pytest.raises(ValueError, match="laco.json is damaged .*: remove it"):
        collapsed_teachers(plan_of(tmp_path))


@pytest.mark.parametrize("kept", [None, [0.5], ["0.5"] * 6, {"0": 0.5}])
def test_influences_that_are_damaged(kept, tmp_path):
    path = tmp_path / "block_influence.json"
    path.write_text(json.dumps(INFLUENCES | {"block_influence": kept}))
    with pytest.raises(ValueError, match="block_influence.json is damaged .*: remove it"):
        teacher_influences(plan_of(tmp_path))
    path.write_text(json.dumps({"made_from": MADE_FROM}))
    with pytest.raises(ValueError, match="block_influence.json is damaged .*: remove it"):
        teacher_influences(plan_of(tmp_path))
