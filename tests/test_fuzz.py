"""Files and texts from a stranger, by chance: a reader returns what is right or raises the error
that it documents, and allocates nothing because a file says so.

`make test` tries a few of each, `make test-faults` many (docs/robustness.md has the figures).
"""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from chat_templates import CHATML, MARKED, tokenizer_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import bounded
from patching_models import LAYER_MAP, family_pair, save_models
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from test_baselines import DEPTHS, MERGED, MeasuredAgain, plan_of
from transformers import AutoModelForCausalLM

from evaluate.baselines import collapsed_teachers
from evaluate.documents import read_documents
from evaluate.report import read_sweeps
from evaluate.reporting.comparison import Comparison
from evaluate.reporting.exports import csv_table, json_summary
from evaluate.reporting.tables import markdown_report
from evaluate.result import FinishedTask, Parameters, Result, Run, read_result
from patching.checkpoints.safetensors_files import StoredTensor, read_header
from patching.cli import units
from patching.files.model_files import files_of_index
from patching.files.outputs import finite_or_none
from patching.matched_scale import MatchedScales, SetScale
from patching.orders.measured import Measured
from patching.patch import main
from patching.patch_order import read_order
from patching.recipe import Recipe, Reference, intermediate_model
from patching.student_config import StudentConfig, read_student_config
from train.chats.rows import rows_of_chats
from train.fsdp_config import read_fsdp_config
from train.loss import NO_TARGET
from train.teacher_cache import TeacherCache

HUGE = st.sampled_from([-1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400])
NUMBERS = st.integers(-3, 12) | HUGE | st.floats()
WORDS = st.text(max_size=8) | st.sampled_from(["..", "../x", "/etc/passwd", "a\0b", "\ud800", ""])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


def as_text(values: Any) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Callable, good: bytes) -> bytes:
    """A good file with some bytes changed, cut off or added."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    growth = draw(st.sampled_from([0, 0, 0, -1, -9, 1, 40]))
    return bytes(data[: len(data) + growth]) + bytes(max(growth, 0))


@st.composite
def changed(draw: Callable, good: Any) -> bytes:
    """A good JSON file with values at some places replaced by others, or one damaged as text."""
    values = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(values))
        where, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()):
            where[key] = draw(JSON)
        else:
            del where[key]
        if not values:
            break
    return draw(st.just(as_text(values)) | damaged(as_text(good)))


def places_in(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of nested JSON as its container and key."""
    keys = range(len(values)) if isinstance(values, list) else list(values)
    for key in keys:
        yield values, key
        if isinstance(values[key], list | dict) and values[key]:
            yield from places_in(values[key])


def written(data: bytes, name: str = "file.json") -> Path:
    """A file in the folder of this test run."""
    path = Path(os.environ["FUZZ_FOLDER"], name)
    path.write_bytes(data)
    return path


# What is fuzzed: each takes an example and fails unless the reader does what it documents ---------

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
SAFETENSORS = save(TENSORS, metadata={"format": "pt"})


@st.composite
def headers(draw: Callable) -> bytes:
    """A safetensors file whose header is made of parts that may be wrong."""
    entry = {
        "dtype": draw(st.sampled_from(["F32", "BF16", "U8", "F4", "F31"]) | JSON),
        "shape": draw(st.lists(st.integers(0, 4) | HUGE, max_size=3) | JSON),
        "data_offsets": draw(st.tuples(NUMBERS, NUMBERS) | JSON),
    }
    fine = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    header = {"x": draw(st.just(fine) | st.just(entry)), draw(WORDS): draw(st.just(entry) | JSON)}
    text = as_text(header)
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + text + bytes(draw(st.integers(0, 12)))


