"""Dips from one size to the next, tested on the documents that both sizes answer."""

import math

import numpy
import pytest
import scipy.stats
from lm_eval.api.metrics import bits_per_byte, mean_stderr, perplexity, weighted_perplexity

from evaluate.reporting.dips import dips
from evaluate.reporting.paired import difference, holm
from evaluate.reporting.scores import main_scores
from evaluate.result import FinishedTask, Parameters, Result

SOURCES = {"documents": "d", "prompts": "p"}


def result(k: int, series: str = "family", sources=SOURCES, **documents) -> Result:
    """A model's result with these scores of single documents, task by task: (metric, values)."""
    found = Result(series, k, 4 + k, Parameters(1, 1), max_layers_to_patch=9)
    for task, (metric, values, aggregate) in documents.items():
        values = numpy.asarray(values, dtype=float)
        found.documents[f"{task}/{metric},none"] = values
        score = aggregate(values.tolist())
        stderr = mean_stderr(values.tolist()) if values.ndim == 1 else "N/A"
        found.results[task] = {f"{metric},none": score, f"{metric}_stderr,none": stderr}
        found.higher_is_better[task] = {metric: "acc" in metric}
        found.tasks[task] = FinishedTask(1.0, False, sources, [task])
    return found


def accuracy(values):
    return ("acc", values, lambda items: sum(items) / len(items))


def compare(first: Result, second: Result, task: str = "task"):
    return difference(first, second, main_scores(first)[task], main_scores(second)[task])


def test_the_error_is_that_of_the_documents_differences():
    """Two sizes that answer nearly alike, as neighbors do."""
    random = numpy.random.default_rng(0)
    small = (random.random(400) < 0.6).astype(float)
    large = small.copy()
    lost, won = numpy.flatnonzero(small)[:12], numpy.flatnonzero(small == 0)[:2]
    large[lost], large[won] = 0, 1
    found = compare(result(0, task=accuracy(small)), result(1, task=accuracy(large)))
    assert found.is_paired and found.value == pytest.approx(-10 / 400)
    assert found.stderr == pytest.approx(scipy.stats.sem(large - small))
    independent = math.hypot(mean_stderr(small.tolist()), mean_stderr(large.tolist()))
    assert found.stderr < independent / 3
    exact = scipy.stats.binomtest(2, 14, 0.5, alternative="less").pvalue
    assert found.p == pytest.approx(exact) and exact < 0.01


@pytest.mark.parametrize("aggregate", [weighted_perplexity, bits_per_byte])
def test_perplexities_are_compared_by_linearization(aggregate):
    """Against the jackknife over documents."""
    random = numpy.random.default_rng(1)
    weights = random.integers(20, 200, 300).astype(float)
    first = numpy.stack([-2.0 * weights + random.normal(0, 8, 300), weights], 1)
    second = first + numpy.stack([random.normal(-0.5, 4, 300), numpy.zeros(300)], 1)
    name = "word_perplexity" if aggregate is weighted_perplexity else "bits_per_byte"
    small, large = (result(k, task=(name, v, aggregate)) for k, v in ((0, first), (1, second)))
    found = compare(small, large)

    def without(values, i):
        return aggregate(numpy.delete(values, i, 0).tolist())

    left_out = [without(second, i) - without(first, i) for i in range(300)]
    jackknife = math.sqrt(299 * numpy.var(left_out))
    assert found.is_paired and found.stderr == pytest.approx(jackknife, rel=0.05)
    t = -found.value / found.stderr
    assert found.p == pytest.approx(scipy.stats.t.cdf(t, 299))


