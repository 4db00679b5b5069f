"""Kinds of layers that repeat: what software that goes by position makes of a member."""

import json
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, trained_student
from hypothesis import given, settings
from hypothesis import strategies as st
from patching_models import family_config, save_models
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from patching.architectures.layer_pattern import (
    keeps_period,
    whole_periods,
    whole_periods_order,
)
from patching.blocks import LayerMap
from patching.family import Family
from patching.patch import main
from patching.recipe import patched_model

SLIDING, FULL = "sliding_attention", "full_attention"


def pattern(period: int, num_layers: int) -> list[str]:
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers)]


def kinds_of(layer_map: LayerMap, patched: frozenset[int], kinds: Sequence[str]) -> list[str]:
    """Return the kinds of a member's layers, from the layers it is made of."""
    return [
        kinds[layer if parent == "teacher" else layer_map.kept[layer]]
        for parent, layer, _ in patched_model(layer_map, patched).layers
    ]


@st.composite
def layer_maps(draw) -> LayerMap:
    num_layers = draw(st.integers(4, 14))
    kept = draw(st.sets(st.integers(1, num_layers - 1), max_size=8))
    return LayerMap((0, *sorted(kept)), num_layers)


@settings(max_examples=200)
@given(layer_maps(), st.integers(2, 4), st.booleans())
def test_steps_of_whole_periods_leave_out_as_few_layers_as_possible(layer_map, period, first):
    kinds = pattern(period, layer_map.num_teacher_layers)

    def keeps(patched: frozenset[int]) -> bool:
        return (
            kinds_of(layer_map, patched, kinds) == kinds[: len(kinds_of(layer_map, patched, kinds))]
        )

    chain = whole_periods(layer_map, kinds, first)
    assert chain[-1] == frozenset(layer_map.patchable)
    for patched in chain:
        assert keeps(patched)
    for smaller, larger in zip([None, *chain], chain):
        within = [
            frozenset(patched)
            for size in range(len(larger))
            for patched in combinations(sorted(larger), size)
            if keeps(frozenset(patched))
        ]
        if smaller is None:
            assert within == []
        else:
            assert smaller < larger
            assert len(smaller) == max(map(len, within))


def test_every_third_layer_of_an_alternating_teacher_keeps_the_pattern_at_every_size():
    layer_map = LayerMap((0, 3, 6, 9), 12)
    chain = whole_periods(layer_map, pattern(2, 12), first=False)
    assert chain == [frozenset(), {3}, {2, 3}, {1, 2, 3}, {0, 1, 2, 3}]


def gemma3(period: int, num_layers: int):
    changes = {"layer_types": pattern(period, num_layers), "sliding_window_pattern": period}
    return family_config("gemma3_text", tied=True, num_hidden_layers=num_layers, **changes)


LAYER_MAP = LayerMap((0, 1, 2, 4, 6, 9), 12)
"""Layers 4 and 6 are not where the period wants them until layers 2 and 3 are both patched."""


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> tuple[str, str]:
    """A Gemma 3 whose period is 3, with that in its config.json, and a student."""
    teacher = tiny_model(gemma3(3, 12))
    student = trained_student(teacher, LAYER_MAP)
    return save_models(tmp_path_factory.mktemp("gemma3"), teacher, student, LAYER_MAP)


def flags(names, *more: object) -> list[str]:
    base = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]]
    return [*base, *map(str, more)]


@torch.no_grad()
def test_a_stale_pattern_is_dropped_with_a_warning_that_names_other_sizes(names, tmp_path):
    teacher = json.loads(Path(names[0], "config.json").read_text())
    assert teacher["sliding_window_pattern"] == 3
    out = tmp_path / "k1"
    with pytest.warns(UserWarning, match=r"do not repeat in the teacher's pattern") as warned:
        main(flags(names, "--num_layers_to_patch", 1, "--save_directory", out))
    (message,) = [str(w.message) for w in warned if "pattern" in str(w.message)]
    assert "with this order those of size k = 4 do" in message
    assert "with --order whole_periods those of size k = 2,3,4 do" in message
    made = json.loads((out / "config.json").read_text())
    assert not {name for name in made if "pattern" in name}
    family = Family.from_pretrained(*names)
    tokens = torch.arange(20)[None]
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(saved(tokens).logits, family.model(1)(tokens).logits)


def test_a_member_that_keeps_the_pattern_says_so(names, tmp_path, capsys):
    out = tmp_path / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command = flags(names, "--order", "whole_periods", "--num_layers_to_patch", 2)
        main([*command, "--save_directory", str(out)])
    assert not [w for w in caught if "pattern" in str(w.message)]
    made = json.loads((out / "config.json").read_text())
    assert made["sliding_window_pattern"] == 3
    assert made["layer_types"] == pattern(3, made["num_hidden_layers"])
    assert keeps_period(AutoConfig.from_pretrained(out))


def test_an_order_of_whole_periods_needs_a_pattern_and_a_student_that_can(tmp_path):
    with pytest.raises(ValueError, match="do not repeat with a period; choose last or first"):
        whole_periods_order(LayerMap((0, 2), 4), family_config("llama"))
    with pytest.raises(ValueError, match="no size but the teacher"):
        whole_periods_order(LayerMap((0, 2, 4, 5), 6), gemma3(2, 6))
    every_second = LayerMap((0, 2, 4, 6, 8, 10), 12)  # patched up to the last full attention
    assert set(whole_periods_order(every_second, gemma3(6, 12))[:3]) == {0, 1, 2}


def test_the_pattern_of_a_multimodal_model_is_its_text_towers():
    for layer_types, expected in ((pattern(6, 8), True), ([FULL, *pattern(6, 7)], False)):
        text = family_config("gemma3_text", num_hidden_layers=8, layer_types=layer_types)
        assert keeps_period(Gemma3Config(text_config=text.to_dict())) == expected