def check_safetensors(data: bytes) -> None:
    path = written(data, "file.safetensors")
    try:
        found = read_header(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is damaged: ")
        return
    spans = sorted((on_disk.start, on_disk.stop) for on_disk in found.values())
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert not spans or spans[-1][1] == len(data)
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_slice(name) for name in list(file.keys())}
            theirs = {
                name: StoredTensor(name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in theirs.items()
            }
    except SafetensorError as error:
        # Their header must begin with a brace, and ours need not.
        pytest.fail(f"read what others refuse ({error}): {data!r}")
    assert theirs == {name: on_disk.tensor for name, on_disk in found.items()}


INDEX = {
    "metadata": {"total_size": 9},
    "weight_map": dict.fromkeys("ab", "here.safetensors"),
}


def check_index(data: bytes) -> None:
    folder = Path(os.environ["FUZZ_FOLDER"])
    (folder / "here.safetensors").touch()
    try:
        files = files_of_index(Reference(str(folder)), written(data))
    except ValueError as error:
        assert "is damaged" in str(error) or "is missing" in str(error)
        return
    assert files and all(file.parent == folder and file.is_file() for file in files)


SCALES = MatchedScales.of(
    [SetScale(frozenset({2, 3}), {0: 1.3}, {0: 1.2}, 0.5, 0.4, 0.01)], {"text": "a", "tokens": 9}
)
STUDENT = StudentConfig(LAYER_MAP, (0, 2), SCALES).to_dict()


def check_student_config(data: bytes) -> None:
    path = written(data, "student_config.json")
    try:
        found = read_student_config(str(path.parent))
    except ValueError as error:
        assert "student_config.json" in str(error)
        return
    found.save(path.parent)
    again = read_student_config(str(path.parent))
    assert as_text(again.to_dict()) == as_text(found.to_dict())
    assert [layer for block in found.layer_map.blocks for layer in block] == list(
        range(found.layer_map.num_teacher_layers)
    )


ORDER = {
    "order": [2, 0],
    "settings": {"kept_layers": [0, 2, 3, 5], "teacher": "a b"},
    "scales": SCALES.to_dict(),
}


def check_order(data: bytes) -> None:
    path = written(data, "order.json")
    try:
        order, found_for, scales = read_order(path)
        sequence = LAYER_MAP.sequence(order)
    except ValueError as error:
        assert "order" in str(error)
        return
    assert sorted(sequence) == list(range(len(LAYER_MAP.kept)))
    assert isinstance(found_for, dict)
    factors = scales.sets.values() if scales else ()
    assert all(0 < factor < math.inf for found in factors for factor in found.factors.values())


RECIPE = intermediate_model(LAYER_MAP, 1, "last").to_dict()


def check_recipe(data: bytes) -> None:
    try:
        values = json.loads(data)
    except ValueError:
        return
    try:
        recipe = Recipe.from_dict(values)
    except ValueError as error:
        assert str(error).startswith("recipe: ")
        return
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.depth > 0 and recipe.parents <= {"student", "teacher"}


SIZES = st.one_of(
    st.text(alphabet="0123456789.,-kKmMgGtTiIbB _eE+x٣²", max_size=12),
    st.text(max_size=6),
    st.integers(0, 10**40).map(str),
    st.integers(1, 6000).map(lambda count: "9" * count),
    st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)).map("{0[0]}-{0[1]}".format),
)


def check_size(text: str) -> None:
    for parse, args in (
        (units.parse_bytes, ("flag",)),
        (units.parse_count, ("flag",)),
        (units.parse_ranges, ("flag",)),
        (units.parse_number, ("flag",)),
        (units.parse_sizes, (7,)),
    ):
        try:
            found = parse(text, *args)
        except ValueError as error:
            assert str(error).startswith(("flag", "num_layers_to_patch"))
            continue
        if parse in (units.parse_bytes, units.parse_count):
            assert found > 0
            assert units.bytes_text(found) and units.count_text(found)
        elif parse is units.parse_sizes:
            assert found == sorted(set(found)) and set(found) <= set(range(8))
        elif parse is units.parse_ranges:
            assert len(found) <= units.LARGEST_NUMBER


def stored_result() -> dict[str, Any]:
    result = Result("family", 0, 4, Parameters(10, 20), max_layers_to_patch=2, order=[0, 2])
    sources = {"task config": "a", "prompts": "b", "documents": "c", "tokenizer": "d"}
    task = FinishedTask(1.0, False, sources, ["group", "choice"])
    run = Run(
        {"limit": 5.0, "seed": [0, 1, 2, 3], "dtype": "float32"}, {"shard": "1/2"}, {"a": "b"}
    )
    result.add_scores(
        {"group": task},
        run,
        {
            "results": {"choice": {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}},
            "groups": {"group": {}},
            "group_subtasks": {"group": ["choice"]},
            "higher_is_better": {"choice": {"acc": True}},
            "n-shot": {"choice": 0},
            "n-samples": {"choice": {"original": 9, "effective": 5}},
            "versions": {"choice": 1.0},
            "generation_failures": {"choice": {"answers": 5, "cut": 1, "looping": 0, "failed": 1}},
            "configs": {"choice": {"output_type": "multiple_choice"}},
        },
    )
    return result.to_dict()


RESULT = stored_result()


