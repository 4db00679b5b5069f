"""Matched scale: the search on known curves, what is kept, and what families do with it."""

import json
import math
import statistics

import pytest
import torch
from conftest import tiny_config, tiny_model, trained_student
from hypothesis import given
from hypothesis import strategies as st
from patching_models import LAYER_MAP, family_pair, save_models

from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.family import Family
from patching.matched_scale import MatchedScales, SetScale
from patching.orders.measurements import Measurements
from patching.orders.scales import (
    LARGEST_FACTOR,
    BudgetSpent,
    Point,
    paired_gain,
    search_scales,
    start_of,
)
from patching.patch import build_intermediate_model, iter_family
from patching.patch import main as patch_main
from patching.recipe import patched_model, with_scales
from patching.running.calibration import Calibration, padded_batches
from patching.running.lengths import length_ratios
from patching.student_config import StudentConfig, read_student_config

LAYERS = LayerMap((0, 2, 4, 6, 8, 9), 10)
TOKENS = [7, 12, 5, 9, 20, 11]
LAST, FIRST, BOTH = frozenset({3, 4, 5}), frozenset({0, 1}), frozenset({0, 2})


class Curve:
    """KL that is lowest at known factors, with documents that differ more than the models do."""

    def __init__(self, best: dict[frozenset, tuple[float, ...]], depth: float, noise: float = 0):
        self.best, self.depth, self.noise = best, depth, noise
        self.asked: list[Point] = []

    def __call__(self, points):
        self.asked += points
        return {point: self.rows(point) for point in points}

    def rows(self, point):
        best = self.best[point.patched_layers]
        distance = sum(math.log(c / b) ** 2 for c, b in zip(point.factors, best, strict=True))
        return [
            n * (1 + i + self.depth * distance)
            + self.noise * (-1) ** i * n * math.log(sum(point.factors))
            for i, n in enumerate(TOKENS)
        ]


def search(curve, sets=None, ratios=(1.0, 1.2, 1.2, 1.3, 1.4, 1.5)):
    found = search_scales(LAYERS, sets or list(curve.best), ratios, curve, TOKENS)
    return {scale.patched_layers: scale for scale in found}


@pytest.mark.parametrize(
    ("best", "error"), [(0.7, 0.08), (0.9, 0.02), (1.0, 0), (1.15, 0.02), (1.4, 0.02), (1.9, 0.25)]
)
def test_the_lowest_point_of_one_run_is_found_in_few_models(best, error):
    curve = Curve({LAST: (best,)}, depth=1.0)
    found = search(curve)[LAST]
    assert found.factors[0] == pytest.approx(best, abs=error)
    assert found.start == {0: 1.3}
    assert len(curve.asked) <= 5
    expected = sum(curve.rows(Point(LAST, (1.0,)))) / sum(TOKENS)
    assert found.kl_before == pytest.approx(expected)
    assert found.kl <= found.kl_before
    if best == 1.0:
        assert found.factors == {0: 1.0} and found.kl == found.kl_before


def test_several_runs_are_searched_one_after_the_other():
    curve = Curve({BOTH: (1.3, 0.8)}, depth=1.0)  # student 1, and student 3-5
    found = search(curve)[BOTH]
    assert found.factors[1] == pytest.approx(1.3, abs=0.05)
    assert found.factors[3] == pytest.approx(0.8, abs=0.05)
    assert found.start[1] == pytest.approx(1.2)  # the mean of 1.2 before it and 1.2 after it
    assert found.start[3] == pytest.approx(1.3)
    assert len(curve.asked) <= 20


def test_runs_whose_factors_depend_on_each_other_are_matched_together():
    """On the demo's pair, the factor of one run alone makes the model worse, and both better."""

    class Valley(Curve):
        def rows(self, point):
            x, y = (math.log(c / b) for c, b in zip(point.factors, self.best[BOTH], strict=True))
            distance = x * x + y * y - 1.5 * x * y
            return [n * (1 + i + self.depth * distance) for i, n in enumerate(TOKENS)]

    curve = Valley({BOTH: (1.27, 1.24)}, depth=1.0)
    lowest, plain, one = (
        sum(curve.rows(Point(BOTH, factors))) for factors in ((1.27, 1.24), (1.0, 1.0), (1.0, 1.24))
    )
    assert one > plain
    found = search(curve)[BOTH]
    assert found.kl * sum(TOKENS) - lowest < 0.1 * (plain - lowest)