def test_a_perplexity_per_document_is_compared_too():
    random = numpy.random.default_rng(2)
    first = random.normal(-3, 1, 200)
    second = first - 0.1 + random.normal(0, 0.1, 200)
    small, large = (
        result(k, task=("perplexity", v, perplexity)) for k, v in ((0, first), (1, second))
    )
    found = compare(small, large)  # fmt: skip
    left_out = [
        perplexity(numpy.delete(second, i)) - perplexity(numpy.delete(first, i)) for i in range(200)
    ]
    jackknife = math.sqrt(199 * numpy.var(left_out))
    assert found.value > 0 and found.stderr == pytest.approx(jackknife, rel=0.05)
    assert found.p < 1e-6


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_compared_by_the_weights_of_its_tasks(by_size):
    random = numpy.random.default_rng(3)
    models = []
    for k in (0, 1):
        parts = {
            name: (random.random(n) < 0.5).astype(float) for name, n in (("a", 50), ("b", 200))
        }
        model = result(k, **{name: accuracy(values) for name, values in parts.items()})
        weights = {"a": 0.2, "b": 0.8} if by_size else {"a": 0.5, "b": 0.5}
        score = sum(weights[name] * values.mean() for name, values in parts.items())
        model.results["group"] = {"acc,none": score, "acc_stderr,none": 0.1}
        model.group_subtasks = {"group": ["a", "b"]}
        model.tasks = {"group": FinishedTask(1.0, False, SOURCES, ["group", "a", "b"])}
        models.append((model, parts))
    (small, before), (large, after) = models
    found = compare(small, large, "group")
    errors = {name: scipy.stats.sem(after[name] - before[name]) for name in before}
    assert found.is_paired
    assert found.stderr == pytest.approx(math.hypot(*(weights[n] * errors[n] for n in errors)))
    changes = numpy.concatenate([after[name] - before[name] for name in before])
    num_gains, num_changes = int((changes > 0).sum()), int((changes != 0).sum())
    if by_size:  # all documents weigh alike
        exact = scipy.stats.binomtest(num_gains, num_changes, alternative="less").pvalue
        assert found.p == pytest.approx(exact)
    else:
        assert found.p == pytest.approx(scipy.stats.t.cdf(found.value / found.stderr, 248))


@pytest.mark.parametrize(
    "change",
    [
        lambda large: large.tasks.update(task=FinishedTask(1.0, False, None)),
        lambda large: large.tasks.update(task=FinishedTask(1.0, False, SOURCES | {"prompts": "q"})),
        lambda large: large.documents.clear(),
        lambda large: large.documents["task/acc,none"].fill(0.0),
    ],
    ids=["unverified", "other prompts", "no documents", "documents of another score"],
)
def test_scores_of_other_documents_are_not_paired(change):
    small, large = (result(k, task=accuracy([1, 0, 1, k, 1])) for k in (1, 0))
    assert compare(small, large).is_paired
    change(large)
    found = compare(small, large)
    errors = [main_scores(r)["task"].stderr for r in (small, large)]
    assert not found.is_paired and found.stderr == pytest.approx(math.hypot(*errors))


def test_p_is_corrected_for_all_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    random = numpy.random.default_rng(4)
    # Sizes that are all equally good, on many tasks: some differ by chance.
    first = {f"task{i}": (random.random(200) < 0.5).astype(float) for i in range(40)}
    models = [result(0, **{name: accuracy(v) for name, v in first.items()})]
    for k in (1, 2, 3):
        flipped = {n: numpy.where(random.random(200) < 0.1, 1 - v, v) for n, v in first.items()}
        models.append(result(k, **{name: accuracy(v) for name, v in flipped.items()}))
    found = dips(models)
    assert len(found) > 30 and any(dip.difference.p < 0.05 for dip in found)
    assert not any(dip.is_significant for dip in found)


def test_dips_are_between_neighboring_sizes_of_a_family():
    rows = [
        result(0, arc=accuracy([1] * 60 + [0] * 40)),
        result(2, arc=accuracy([1] * 30 + [0] * 70)),
        result(1, arc=accuracy([1] * 59 + [0] * 41)),
        result(1, "naive", arc=accuracy([0] * 100)),
    ]
    found = {dip.result.num_layers_to_patch: dip for dip in dips(rows)}
    assert found.keys() == {1, 2}
    assert found[1].is_significant is False and found[1].difference.value == pytest.approx(-0.01)
    assert found[2].is_significant is True
    assert found[2].corrected_p == pytest.approx(2 * 0.5**29)


def test_a_dip_without_any_error_cannot_be_tested():
    rows = [result(k, arc=("acc", [[1 - k, 1]], lambda items: items[0][0])) for k in (0, 1)]
    (dip,) = dips(rows)
    assert dip.is_significant is dip.corrected_p is dip.difference.stderr is None