def check_result(data: bytes) -> None:
    path = written(data, "results/family_k0.json")
    try:
        results = read_sweeps([path.parent]).results
    except ValueError as error:
        assert str(path.parent) in str(error) or "shard=" in str(error)
        return
    report = Comparison.of(results)
    assert markdown_report(report, {}, 1)
    assert csv_table(results)
    json.dumps(finite_or_none(json_summary(report, {})), allow_nan=False)
    again = json.loads(json.dumps(read_result(path).to_dict()))
    assert Result.from_dict(again).to_dict() == read_result(path).to_dict()


def archive(scores: Any) -> bytes:
    content = BytesIO()
    numpy.savez_compressed(content, **{"choice/acc,none": scores})
    return content.getvalue()


@st.composite
def archives(draw: Callable) -> bytes:
    """Scores of any type and shape, or with values that no score has."""
    kind = draw(
        st.sampled_from(["f8", "f8", "f8", ">f8", "f2", "i8", "?", "c16", "U3", "S2", "M8[s]"])
    )
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (5, 2), (0, 2), (2, 5), (5, 2, 1)]))
    values = draw(st.lists(st.floats() | st.sampled_from([0.0, 1.0, -1e4]), min_size=1, max_size=9))
    with numpy.errstate(all="ignore"):
        scores = numpy.resize(numpy.array(values), shape)
        scores = scores.astype("i8").astype(kind) if kind == "M8[s]" else scores.astype(kind)
    return archive(scores)


def check_documents(data: bytes) -> None:
    """Any archive that is read can be compared with that of the next size."""
    path = written(data, "results/documents/family_k0.npz")
    try:
        found = read_documents(path.parents[1], "family_k0")
    except ValueError as error:
        assert str(error).startswith(f"{path} is damaged")
        return
    members = [Result.from_dict(RESULT | {"num_layers_to_patch": k}) for k in (0, 1)]
    scores = found.get("choice/acc,none", numpy.zeros(0))
    with numpy.errstate(all="ignore"):
        mean = float(scores.mean()) if scores.size else 0.5
        for member, value in zip(members, (mean, mean - 0.25)):
            member.documents = found
            member.results["choice"]["acc,none"] = value
        report = Comparison.of(members)
    assert markdown_report(report, {}, 1)
    json.dumps(finite_or_none(json_summary(report, {})), allow_nan=False)


def check_merged(data: bytes) -> None:
    path = written(data, "laco.json")
    try:
        found = collapsed_teachers(plan_of(path.parent))
    except ValueError as error:
        assert str(error).startswith(f"{path} is damaged")
        return
    except MeasuredAgain:
        return
    assert [of.depth for of in found.values()] == [*found] == [*DEPTHS]


MEASURED_WITH = {"num_teacher_layers": 2, "kept_layers": [0, 1]}
KL = {"settings": MEASURED_WITH, "block_influence": [0.1, 0.2], "kl": {"": 0.5, "0,2": None}}


def check_measured(data: bytes) -> None:
    path = written(data, "order_kl.json")
    try:
        measure = Measured.open(MEASURED_WITH, path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(value, float) for value in measure.kl.values())


FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], "cpu_offload": False}


def check_fsdp(data: bytes) -> None:
    path = written(data, "fsdp.json")
    try:
        assert isinstance(read_fsdp_config(str(path)), dict)
    except ValueError as error:
        assert str(error).startswith("fsdp_config")


ROWS = save(
    {
        "keys": torch.zeros(2, 16, dtype=torch.uint8),
        "stops": torch.tensor([2, 5]),
        "ids": torch.zeros(5, 3, dtype=torch.uint16),
        "log_q": torch.zeros(5, 3, dtype=torch.float16),
        "log_rest": torch.zeros(5),
    }
)


def check_cache(data: bytes) -> None:
    written(as_text({"complete": True, "top_k": 3}), "cache/cache.json")
    path = written(data, "cache/rows-00000.safetensors")
    try:
        cache = TeacherCache(path.parent)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(0 <= row.start <= row.stop <= 5 for row in cache.rows.values())