def test_a_gain_within_its_error_is_no_gain():
    """The mean is lower at 1.4, but half of the documents get worse."""
    assert search(Curve({LAST: (1.4,)}, depth=0.02, noise=2.0))[LAST].factors == {0: 1.0}
    assert search(Curve({LAST: (1.4,)}, depth=0.02, noise=0.0))[LAST].factors != {0: 1.0}


def test_only_the_run_that_gains_is_rescaled():
    class OneRun(Curve):
        def rows(self, point):
            (first, _), (best, _) = point.factors, self.best[point.patched_layers]
            return [n * (1 + i + math.log(first / best) ** 2) for i, n in enumerate(TOKENS)]

    found = search(OneRun({BOTH: (1.3, 1.0)}, depth=1.0))[BOTH]
    assert found.factors[1] == pytest.approx(1.3, abs=0.05) and found.factors[3] == 1.0


def test_sets_are_measured_together_and_never_twice():
    best = {LAST: (1.3,), FIRST: (0.9,), BOTH: (1.2, 1.2)}
    calls = []
    curve = Curve(best, depth=1.0)

    def measure(points):
        calls.append({point.patched_layers for point in points})
        return curve(points)

    student, teacher = frozenset(), frozenset(range(6))
    sets = [student, *best, LAST, teacher]
    found = search_scales(LAYERS, sets, [1.3] * 6, measure, TOKENS)
    assert {scale.patched_layers for scale in found} == set(best)
    assert calls[0] == set(best)
    assert len(curve.asked) == len(set(curve.asked))


@pytest.mark.parametrize("affordable", [0, 3, 4, 8])
def test_a_spent_budget_ends_with_the_best_so_far(affordable):
    curve = Curve({LAST: (1.15,)}, depth=1.0)
    left = affordable

    def measure(points):
        nonlocal left
        if len(points) > left:
            raise BudgetSpent
        left -= len(points)
        return curve(points)

    found = search_scales(LAYERS, [LAST], [1.3] * 6, measure, TOKENS)
    assert len(curve.asked) <= affordable
    if affordable < 3:
        assert not found
    else:
        assert found[0].factors[0] == pytest.approx(1.15, abs=0.02)


def test_models_that_overflow_never_win():
    class Overflow(Curve):
        def rows(self, point):
            rows = super().rows(point)
            return rows if point.factors[0] <= 1.2 else [math.inf] * len(rows)

    measured = Overflow({LAST: (1.1,)}, depth=1.0)
    found = search(measured)[LAST]
    assert found.factors[0] == pytest.approx(1.1, abs=0.05) and math.isfinite(found.kl)

    class Lost(Curve):
        def rows(self, point):
            return [math.inf] * len(TOKENS) if point.factors == (1.0,) else super().rows(point)

    assert not search(Lost({LAST: (1.1,)}, depth=1.0))


numbers = st.floats(0, 10)


@given(st.lists(st.tuples(numbers, numbers, st.integers(1, 50)), min_size=2, max_size=8))
def test_the_gain_is_paired_by_document(documents):
    before, after, tokens = zip(*documents)
    gain, error = paired_gain(before, after, tokens)
    assert gain == pytest.approx((sum(before) - sum(after)) / sum(tokens), abs=1e-9)
    if len(set(tokens)) == 1:  # then it is the standard error of a mean
        each = [(x - y) / n for x, y, n in documents]
        expected = statistics.stdev(each) / math.sqrt(len(each))
        assert error == pytest.approx(expected, abs=1e-9)
    more, same_error = paired_gain(
        [x + 5 * n for x, n in zip(before, tokens)],
        [y + 5 * n for y, n in zip(after, tokens)],
        tokens,
    )
    assert (more, same_error) == (pytest.approx(gain, abs=1e-6), pytest.approx(error, abs=1e-6))


def test_one_document_says_nothing_about_its_error():
    assert paired_gain([2.0], [1.0], [1]) == (1.0, math.inf)


def test_where_a_run_starts_and_ends_decides_its_start():
    ratios = [9.0, 1.2, 1.5, 0.8, 1.1]
    assert start_of((0, 1), ratios) == 1.5  # begins the model: only its end meets the teacher
    assert start_of((3, 4), ratios) == 0.8  # ends the model: only its start does
    assert start_of((1, 2), ratios) == pytest.approx(math.sqrt(1.2 * 0.8))
    assert start_of((0, 1, 2, 3, 4), ratios) == 1.0
    assert start_of((3, 4), [1.0, 1.0, 1.0, math.nan, 1.0]) == 1.0


