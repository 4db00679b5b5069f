"""Columns that hold no text, or no token ids, in the first document or in any other."""

import json

import pyarrow
import pytest
from datasets import Dataset, Features, LargeList, List, Value
from pyarrow import parquet

from patching.files.columns import UnusableText
from patching.files.texts import load_documents
from patching.running.calibration import Calibration


def jsonl(path, values, column="text"):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "holds_tokens", "message"),
    [
        ([None, ["a"], ["a"]], False, "holds lists of string values in .* and no text"),
        ([None, 5], False, "holds int64 values"),
        (["a", 5], False, "holds mixed values"),
        (["a", None, {"b": "c"}], False, "holds mixed values"),
        ([None, {"b": "c"}], False, "holds dict values"),
        ([["a", "b"]], True, "holds lists of string values in .* and no lists of token ids"),
        ([[1, 2], [1.5]], True, "holds lists of float64 values"),
        ([[[1, 2], [3]]], True, "holds lists of lists of int64 values"),
        ([[True, False]], True, "holds lists of bool values"),
        ([None, "a b"], True, "holds string values"),
        ([[1, 2], None, [], [3, None]], True, "document 4 of .*a.jsonl holds None"),
    ],
)
def test_other_values_are_refused(tmp_path, values, holds_tokens, message, streaming):
    path = jsonl(tmp_path / "a.jsonl", values)
    flag = "tokens_column" if holds_tokens else "text_column"
    with pytest.raises(UnusableText, match=f"^{flag}=text: .*{message}.*; correct it"):
        list(load_documents(path, streaming=streaming, holds_tokens=holds_tokens))


@pytest.mark.parametrize("streaming", [False, True])
def test_all_types_of_text_and_of_token_ids_are_taken(tmp_path, streaming):
    ids = [[1, 2], None, [], [3]]
    features = {f"list of {kind}": List(Value(kind)) for kind in ("uint16", "int32", "int64")}
    features["large list"] = LargeList(Value("int64"))
    data = Dataset.from_dict(dict.fromkeys(features, ids), features=Features(features))
    data.to_parquet(tmp_path / "ids.parquet")
    for name in features:
        path, settings = str(tmp_path / "ids.parquet"), {"streaming": streaming}
        documents = load_documents(path, text_column=name, holds_tokens=True, **settings)
        assert [document["text"] for document in documents] == ids
    texts = pyarrow.array(["a", None, "b"], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet")
    documents = load_documents(str(tmp_path / "texts.parquet"), streaming=streaming)
    assert [document["text"] for document in documents] == ["a", None, "b"]
    nothing = jsonl(tmp_path / "nothing.jsonl", [[], []])
    assert len(list(load_documents(nothing, streaming=streaming, holds_tokens=True))) == 2


def test_the_other_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,number\na,1\nb,2\n")
    with pytest.raises(UnusableText, match="int64 values in .*; correct it, or choose one of text"):
        load_documents(str(path), text_column="number")


def test_a_stream_without_types_is_checked_as_it_is_read(tmp_path):
    """CSV is read in parts of 10,000 lines, and the second part holds numbers alone."""
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a\n" * 10_000 + "5\n" * 3)
    documents = load_documents(str(path), streaming=True)
    assert documents.features is None
    with pytest.raises(UnusableText, match="document 10,001 of .* is 5, which is no text"):
        list(documents)
    reader = iter(documents)
    for _ in range(7):
        next(reader)
    documents.load_state_dict(documents.state_dict())
    with pytest.raises(UnusableText, match="document 10,001 of"):
        list(documents)


def test_calibration_text_is_checked_too(tmp_path):
    with pytest.raises(UnusableText, match="text_column=text: it holds lists of string values"):
        Calibration.read(jsonl(tmp_path / "a.jsonl", [None, ["a"]]))