CHATS = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo <|im_end|>"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
COMPLETION = {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Yo"}]}
TOKENIZERS = [tokenizer_with(template) for template in (CHATML, MARKED)]


def check_chat(data: bytes) -> None:
    """What is learned lies within the row, with a label for each of its tokens."""
    try:
        example = json.loads(data)
    except ValueError:
        return
    if not isinstance(example, dict):  # a line of a dataset is an object
        return
    for tokenizer in TOKENIZERS:
        found = rows_of_chats([example], tokenizer, 24, "documents", NO_TARGET)
        assert found.num_chats == 1
        columns = found.columns
        assert len(columns["labels"]) == 1 - sum(found.refused.values())
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
            assert len(ids) == len(labels) <= 24
            learned = [label for label in labels if label != NO_TARGET]
            assert learned and all(label in (token, NO_TARGET) for token, label in zip(ids, labels))


class Target(NamedTuple):
    check: Callable[[Any], None]
    examples: st.SearchStrategy
    many: int
    """Examples in `make test-faults`."""


TARGETS = {
    "safetensors bytes": Target(check_safetensors, damaged(SAFETENSORS), 12_000),
    "safetensors headers": Target(check_safetensors, headers(), 12_000),
    "index files": Target(check_index, changed(INDEX), 10_000),
    "student_config.json": Target(check_student_config, changed(STUDENT), 12_000),
    "order.json": Target(check_order, changed(ORDER), 10_000),
    "recipes": Target(check_recipe, changed(RECIPE), 10_000),
    "size expressions": Target(check_size, SIZES, 12_000),
    "stored results": Target(check_result, changed(RESULT), 10_000),
    "scores of documents": Target(
        check_documents, damaged(archive(numpy.arange(5.0))) | archives(), 6_000
    ),
    "merged layers": Target(check_merged, changed(MERGED), 4_000),
    "measured orders": Target(check_measured, changed(KL), 4_000),
    "fsdp_config": Target(check_fsdp, changed(FSDP), 4_000),
    "chat masks": Target(check_chat, changed(CHATS) | changed(COMPLETION), 6_000),
    "teacher caches": Target(check_cache, damaged(ROWS), 4_000),
}
FEW = 40


@pytest.fixture(autouse=True)
def fuzz_folder(monkeypatch) -> Iterator[Path]:
    """A folder in memory where there is one, for files that live for one example."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (Path(folder) / "results/documents").mkdir(parents=True)
        (Path(folder) / "cache").mkdir()
        monkeypatch.setenv("FUZZ_FOLDER", folder)
        yield Path(folder)


def fuzz(check: Callable, examples: st.SearchStrategy, how_many: int) -> None:
    """Run a check on examples by chance, with little memory and for at most an hour."""
    limits = settings(
        max_examples=how_many,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    with bounded(3600, 2**30):
        limits(given(examples)(check))()


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_by_chance(name):
    fuzz(TARGETS[name].check, TARGETS[name].examples, FEW)


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_many_by_chance(name):
    fuzz(*TARGETS[name])


def test_many_are_at_least_a_hundred_thousand():
    assert sum(target.many for target in TARGETS.values()) >= 100_000


# A splice that succeeds always loads --------------------------------------------------------------

DAMAGED_FILES = (
    "teacher/config.json",
    "student/config.json",
    "student/student_config.json",
    "teacher/generation_config.json",
    "teacher/model.safetensors.index.json",
    "teacher/weights",
    "student/weights",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_models(folder, *family_pair("qwen3"), max_shard_size="60KB")
    StudentConfig(LAYER_MAP, "last", SCALES).save(folder / "student")
    return folder


def check_splice(pair: Path, name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ["FUZZ_FOLDER"]) as place:
        folder = Path(shutil.copytree(pair, Path(place, "pair")))
        path = folder / name
        if path.name == "weights":
            path = data.draw(st.sampled_from(sorted(path.parent.glob("*.safetensors"))))
            content = path.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            start = data.draw(damaged(content[: 8 + length]))
            path.write_bytes(start + content[8 + length :])
        else:
            path.write_bytes(data.draw(changed(json.loads(path.read_bytes()))))
        out, errors = folder / "out", StringIO()
        words = ["--teacher_model_name_or_path", f"{folder}/teacher",
                 "--student_model_name_or_path", f"{folder}/student",
                 "--num_layers_to_patch", "1", "--save_directory", str(out)]  # fmt: skip
        with redirect_stderr(errors), redirect_stdout(StringIO()):
            try:
                main(words)
            except SystemExit as ended:
                assert ended.code == 2
                assert errors.getvalue().splitlines()[-1].startswith("error: ")
                assert not out.exists()
                return
        for weights in out.glob("*.safetensors"):
            with safe_open(weights, "pt") as file:
                assert list(file.keys())
        AutoModelForCausalLM.from_pretrained(out)


def fuzz_splices(pair: Path, name: str, how_many: int) -> None:
    fuzz(lambda data: check_splice(pair, name, data), st.data(), how_many)


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_splice_that_succeeds_loads(name, pair):
    fuzz_splices(pair, name, 2)


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_many_splices_that_succeed_load(name, pair):
    fuzz_splices(pair, name, 100)