@torch.no_grad()
def test_ratios_are_medians_over_real_tokens():
    teacher, student = family_pair("qwen3")
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19], [20, 21, 22, 23, 24]]
    found = length_ratios(teacher, student, LAYER_MAP, padded_batches(rows))
    ratios = [[] for _ in LAYER_MAP.kept]
    for row in rows:
        ids = torch.tensor([row])
        ours, theirs = (
            model(ids, output_hidden_states=True).hidden_states for model in (student, teacher)
        )
        for i, (own, other) in enumerate(LAYER_MAP.alignment_pairs[:-1]):
            ratios[i] += (theirs[other].norm(dim=-1) / ours[own].norm(dim=-1))[0].tolist()
    assert found == pytest.approx([statistics.median_low(of) for of in ratios], rel=1e-5)


TEXT = Calibration("some texts", [f"text {i} is about {i * i}" for i in range(6)], 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair whose student writes too little to the stream, at every layer."""
    layer_map = LayerMap((0, 2, 4, 5), 6)
    teacher = tiny_model(tiny_config("qwen3-tied", 6))
    student = trained_student(teacher, layer_map)
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(0.6)
        for layer in student.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.mul_(0.6)
    names = save_models(tmp_path_factory.mktemp("pair"), teacher, student, layer_map)
    return names, teacher, student, layer_map


def test_measured_on_models_the_factor_is_found(pair, tmp_path):
    """The stream of a student that was shrunk throughout becomes longer."""
    names, *_ = pair
    family = Family.from_pretrained(*names, "last", dtype="float32")
    measure = Measurements(family, TEXT, tmp_path / "kl.json")
    patched = family.patched_layers(1)
    ratios, tokens = measure.ratios, measure.tokens_of_rows
    arguments = (family.layer_map, [patched], ratios)
    (found,) = search_scales(*arguments, measure.of_rows, tokens)
    assert found.start == {0: ratios[1]} and 1.4 < ratios[1] < 2.5
    assert found.factors[0] > 1.25
    assert found.kl < found.kl_before - 2 * found.gain_error
    # Both KL are those of the models themselves.
    plain = patched_model(family.layer_map, patched)
    recipes = {"before": plain, "after": with_scales(plain, found.factors)}
    again = measure.teacher_kl.of(recipes)
    assert again["before"] == pytest.approx(found.kl_before)
    assert again["after"] == pytest.approx(found.kl)
    assert measure([patched])[patched] == pytest.approx(found.kl_before)

    # Everything is in the file, so that the same search runs no model.
    other = Measurements(family, TEXT, tmp_path / "kl.json", budget=0)
    assert other.ratios == ratios
    assert search_scales(*arguments, other.of_rows, tokens) == [found]
    with pytest.raises(BudgetSpent):
        other.of_rows([Point(patched, (3.0,))])


SCALES = MatchedScales.of(
    [SetScale(frozenset({1, 2, 3}), {0: 1.3}, {0: 1.4}, 2.0, 1.5, 0.1)],
    {"text": "some texts", "text_sha256": "abc", "dtype": "float32"},
)


def test_factors_survive_json():
    stored = json.loads(json.dumps(SCALES.to_dict()))
    assert MatchedScales.from_dict(stored, "here") == SCALES
    assert SCALES.factors(frozenset({1, 2, 3})) == {0: 1.3}
    assert SCALES.factors(frozenset({1})) == {} and SCALES.described(frozenset({1})) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("sets"),
        lambda values: values.pop("found_on"),
        lambda values: values["sets"][0].pop("kl"),
        lambda values: values["sets"][0].update(factors={"0": -1.0}),
        lambda values: values["sets"][0].update(factors={"x": 1.0}),
        lambda values: values["sets"][0].update(factors={"0": 10**400}),
        lambda values: values["sets"][0].update(patched_layers=["1"]),
        lambda values: values["sets"][0].update(factors=[1.0]),
    ],
)
def test_damaged_factors_are_one_line(damage, pair, tmp_path):
    values = json.loads(json.dumps(SCALES.to_dict()))
    damage(values)
    with pytest.raises(ValueError, match="^here: scales cannot be read .*--match_scale False$"):
        MatchedScales.from_dict(values, "here")
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"order": [1, 0, 2, 3], "scales": values}))
    with pytest.raises(ValueError, match=f"^order={path}: scales cannot be read"):
        Family.from_pretrained(*pair[0], path)


@torch.no_grad()
def test_a_student_carries_its_factors(pair, tmp_path):
    names, teacher, student, layer_map = pair
    folder = save_models(tmp_path, teacher, student, layer_map)[1]
    StudentConfig(layer_map, "last", SCALES).save(tmp_path / "student")
    assert read_student_config(folder) == StudentConfig(layer_map, "last", SCALES)
    plain = patched_model(layer_map, frozenset({1, 2, 3}))
    scaled = with_scales(plain, {0: 1.3})
    family = Family.from_pretrained(names[0], folder)
    assert family.recipe(1) == family.recipe(patched_layers=[1, 2, 3]) == scaled
    assert family.with_order("last").recipe(1) == scaled
    for k in (0, 2):
        assert family.recipe(k) == patched_model(layer_map, family.patched_layers(k))
    # Known for these sets whatever the order is called, and for no other.
    assert Family.from_pretrained(names[0], folder, "last").recipe(1) == scaled
    first = Family.from_pretrained(names[0], folder, "first")
    assert first.recipe(1) == patched_model(layer_map, first.patched_layers(1))
    # The paper's way.
    for how in ({"order": "last"}, {}):
        own = Family.from_pretrained(names[0], folder, **how, match_scale=False)
        assert own.recipe(1) == plain and own.scales is None
    assert family.naive_recipe(1) == own.naive_recipe(1)

    ids = torch.arange(12)[None]
    expected = assemble(scaled, teacher=teacher, student=student)(ids).logits
    unscaled = assemble(plain, teacher=teacher, student=student)(ids).logits
    assert torch.equal(family.model(1)(ids).logits, expected)
    member = next(iter_family(names[0], folder, [1]))
    assert torch.equal(member.model(ids).logits, expected)
    model, _ = build_intermediate_model(names[0], folder, 1, match_scale=False)
    assert torch.equal(model(ids).logits, unscaled) and not torch.equal(unscaled, expected)

    # In a file, factors go before those of the student.
    values = SCALES.to_dict()
    values["sets"][0]["factors"] = {"0": 1.1}
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"order": [3, 2, 1, 0], "scales": values}))
    assert Family.from_pretrained(names[0], folder, path).recipe(1) == with_scales(plain, {0: 1.1})
    path.write_text("[3, 2, 1, 0]")
    assert Family.from_pretrained(names[0], folder, path).recipe(1) == scaled


def test_the_command_line_saves_them_unless_told_otherwise(pair, tmp_path):
    names, teacher, student, layer_map = pair
    folder = save_models(tmp_path, teacher, student, layer_map)[1]
    StudentConfig(layer_map, "last", SCALES).save(tmp_path / "student")
    flags = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", folder]
    for name, more in (("scaled", []), ("plain", ["--match_scale", "False"])):
        out = str(tmp_path / name)
        patch_main([*flags, "--num_layers_to_patch", "1", "--save_directory", out, *more])
    scaled, plain = (
        json.loads((tmp_path / name / "provenance.json").read_text())
        for name in ("scaled", "plain")
    )
    assert scaled["recipe"]["layers"][0] == "student 0 x 1.3"
    assert scaled["matched_scale"]["found_on"]["text"] == "some texts"
    assert plain["recipe"]["layers"][0] == "student 0" and "matched_scale" not in plain


@pytest.mark.parametrize(
    ("layers", "factors", "message"),
    [
        ({1, 9}, {0: 1.1}, "this student has layers 0-3, not 9"),
        ({1, 2, 3}, {2: 1.1}, "no run of student layers begins with layer 2"),
    ],
)
def test_factors_of_another_student_are_refused(pair, tmp_path, layers, factors, message):
    names, teacher, student, layer_map = pair
    folder = save_models(tmp_path, teacher, student, layer_map)[1]
    scales = MatchedScales.of([SetScale(frozenset(layers), factors, {}, 2.0, 1.5, 0.1)], {})
    StudentConfig(layer_map, "last", scales).save(tmp_path / "student")
    with pytest.raises(ValueError, match=message):
        Family.from_pretrained(names[0], folder)


def test_an_architecture_that_cannot_be_rescaled_is_refused_before_weights_load(tmp_path):
    teacher, student = family_pair("opt", do_layer_norm_before=False)
    names = save_models(tmp_path, teacher, student)
    scales = MatchedScales.of([SetScale(frozenset({2, 3}), {0: 1.1}, {}, 2.0, 1.5, 0.1)], {})
    StudentConfig(LAYER_MAP, "last", scales).save(tmp_path / "student")
    with pytest.raises(ValueError, match=r"model_type=opt: the scale .* \(--match_scale False\)"):
        Family.from_pretrained(*names)
    assert Family.from_pretrained(*names, match_scale=False).scales is None


def test_factors_are_bounded():
    curve = Curve({LAST: (50.0,)}, depth=1.0)
    assert (
        search(curve, ratios=(1.0, 30.0, 30.0, 30.0, 30.0, 30.0))[LAST].factors[0] <= LARGEST_FACTOR
    )
