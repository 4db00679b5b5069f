"""A table of bad inputs, and the folder that each of them damages.

Every line of the table is one input: what it is, the command, the flags added to those of COMMANDS
(a later flag replaces an earlier one), what is done to the folder before, and words that the message
must contain. `tests/test_bad_inputs.py` runs them all. To add an input, add a line.

The commands run in a folder with `teacher` (a qwen3 of 6 layers, weights in several files), its
`student` (kept layers 0,2,3,5, so layers 0 and 2 are patchable), `text.jsonl`, `tasks` with the task
`choice`, `chats.jsonl`, and `results` of a sweep.
"""

import gzip
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

PAIR = "--teacher_model_name_or_path teacher --student_model_name_or_path student"
TRAINED = "--teacher_model_name_or_path teacher --dataset text.jsonl --max_length 32"
MEASURED = f"{PAIR} --calibration text.jsonl --save_directory out --dtype float32"
COMMANDS = {
    "patching.patch": f"{PAIR} --num_layers_to_patch 1 --save_directory out",
    "patching.orders": MEASURED,
    "patching.similarity": MEASURED,
    "train.train": f"{TRAINED} --save_directory out --max_steps 1 --bf16 False "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --disable_tqdm True",
    "train.weight_delta": "--student student --teacher_from teacher --teacher_to teacher "
    "--save_directory out",
    "train.cache_teacher": f"{TRAINED} --teacher_cache cache --bf16 False",
    "evaluate.evaluate": f"{PAIR} --save_directory out --tasks choice --include_path tasks "
    "--num_layers_to_patch 1 --dtype float32",
    "evaluate.report": "--save_directory=out results",
}
PATCH, ORDERS, SIMILARITY, TRAIN, DELTA, CACHE, EVALUATE, REPORT = COMMANDS

Prepare = Callable[[Path], object]


class BadInput(NamedTuple):
    name: str
    command: str
    flags: str
    """Added to those of COMMANDS, as a shell splits them. `-NAME` takes a flag out of these."""
    prepare: Prepare | None
    """Damages the folder before the command runs."""
    words: tuple[str, ...]
    """What the one line must contain: the value, what is allowed, and what to do."""
    environment: dict[str, str] = {}


# How folders are prepared -------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Prepare:
    """Write a file, in new folders if need be."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def edit(name: str, **changes: Any) -> Prepare:
    """Change fields of a JSON file. Those set to `...` are taken out."""

    def prepare(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return prepare


def remove(*patterns: str) -> Prepare:
    """Remove files and folders that match the patterns."""

    def prepare(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def several(*steps: Prepare) -> Prepare:
    return lambda folder: [step(folder) for step in steps]


def weights(change: Callable[[bytes], bytes], model: str = "teacher") -> Prepare:
    """Change the bytes of a model's second weights file."""

    def prepare(folder: Path) -> None:
        path = sorted((folder / model).glob("*.safetensors"))[1]
        path.write_bytes(change(path.read_bytes()))

    return prepare


def header(change: Callable[[str], str]) -> Prepare:
    """Change the text of the header of the teacher's second weights file."""

    def with_header(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return weights(with_header)


def first_entry(**changes: Any) -> Prepare:
    """Change the header's entry of the first tensor."""

    def change(text: str) -> str:
        values = json.loads(text)
        name = next(name for name in values if name != "__metadata__")
        values[name] |= changes
        return json.dumps(values)

    return header(change)


def repeated(text: str) -> str:
    """The header with the first tensor twice."""
    name = next(name for name in json.loads(text) if name != "__metadata__")
    return f'{{"{name}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, {text[1:]}'


def moved(by: int) -> Prepare:
    """Move the second tensor's offsets, so that it overlaps the first or leaves a hole."""

    def change(text: str) -> str:
        values = json.loads(text)
        entries = [entry for name, entry in values.items() if name != "__metadata__"]
        entries.sort(key=lambda entry: entry["data_offsets"])
        entries[1]["data_offsets"] = [offset + by for offset in entries[1]["data_offsets"]]
        return json.dumps(values)

    return header(change)


def sparse(name: str, num_bytes: int, start: bytes = b"") -> Prepare:
    """Make a file of many bytes that take no room on the disk."""

    def prepare(folder: Path) -> None:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, num_bytes)

    return prepare


def index(**changes: Any) -> Prepare:
    return edit("teacher/model.safetensors.index.json", **changes)


def student_layers(copied: Any, pruned: Any, **more: Any) -> Prepare:
    values = {"copied_teacher_layers": copied, "pruned_teacher_layers": pruned} | more
    return write("student/student_config.json", json.dumps(values))


class Runs:
    """An object whose pickle makes a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def pickled(folder: Path) -> None:
    """Put code in place of the teacher's weights."""
    remove("teacher/*.safetensors*")(folder)
    torch.save({"x": Runs()}, folder / "teacher/pytorch_model.bin")


def other_tokenizer(num_tokens: int) -> Prepare:
    """Give the teacher a tokenizer with other tokens than its embedding has."""

    def prepare(folder: Path) -> None:
        path = folder / "teacher/tokenizer.json"
        values = json.loads(path.read_text())
        vocab = values["model"]["vocab"]
        vocab |= {f"token{i}": i for i in range(len(vocab), num_tokens)}
        path.write_text(json.dumps(values))

    return prepare


def archive(name: str, **arrays: Any) -> Prepare:
    """Write a NumPy archive, with pickled objects in it if the arrays hold any."""
    content = io.BytesIO()
    numpy.savez(content, **arrays)
    return write(name, content.getvalue())


def zipped(name: str, inner_name: str, content: bytes) -> Prepare:
    """Write a ZIP archive of one file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(inner_name, content)
    return write(name, data.getvalue())


def damaged_cache(**values: Any) -> Prepare:
    return several(
        write("teacher_cache/cache.json", json.dumps(values)),
        write("teacher_cache/rows-00000.safetensors", b"\0" * 40),
    )


def folders(*names: str) -> Prepare:
    return lambda folder: [(folder / name).mkdir(parents=True) for name in names]


def link(name: str, target: str) -> Prepare:
    return lambda folder: (folder / name).symlink_to(target)


def results_copied(folder: Path) -> None:
    shutil.copytree(folder / "results", folder / "more")


NPY_OF_EXABYTES = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000000,), }".ljust(117)
    + b"\n"
)
BINARY = bytes(range(256)) * 4
LATIN = "caf\xe9".encode("latin-1")
DEEP = "[" * 100_000 + "]" * 100_000
HUGE_LENGTH = struct.pack("<Q", 2**63)
ORDER = "--order order.json"
CHATS = "--sft_dataset chats.jsonl --sft_heldout_chats 0"
TEMPLATE = write(
    "teacher/chat_template.jinja", "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
)
CONFIG, INDEX = "teacher/config.json", "teacher/model.safetensors.index.json"
LAYERS = "student/student_config.json"
RESULT, DOCUMENTS = "results/family_k0.json", "results/documents/family_k0.npz"
MERGED = "--baselines laco --calibration text.jsonl"
NO_STUDENT = "is not a valid student config"
DAMAGED = ("is damaged", "download or save it again")

# The table ----------------------------------------------------------------------------------------

# fmt: off
TABLE = [
    # patching.patch: flags and contradictions
    BadInput("k beyond the teacher", PATCH, "--num_layers_to_patch 3", None, ("num_layers_to_patch=3", "2 patchable layers", "choose 0-2")),
    BadInput("negative k", PATCH, "--num_layers_to_patch=-1", None, ("num_layers_to_patch=-1", "choose 0-2")),
    BadInput("k in words", PATCH, "--num_layers_to_patch two", None, ("num_layers_to_patch=two", "write numbers and ranges such as")),
    BadInput("a range backwards", PATCH, "--num_layers_to_patch 2-0", None, ("num_layers_to_patch=2-0", "such as 4, 1,3,5 or 0-5")),
    BadInput("a range without end", PATCH, "--num_layers_to_patch 0-99999999999", None, ("num_layers_to_patch=99999999999", "at most")),
    BadInput("one of several k beyond", PATCH, "--num_layers_to_patch 0,7", None, ("num_layers_to_patch=0,7", "choose 0-2")),
    BadInput("k of 5,000 digits", PATCH, f"--num_layers_to_patch {'9' * 5000}", None, ("num_layers_to_patch=9", "at most")),
    BadInput("no size", PATCH, "-num_layers_to_patch", None, ("name one size with --num_layers_to_patch",)),
    BadInput("two sizes", PATCH, "--target_params 3B", None, ("name one size", "not both --num_layers_to_patch and --target_params")),
    BadInput("a number of parameters in another unit", PATCH, "-num_layers_to_patch --target_params 3X", None, ("target_params=3X", "such as 350M or 3.1B")),
    BadInput("bytes in another unit", PATCH, "-num_layers_to_patch --target_bytes 6XB", None, ("target_bytes=6XB", "such as 500MB, 6GB or 6GiB")),
    BadInput("no bytes", PATCH, "-num_layers_to_patch --target_bytes 0", None, ("target_bytes=0", "write a size such as")),
    BadInput("fewer bytes than the student has", PATCH, "-num_layers_to_patch --target_bytes 5", None, ("target_bytes=5", "the smallest takes")),
    BadInput("memory without context", PATCH, "-num_layers_to_patch --target_memory 1GB", None, ("--target_memory needs --context",)),
    BadInput("a context of nothing", PATCH, "-num_layers_to_patch --target_memory 1GB --context 0", None, ("context=0", "choose 1 or more")),
    BadInput("a batch of nothing", PATCH, "-num_layers_to_patch --target_memory 1GB --context 9 --batch 0", None, ("batch=0", "choose 1 or more")),
    BadInput("a context with nothing to limit", PATCH, "--context 5", None, ("--context belongs to --target_memory or --list",)),
    BadInput("a layer that does not exist", PATCH, "-num_layers_to_patch --patched_layers 9", None, ("patched_layers=9", "layers 0-3")),
    BadInput("a layer without a number", PATCH, "-num_layers_to_patch --patched_layers ,", None, ("patched_layers=,", "write numbers and ranges")),
    BadInput("an unknown dtype", PATCH, "--dtype float64", None, ("float64", "bfloat16")),
    BadInput("weights files of no bytes", PATCH, "--max_shard_size 0GB", None, ("max_shard_size=0GB", "write a size such as")),
    BadInput("a flag that does not exist", PATCH, "--no_such 3", None, ("--no_such 3", "--help lists every flag")),
    BadInput("a flag without its value", PATCH, "--revision", None, ("--revision", "expected one argument")),
    BadInput("a number that is none", PATCH, "--batch many", None, ("--batch", "invalid int value: 'many'")),
    BadInput("listing into a hub repository", PATCH, "-num_layers_to_patch --list --push_to_hub me/x", None, ("--list builds nothing", "leave out --push_to_hub")),
    BadInput("JSON of nothing", PATCH, "--json", None, ("--json belongs to --list",)),
    BadInput("publishing nothing", PATCH, "--public", None, ("--public belongs to --push_to_hub",)),
    BadInput("publishing several", PATCH, "--num_layers_to_patch all --push_to_hub me/x", None, ("--push_to_hub uploads one model", "name one size")),
    BadInput("listing one size", PATCH, "--list", None, ("--list shows every size", "leave out --num_layers_to_patch")),
    BadInput("nowhere to save", PATCH, "-save_directory", None, ("--save_directory is required",)),
    BadInput("several processes", PATCH, "", None, ("2 processes were started", "leave out torchrun"), {"WORLD_SIZE": "2"}),
    BadInput("a number of processes in words", PATCH, "", None, ("WORLD_SIZE=two", "sets this to a number", "unset it"), {"WORLD_SIZE": "two"}),
    BadInput("kept layers that are not the student's", PATCH, "--kept_layers 0,2", None, ("kept_layers=0,2", "the student has 4 layers")),
    BadInput("kept layers without the first", PATCH, "--kept_layers 1,2,3,5", None, ("kept layers [1, 2, 3, 5]", "must start at 0")),
    BadInput("kept layers in words", PATCH, "--kept_layers all", None, ("kept_layers=all", "write numbers and ranges")),
    BadInput("kept layers beyond all numbers", PATCH, f"--kept_layers 0-{10**15}", None, ("kept_layers=1000000000000000", "at most")),

    # patching.patch: where to save
    BadInput("into a file", PATCH, "--save_directory text.jsonl", None, ("text.jsonl is a file", "name a folder")),
    BadInput("into a folder below a file", PATCH, "--save_directory text.jsonl/out", None, ("text.jsonl is not a folder",)),
    BadInput("into a full folder", PATCH, "--save_directory teacher", None, ("teacher is not empty", "name another folder")),
    BadInput("into a name that is not UTF-8", PATCH, "--save_directory a\udcff", None, ("a\\xff: its name is not UTF-8", "name another folder")),
    BadInput("into a link to itself", PATCH, "--save_directory loop", link("loop", "loop"), ("loop", "name another folder")),
    BadInput("into a name too long", PATCH, f"--save_directory {'x' * 300}", None, ("xxx", "File name too long")),
    BadInput("where nothing can be written", PATCH, "--save_directory /proc/out", None, ("/proc/out cannot be written to", "choose another folder")),
    BadInput("one of several folders in use", PATCH, "--num_layers_to_patch all", write("out/k1/file", "x"), ("k1 is not empty", "name another folder")),

    # The order of layers
    BadInput("an order that is none", PATCH, "--order sideways", None, ("order=sideways", "choose last, first")),
    BadInput("two orders", PATCH, "--order last --patch_first_k_layers", None, ("--order last and --patch_first_k_layers", "give one of them")),
    BadInput("a search without text", PATCH, "--order klpatch", None, ("--order klpatch is measured on text", "--calibration")),
    BadInput("text without a search", PATCH, "--calibration text.jsonl", None, ("--calibration belongs to --order klpatch",)),
    BadInput("a search for named layers", PATCH, "-num_layers_to_patch --patched_layers 0 --order klpatch --calibration text.jsonl", None, ("leave out --order klpatch",)),
    BadInput("order.json: missing", PATCH, ORDER, None, ("order=order.json", "an existing JSON file")),
    BadInput("order.json: a folder", PATCH, ORDER, folders("order.json"), ("order=order.json", "an existing JSON file")),
    BadInput("order.json: empty", PATCH, ORDER, write("order.json", ""), ("order=order.json", "is not JSON")),
    BadInput("order.json: binary", PATCH, ORDER, write("order.json", BINARY), ("order=order.json", "is not JSON")),
    BadInput("order.json: truncated", PATCH, ORDER, write("order.json", '{"order": [0, 2'), ("order=order.json", "is not JSON")),
    BadInput("order.json: nested without end", PATCH, ORDER, write("order.json", DEEP), ("order=order.json", "is not JSON")),
    BadInput("order.json: no order in it", PATCH, ORDER, write("order.json", '{"layers": [0, 2]}'), ("order in order.json=None", "write a list of student layers")),
    BadInput("order.json: a number", PATCH, ORDER, write("order.json", "5"), ("order in order.json=5", "choose last or first")),
    BadInput("order.json: booleans", PATCH, ORDER, write("order.json", "[true, false]"), ("order in order.json", "write a list of student layers")),
    BadInput("order.json: a layer twice", PATCH, ORDER, write("order.json", "[0, 0, 2]"), ("order 0,0,2", "names a layer twice")),
    BadInput("order.json: a patchable layer missing", PATCH, ORDER, write("order.json", "[2]"), ("order 2", "leaves out the patchable layers 0")),
    BadInput("order.json: layers beyond the student", PATCH, ORDER, write("order.json", "[0, 2, 4]"), ("order 0,2,4", "has layers 0-3, not 4")),
    BadInput("order.json: found for other layers", PATCH, ORDER, write("order.json", '{"order": [0, 2], "settings": {"kept_layers": [0, 1, 2, 3]}}'), ("was found for kept_layers", "search one for it with patching.orders")),

    BadInput("order.json: 2 GB", PATCH, ORDER, sparse("order.json", 2 * 10**9), ("order=order.json", "it has 2,000,000,000 bytes", "at most")),
    BadInput("order.json: a million layers", PATCH, ORDER, write("order.json", str(list(range(10**6)))), ("order 0,1,2", "the student has layers 0-3, not 4,5,6")),
    BadInput("order.json: a text of a megabyte", PATCH, ORDER, write("order.json", json.dumps({"order": "x" * 10**6})), ("order in order.json=xxx", "choose last or first")),
    BadInput("order.json: a layer of 4,000 digits", PATCH, ORDER, write("order.json", f"[0, 2, {'9' * 4000}]"), ("order 0,2,999", "the student has layers 0-3, not 999")),
    BadInput("an order of 5,000 characters", PATCH, f"--order {'x' * 5000}", None, ("order=xxx", "choose last, first", "an existing JSON file")),

    # student_config.json
    BadInput("student_config.json: missing", PATCH, "", remove(LAYERS), ("student_config.json cannot be read", "or give --kept_layers")),
    BadInput("student_config.json: empty", PATCH, "", write(LAYERS, ""), (NO_STUDENT,)),
    BadInput("student_config.json: not JSON", ORDERS, "", write(LAYERS, "{copied: 1}"), (NO_STUDENT,)),
    BadInput("student_config.json: binary", EVALUATE, "", write(LAYERS, BINARY), (NO_STUDENT,)),
    BadInput("student_config.json: not UTF-8", SIMILARITY, "", write(LAYERS, b'{"a": "' + LATIN + b'"}'), (NO_STUDENT,)),
    BadInput("student_config.json: nested without end", PATCH, "", write(LAYERS, DEEP), (NO_STUDENT,)),
    BadInput("student_config.json: a list", PATCH, "", write(LAYERS, "[0, 2, 3, 5]"), (NO_STUDENT,)),
    BadInput("student_config.json: a list missing", PATCH, "", write(LAYERS, '{"copied_teacher_layers": [0]}'), ("student_config.json lacks the list 'pruned_teacher_layers'",)),
    BadInput("student_config.json: texts", PATCH, "", student_layers(["0", "2", "3", "5"], ["1", "4"]), (NO_STUDENT, "must hold whole numbers")),
    BadInput("student_config.json: fractions", PATCH, "", student_layers([0.0, 2.0, 3.0, 5.0], [1.0, 4.0]), (NO_STUDENT, "must hold whole numbers")),
    BadInput("student_config.json: unsorted", PATCH, "", student_layers([0, 3, 2, 5], [1, 4]), (NO_STUDENT, "must start at 0, increase")),
    BadInput("student_config.json: out of range", PATCH, "", student_layers([0, 2, 3, 9], [1, 4]), (NO_STUDENT, "every teacher layer exactly once")),
    BadInput("student_config.json: a layer twice", PATCH, "", student_layers([0, 2, 3, 5], [1, 4, 5]), (NO_STUDENT, "every teacher layer exactly once")),
    BadInput("student_config.json: negative", PATCH, "", student_layers([-1, 0, 1, 2], [3, 4]), (NO_STUDENT, "every teacher layer exactly once")),
    BadInput("student_config.json: fewer layers than the weights", PATCH, "", student_layers([0, 2, 5], [1, 3, 4]), ("the student has 4 layers", "names 3")),
    BadInput("student_config.json: more layers than the teacher", EVALUATE, "", student_layers([0, 2, 3, 5], [1, 4, 6]), ("the teacher has 6 layers", "names 7")),
    BadInput("student_config.json: nothing", PATCH, "", student_layers([], []), (NO_STUDENT, "must start at 0")),
    BadInput("student_config.json: an order of other layers", PATCH, "", student_layers([0, 2, 3, 5], [1, 4], patch_order=[7]), (NO_STUDENT, "has layers 0-3")),

    BadInput("student_config.json: 2 GB", PATCH, "", sparse(LAYERS, 2 * 10**9), (NO_STUDENT, "it has 2,000,000,000 bytes", "at most")),

    # Models
    BadInput("a teacher that is not there", PATCH, "--teacher_model_name_or_path nowhere", None, ("teacher_model_name_or_path=nowhere", "neither a model folder nor a hub repository")),
    BadInput("a student that is not there", ORDERS, "--student_model_name_or_path no/such", None, ("student_model_name_or_path=no/such", "neither a model folder nor a hub repository")),
    BadInput("a teacher without a name", PATCH, "--teacher_model_name_or_path ''", None, ("teacher_model_name_or_path=", "neither a model folder nor a hub repository")),
    BadInput("a name that no repository can have", PATCH, "--teacher_model_name_or_path a/b/c:d", None, ("teacher_model_name_or_path=a/b/c:d", "neither a model folder nor a hub repository")),
    BadInput("a file in place of a model", PATCH, "--teacher_model_name_or_path text.jsonl", None, ("teacher_model_name_or_path=text.jsonl", "neither a model folder nor a hub repository")),
    BadInput("an empty folder", PATCH, "--teacher_model_name_or_path empty", folders("empty"), ("teacher_model_name_or_path=empty", "neither a model folder nor a hub repository")),
    BadInput("GGUF in place of a model", PATCH, "--teacher_model_name_or_path gguf", write("gguf/model.gguf", b"GGUF" + BINARY), ("teacher_model_name_or_path=gguf", "neither a model folder nor a hub repository")),
    BadInput("an adapter in place of a model", TRAIN, "--teacher_model_name_or_path peft", write("peft/adapter_config.json", "{}"), ("teacher_model_name_or_path=peft", "neither a model folder nor a hub repository")),
    BadInput("teacher and student exchanged", PATCH, "--teacher_model_name_or_path student --student_model_name_or_path teacher --kept_layers 0-3", None, ("the student has 6 layers", "not made from this teacher")),
    BadInput("parents of different widths", PATCH, "", edit("student/config.json", hidden_size=64), ("hidden_size is 64 in the student and 32 in the teacher", "distilled from this teacher")),
    BadInput("config.json: not JSON", PATCH, "", write(CONFIG, "{model_type"), ("config.json is not JSON", "download or save it again")),
    BadInput("config.json: empty", TRAIN, "", write(CONFIG, ""), ("config.json is not JSON", "download or save it again")),
    BadInput("config.json: binary", CACHE, "", write(CONFIG, BINARY), ("config.json is not JSON", "download or save it again")),
    BadInput("config.json: 2 GB", PATCH, "", sparse(CONFIG, 2 * 10**9), ("config.json is not JSON (it has 2,000,000,000 bytes, and at most", "download or save it again")),
    BadInput("config.json: architectures that are a number", PATCH, "", edit(CONFIG, architectures=5), ("teacher_model_name_or_path=teacher", "architectures in its config.json is 5", "download or save it again")),
    BadInput("config.json: a name that is a number", PATCH, "", edit(CONFIG, _name_or_path=5), ("teacher_model_name_or_path=teacher", "_name_or_path in its config.json is 5", "download or save it again")),
    BadInput("config.json: a text model inside a text model", PATCH, "", edit(CONFIG, text_config={}), ("teacher_model_name_or_path=teacher", "its config.json names some", "download or save it again")),
    BadInput("config.json: a list", EVALUATE, "", write(CONFIG, "[]"), ("config.json holds no JSON object", "download or save it again")),
    BadInput("config.json: no kind of model", PATCH, "", edit(CONFIG, model_type=...), ("teacher_model_name_or_path=teacher", "model_type")),
    BadInput("config.json: an unknown kind of model", TRAIN, "", edit(CONFIG, model_type="qwen99"), ("teacher_model_name_or_path=teacher", "qwen99")),
    BadInput("config.json: a kind without layers to cut", PATCH, "", edit(CONFIG, model_type="t5"), ("model_type=t5", "is not supported", "choose one of")),
    BadInput("config.json: a width in words", PATCH, "", edit(CONFIG, hidden_size="wide"), ("teacher_model_name_or_path=teacher", "hidden_size")),
    BadInput("config.json: a negative vocabulary", PATCH, "", edit(CONFIG, vocab_size=-5), ("teacher_model_name_or_path=teacher", "config.json")),
    BadInput("config.json: no layers", PATCH, "", edit(CONFIG, num_hidden_layers=0, layer_types=...), ("teacher_model_name_or_path=teacher", "num_hidden_layers")),
    BadInput("config.json: a billion layers", TRAIN, "", edit(CONFIG, num_hidden_layers=10**9, layer_types=...), ("num_hidden_layers is 1000000000", "at most")),
    BadInput("config.json: a list of kinds too short", PATCH, "", edit(CONFIG, layer_types=["full_attention"]), ("teacher_model_name_or_path=teacher", "layer_types")),
    BadInput("config.json: an unknown activation", TRAIN, "", edit(CONFIG, hidden_act="wobble"), ("teacher_model_name_or_path=teacher", "wobble")),
    BadInput("config.json: heads that do not group", CACHE, "", edit(CONFIG, num_key_value_heads=0), ("teacher_model_name_or_path=teacher", "config.json")),
    BadInput("config.json: a dtype that is none", PATCH, "", edit(CONFIG, dtype="float99"), ("dtype in its config.json is float99", "write a dtype such as bfloat16")),
    BadInput("config.json: quantized", PATCH, "", edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), ("is quantized", "use the original")),
    BadInput("config.json: remote code", TRAIN, "", edit(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Config"}), ("teacher_model_name_or_path=teacher", "trust_remote_code")),
    BadInput("generation_config.json: not JSON", PATCH, "", write("teacher/generation_config.json", "{"), ("generation_config.json is not JSON", "download or save it again")),
    BadInput("generation_config.json: a token that is text", PATCH, "", write("teacher/generation_config.json", '{"pad_token_id": "0"}'), ("the teacher's generation_config.json cannot be read (TypeError", "download or save it again")),
    BadInput("generation_config.json: a list", PATCH, "", write("teacher/generation_config.json", "[]"), ("generation_config.json holds no JSON object",)),

    # Tokenizers
    BadInput("no tokenizer to save", PATCH, "", remove("teacher/tokenizer*"), ("the teacher teacher has no files of a tokenizer", "put its files next to the weights")),
    BadInput("no tokenizer to train with", TRAIN, "", remove("teacher/tokenizer*"), ("the tokenizer of teacher cannot be read",)),
    BadInput("tokenizer.json: not JSON", TRAIN, "", write("teacher/tokenizer.json", "{"), ("the tokenizer of teacher cannot be read", "download or save")),
    BadInput("tokenizer.json: binary", CACHE, "", write("teacher/tokenizer.json", BINARY), ("the tokenizer of teacher cannot be read", "download or save")),
    BadInput("tokenizer.json: another object", ORDERS, "", write("teacher/tokenizer.json", '{"a": 1}'), ("the tokenizer of teacher cannot be read", "download or save")),
    BadInput("tokenizer.json: truncated", EVALUATE, "", write("teacher/tokenizer.json", '{"version": "1.0", "model": {'), ("the tokenizer of teacher cannot be read", "download or save")),
    BadInput("tokenizer.json: empty", SIMILARITY, "", write("teacher/tokenizer.json", ""), ("the tokenizer of teacher cannot be read", "download or save")),
    BadInput("tokenizer_config.json: not JSON", PATCH, "", write("teacher/tokenizer_config.json", "{"), ("tokenizer_config.json is not JSON", "download or save it again")),
    BadInput("a tokenizer of another model to train with", TRAIN, "", other_tokenizer(400), ("has 400 tokens", "vocabulary has 257")),
    BadInput("a tokenizer of another model to cache with", CACHE, "", other_tokenizer(400), ("has 400 tokens", "vocabulary has 257")),
    BadInput("a tokenizer of another model to measure with", SIMILARITY, "", other_tokenizer(400), ("has 400 tokens", "vocabulary has 257")),
    BadInput("a tokenizer of another model to evaluate with", EVALUATE, "", other_tokenizer(400), ("has 400 tokens", "vocabulary has 257")),

    # safetensors
    BadInput("safetensors: empty", PATCH, "", weights(lambda data: b""), DAMAGED),
    BadInput("safetensors: truncated", PATCH, "", weights(lambda data: data[:-1]), DAMAGED),
    BadInput("safetensors: too long", PATCH, "", weights(lambda data: data + b"\0"), DAMAGED),
    BadInput("safetensors: an error page", PATCH, "", weights(lambda data: b"<html>502</html>" * 9), DAMAGED),
    BadInput("safetensors: a header of exabytes", PATCH, "", weights(lambda data: HUGE_LENGTH + data[8:]), DAMAGED),
    BadInput("safetensors: a header of 101 MB", PATCH, "", several(remove("teacher/*.safetensors*"), sparse("teacher/model.safetensors", 2 * 10**8, struct.pack("<Q", 101_000_000))), DAMAGED),
    BadInput("safetensors: a header of zeros", PATCH, "", several(remove("teacher/*.safetensors*"), sparse("teacher/model.safetensors", 10**8, struct.pack("<Q", 20_000_000))), DAMAGED),
    BadInput("safetensors: a header that is a list", PATCH, "", header(lambda text: "[1]"), DAMAGED),
    BadInput("safetensors: not UTF-8", PATCH, "", weights(lambda data: data[:9] + b"\xff\xfe" + data[11:]), DAMAGED),
    BadInput("safetensors: nested without end", PATCH, "", header(lambda text: DEEP), DAMAGED),
    BadInput("safetensors: a tensor twice", PATCH, "", header(repeated), ("duplicate key", *DAMAGED)),
    BadInput("safetensors: overlap", PATCH, "", moved(-4), ("overlaps another tensor", *DAMAGED)),
    BadInput("safetensors: a hole", PATCH, "", moved(4), ("leaves a hole", *DAMAGED)),
    BadInput("safetensors: negative offsets", PATCH, "", first_entry(data_offsets=[-8, 0]), ("invalid offsets", *DAMAGED)),
    BadInput("safetensors: offsets beyond the end", PATCH, "", first_entry(shape=[10**9], data_offsets=[0, 4 * 10**9]), DAMAGED),
    BadInput("safetensors: one offset", PATCH, "", first_entry(data_offsets=[0]), DAMAGED),
    BadInput("safetensors: offsets in words", PATCH, "", first_entry(data_offsets=["0", "4"]), DAMAGED),
    BadInput("safetensors: a shape of exabytes", PATCH, "", first_entry(shape=[2**40, 2**40]), DAMAGED),
    BadInput("safetensors: a negative shape", PATCH, "", first_entry(shape=[-1, -4]), ("invalid shape", *DAMAGED)),
    BadInput("safetensors: a shape of 400 digits", PATCH, "", first_entry(shape=[10**400]), ("invalid shape", *DAMAGED)),
    BadInput("safetensors: a shape of a million dimensions", PATCH, "", first_entry(shape=[2**62] * 10**6), ("invalid shape", *DAMAGED)),
    BadInput("safetensors: a shape of nothing", PATCH, "", first_entry(shape=None), DAMAGED),
    BadInput("safetensors: an unknown dtype", PATCH, "", first_entry(dtype="F31"), ("unknown dtype F31", *DAMAGED)),
    BadInput("safetensors: a list of dtypes", PATCH, "", first_entry(dtype=["F32"]), DAMAGED),
    BadInput("safetensors: truncated, to train", TRAIN, "", weights(lambda data: data[:-1]), ("its weights cannot be read", "download or save them again")),
    BadInput("safetensors: a header of exabytes, to train", TRAIN, "", weights(lambda data: HUGE_LENGTH + data[8:]), ("its weights cannot be read", "download or save them again")),
    BadInput("safetensors: negative offsets, to cache", CACHE, "", first_entry(data_offsets=[-8, 0]), ("its weights cannot be read", "download or save them again")),
    BadInput("safetensors: a shape of exabytes, to measure", SIMILARITY, "", first_entry(shape=[2**40, 2**40]), ("its weights cannot be read", "download or save them again")),
    BadInput("safetensors: overlap, to train", TRAIN, "", moved(-4), ("its weights cannot be read", "download or save them again")),
    BadInput("safetensors: fewer rows than the config says", PATCH, "", several(edit(CONFIG, vocab_size=300), edit("student/config.json", vocab_size=300)), ("in the weights and", "in the config")),
    BadInput("a pickle with code in it", PATCH, "", pickled, ("holds more than tensors, which is never run",)),
    BadInput("a pickle with code in it, to train", TRAIN, "", pickled, ("holds more than tensors, which is never run",)),
    BadInput("no weights at all", CACHE, "", remove("teacher/*.safetensors*"), ("teacher", "no file named")),

    # Index files
    BadInput("index: empty", PATCH, "", write(INDEX, ""), DAMAGED),
    BadInput("index: a list", PATCH, "", write(INDEX, "[]"), DAMAGED),
    BadInput("index: not UTF-8", PATCH, "", write(INDEX, BINARY), DAMAGED),
    BadInput("index: no map", PATCH, "", index(weight_map=...), DAMAGED),
    BadInput("index: numbers", PATCH, "", index(weight_map={"a": 1}), DAMAGED),
    BadInput("index: names nothing", PATCH, "", index(weight_map={}), DAMAGED),
    BadInput("index: a file elsewhere", PATCH, "", index(weight_map={"a": "../../x"}), ("name files in its own folder", *DAMAGED)),
    BadInput("index: an absolute path", PATCH, "", index(weight_map={"a": "/etc/passwd"}), ("name files in its own folder", *DAMAGED)),
    BadInput("index: the folder itself", PATCH, "", index(weight_map={"a": ".."}), ("name files in its own folder", *DAMAGED)),
    BadInput("index: a file elsewhere, to train", TRAIN, "", index(weight_map={"a": "../../x"}), ("name files in its own folder", *DAMAGED)),
    BadInput("index: an absolute path, to cache", CACHE, "", index(weight_map={"a": "/etc/passwd"}), ("name files in its own folder", *DAMAGED)),
    BadInput("index: not JSON, to measure", SIMILARITY, "", write(INDEX, "{"), DAMAGED),
    BadInput("index: 2 GB", PATCH, "", sparse(INDEX, 2 * 10**9), ("it has 2,000,000,000 bytes", *DAMAGED)),
    BadInput("index of pickles: a file elsewhere", PATCH, "", several(remove("teacher/*.safetensors*"), write("teacher/pytorch_model.bin.index.json", '{"weight_map": {"a": "../../x"}}')), ("name files in its own folder", *DAMAGED)),
    BadInput("index: a file that is missing", PATCH, "", remove("teacher/model-00002-*"), ("is missing, but its index names it",)),
    BadInput("index: a file that is missing, to train", TRAIN, "", remove("teacher/model-00002-*"), ("is missing, but its index names it",)),

    # train.train: flags
    BadInput("a student into a name that is not UTF-8", TRAIN, "--save_directory a\udcff", None, ("a\\xff: its name is not UTF-8", "name another folder")),
    BadInput("no teacher", TRAIN, "-teacher_model_name_or_path", None, ("--teacher_model_name_or_path", "required")),
    BadInput("nowhere to save a student", TRAIN, "-save_directory", None, ("--save_directory is required",)),
    BadInput("rows of one token", TRAIN, "--max_length 1", None, ("max_length=1", "at least 2")),
    BadInput("a negative learning rate", TRAIN, "--learning_rate=-1", None, ("learning_rate=-1.0", "choose 0 or more")),
    BadInput("a learning rate that is no number", TRAIN, "--learning_rate nan", None, ("learning_rate=nan", "choose 0 or more")),
    BadInput("an infinite weight", TRAIN, "--kl_loss_weight inf", None, ("kl_loss_weight=inf", "choose 0 or more")),
    BadInput("a temperature of nothing", TRAIN, "--temperature 0", None, ("temperature=0.0", "choose a number above 0")),
    BadInput("a temperature that is no number", TRAIN, "--temperature nan", None, ("temperature=nan", "choose a number above 0")),
    BadInput("a beta beyond 1", TRAIN, "--adam_beta2 1.5", None, ("adam_beta2=1.5", "choose 0 or more, below 1")),
    BadInput("a negative weight decay", TRAIN, "--weight_decay=-0.1", None, ("weight_decay=-0.1", "choose 0 or more")),
    BadInput("a negative norm", TRAIN, "--max_grad_norm=-1", None, ("max_grad_norm=-1", "choose 0 or more")),
    BadInput("a negative seed", TRAIN, "--seed=-1", None, ("seed=-1", "choose 0 or more")),
    BadInput("a seed beyond 32 bits", TRAIN, "--seed 99999999999", None, ("seed=99999999999", "at most 4,294,967,295")),
    BadInput("no steps", TRAIN, "--max_steps 0", None, ("max_steps=0", "choose 1 or more")),
    BadInput("two lengths", TRAIN, "--num_train_epochs 2", None, ("--max_steps 1 and --num_train_epochs 2.0", "give one")),
    BadInput("no rows in a step", TRAIN, "--per_device_train_batch_size 0", None, ("per_device_train_batch_size=0", "choose 1 or more")),
    BadInput("two batches", TRAIN, "--global_batch_rows 4", None, ("--global_batch_rows", "give --global_batch_rows alone")),
    BadInput("tokens that are no rows", TRAIN, "-per_device_train_batch_size -gradient_accumulation_steps --global_batch_tokens 33", None, ("global_batch_tokens=33", "choose 32 or 64")),
    BadInput("no term of the loss", TRAIN, "--use_cross_entropy False --use_kl_loss False --use_cosine_loss False", None, ("every loss term is off",)),
    BadInput("a switch that is none", TRAIN, "--use_kl_loss perhaps", None, ("use_kl_loss", "perhaps")),
    BadInput("an unknown schedule", TRAIN, "--lr_scheduler_type stairs", None, ("stairs", "cosine")),
    BadInput("an unknown optimizer", TRAIN, "--optim magic", None, ("magic", "adamw_torch")),
    BadInput("an optimizer that is refused", TRAIN, "--optim galore_adamw", None, ("optim=galore_adamw", "choose one of")),
    BadInput("an unknown tracker", TRAIN, "--report_to notebook", None, ("report_to=notebook",)),
    BadInput("half precision on a CPU", TRAIN, "--fp16 True", None, ("fp16 needs a GPU", "leave it out")),
    BadInput("a dtype that is not saved", TRAIN, "--save_dtype int8", None, ("save_dtype", "int8", "bfloat16")),
    BadInput("no steps between lines of the log", TRAIN, "--logging_steps=0", None, ("logging_steps",)),
    BadInput("negative steps between checkpoints", TRAIN, "--save_steps=-5", None, ("save_steps=-5", "choose")),
    BadInput("no steps between checkpoints", TRAIN, "--save_steps=0", None, ("save_steps=0", "choose a number above 0")),
    BadInput("negative steps between evaluations", TRAIN, "--eval_steps=-5", None, ("eval_steps=-5", "choose")),
    BadInput("a flag that is refused", TRAIN, "--dataloader_num_workers 2", None, ("dataloader_num_workers is not available",)),
    BadInput("public without an upload", TRAIN, "--public True", None, ("public only applies with --push_to_hub",)),
    BadInput("a metric that is none", TRAIN, "--metric_for_best_model bleu", None, ("metric_for_best_model=bleu", "choose one of")),
    BadInput("an attention that is none", TRAIN, "--attn_implementation wishful", None, ("wishful",)),
    BadInput("attention within documents that see each other", TRAIN, "--attn_implementation varlen --packing cross", None, ("attn_implementation=varlen", "it is for --packing documents", "choose sdpa")),
    BadInput("a rank in words", TRAIN, "", None, ("RANK=first", "sets this to a number", "unset it"), {"RANK": "first"}),
    BadInput("a local rank in words", TRAIN, "", None, ("LOCAL_RANK=-", "unset it"), {"LOCAL_RANK": "-"}),
    BadInput("accelerator_config: not JSON", TRAIN, "--accelerator_config '{'", None, ("accelerator_config={", "is not JSON")),
    BadInput("evaluation on no rows at once", TRAIN, "--per_device_eval_batch_size 0", None, ("per_device_eval_batch_size=0", "choose 1 or more")),
    BadInput("passes that are no number", TRAIN, "-max_steps --num_train_epochs nan", None, ("num_train_epochs=nan", "choose a number above 0")),
    BadInput("no passes", TRAIN, "-max_steps --num_train_epochs 0 --gradient_accumulation_steps 900", None, ("num_train_epochs=0.0", "choose a number above 0")),
    BadInput("no steps between evaluations", TRAIN, "--eval_steps 0", None, ("eval_steps=0", "choose a number above 0, or --eval_strategy no")),
    BadInput("a compiler that is none", TRAIN, "--torch_compile_backend nonsense", None, ("torch_compile_backend=nonsense", "choose one of", "inductor")),
    BadInput("a mode of compiling that is none", TRAIN, "--torch_compile_mode nonsense --torch_compile_backend inductor", None, ("torch_compile_mode=nonsense", "choose one of", "max-autotune")),
    BadInput("a mode that the compiler does not read", TRAIN, "--torch_compile_mode max-autotune --torch_compile_backend eager", None, ("torch_compile_mode only applies with --torch_compile_backend inductor",)),
    BadInput("accelerator_config: steps", TRAIN, """--accelerator_config '{"gradient_accumulation_kwargs": {"num_steps": 4}}'""", None, ("num_steps is not available", "--gradient_accumulation_steps")),
    BadInput("accelerator_config: a setting that is none", TRAIN, """--accelerator_config '{"gradient_accumulation_kwargs": {"bogus": 1, "adjust_scheduler": true}}'""", None, ("bogus is not available", "adjust_scheduler is not available")),
    BadInput("checkpointing of nothing", TRAIN, """--activation_checkpointing True --activation_checkpointing_kwargs '{"bogus": 1}'""", None, ("activation_checkpointing_kwargs: bogus", "choose from every_n_layers")),
    BadInput("lr_scheduler_kwargs: not JSON", TRAIN, "--lr_scheduler_kwargs '{bad'", None, ("lr_scheduler_kwargs={bad is not JSON",)),
    BadInput("lr_scheduler_kwargs: a list", TRAIN, "--lr_scheduler_kwargs '[1]'", None, ("lr_scheduler_kwargs=[1]", "not a JSON object")),
    BadInput("momentum in words", TRAIN, "--optim sgd --optim_args momentum=abc", None, ("`momentum=abc` is not momentum=VALUE", "a number")),
    BadInput("a plan of momentum without a value", TRAIN, "--dry_run --optim sgd --optim_args momentum", None, ("`momentum` is not momentum=VALUE", "a number")),
    BadInput("FSDP of another kind", TRAIN, "--fsdp hybrid_shard", None, ("fsdp=hybrid_shard", "choose True", "--fsdp_replicas")),
    BadInput("a plan of more groups than ranks", TRAIN, "--dry_run --dry_run_ranks 4 --fsdp_config teacher --fsdp_replicas 8", None, ("fsdp_replicas=8", "4 ranks do not form")),
    BadInput("a plan of uneven groups", TRAIN, "--dry_run --dry_run_ranks 4 --fsdp_config teacher --fsdp_replicas 3", None, ("fsdp_replicas=3", "choose a divisor of the ranks")),
    BadInput("a name of a run that nothing reads", TRAIN, "--run_name a --report_to tensorboard", None, ("run_name only applies with --report_to comet_ml",)),
    BadInput("models to measure without an order", TRAIN, "--measure_order False --order_budget 3", None, ("order_budget has no effect with --measure_order False",)),
    BadInput("documents for no order", TRAIN, "--measure_order False --order_documents 3", None, ("order_documents has no effect with --measure_order False",)),
    BadInput("two columns", TRAIN, "--text_column a --tokens_column b", None, ("text_column has no effect with --tokens_column",)),
    BadInput("a column of plain text", TRAIN, "--dataset a.txt --text_column a", write("a.txt", "a\n"), ("text_column has no effect on .txt files",)),
    BadInput("a configuration and a split of a file", TRAIN, "--dataset_config a --dataset_split b", None, ("dataset_config has no effect on local text", "dataset_split has no effect on local text")),
    BadInput("held out twice", TRAIN, "--eval_dataset text.jsonl --heldout_documents 3", None, ("heldout_documents has no effect with a local --eval_dataset",)),
    BadInput("FP8 without a teacher", TRAIN, "--teacher_fp8 --teacher_cache nowhere", None, ("teacher_fp8 has no effect with --teacher_cache",)),
    BadInput("text: a stream counted in passes", TRAIN, "--streaming True -max_steps --num_train_epochs 2", None, ("a stream has no length", "--max_steps in place of --num_train_epochs")),
    BadInput("a student over a model", TRAIN, "--save_directory student", None, ("student already holds a model", "name another --save_directory")),
    BadInput("more layers than there are", TRAIN, "--first_layers_to_keep 9", None, ("first_layers_to_keep=9", "choose 1-6")),
    BadInput("every 0th layer", TRAIN, "--alternate_every_n_layers 0", None, ("alternate_every_n_layers=0", "choose 1-6")),
    BadInput("layers named twice over", TRAIN, "--kept_layers 0,3 --last_layers_to_keep 1", None, ("--kept_layers already names every layer", "leave out")),
    BadInput("layers chosen without text", TRAIN, "--kept_layers auto", None, ("--kept_layers auto needs text", "--calibration")),
    BadInput("text without a choice", TRAIN, "--calibration text.jsonl", None, ("--calibration only applies with --kept_layers auto",)),
    BadInput("a size without a choice", TRAIN, "--num_kept_layers 3", None, ("--num_kept_layers only applies with --kept_layers auto",)),
    BadInput("a choice of 99 layers", TRAIN, "--kept_layers auto --calibration text.jsonl --num_kept_layers 99", None, ("num_kept_layers=99",)),
    BadInput("a choice of few parameters", TRAIN, "--kept_layers auto --calibration text.jsonl --target_params 5", None, ("target_params=5", "the smallest student")),
    BadInput("blocks of nothing", TRAIN, "--kept_layers auto --calibration text.jsonl --longest_block 0", None, ("longest_block=0", "choose 1 or more")),

    # train.train: --fsdp_config
    BadInput("fsdp_config: missing", TRAIN, "--fsdp_config fsdp.json", None, ("fsdp_config=fsdp.json", "no such file")),
    BadInput("fsdp_config: not JSON", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", "{"), ("fsdp_config=fsdp.json", "is not JSON")),
    BadInput("fsdp_config: binary", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", BINARY), ("fsdp_config=fsdp.json", "is not JSON")),
    BadInput("fsdp_config: a list", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", "[]"), ("fsdp_config=fsdp.json", "not a JSON object")),
    BadInput("fsdp_config: an unknown setting", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", '{"speed": 9}'), ("speed is not a setting of FSDP2", "choose from")),
    BadInput("fsdp_config: an older version", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", '{"version": 1}'), ("version=1", "choose 2")),
    BadInput("fsdp_config: nested without end", TRAIN, "--fsdp_config fsdp.json", write("fsdp.json", DEEP), ("fsdp_config=fsdp.json", "is not JSON")),
    BadInput("fsdp_config: 2 GB", TRAIN, "--fsdp_config fsdp.json", sparse("fsdp.json", 2 * 10**9), ("fsdp_config=fsdp.json", "it has 2,000,000,000 bytes")),
    BadInput("fsdp_config: no model", TRAIN, "--fsdp_config no/such", None, ("fsdp_config=no/such", "neither a .json file nor a model")),
    BadInput("fsdp_config: a model with a damaged config", TRAIN, "--fsdp_config bad", write("bad/config.json", '{"model_type": "qwen3", "hidden_size": "x"}'), ("fsdp_config=bad", "neither a .json file nor a model")),

    # train.train: checkpoints
    BadInput("a checkpoint that is not there", TRAIN, "--resume_from_checkpoint nowhere", None, ("resume_from_checkpoint=nowhere", "no checkpoint there")),
    BadInput("checkpoint: a damaged record", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", "{}"), write("c/optimizer.pt", ""), write("c/made_by.json", "{")), ("made_by.json", "is damaged")),
    BadInput("checkpoint: another record", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", "{}"), write("c/optimizer.pt", ""), write("c/made_by.json", "[]")), ("made_by.json", "is damaged")),
    BadInput("checkpoint: a binary record", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", "{}"), write("c/optimizer.pt", ""), write("c/made_by.json", BINARY)), ("made_by.json", "is damaged")),
    BadInput("checkpoint: a truncated state", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", '{"global_st'), write("c/optimizer.pt", "")), ("trainer_state.json is damaged", "remove it")),
    BadInput("checkpoint: a truncated position", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", "{}"), write("c/optimizer.pt", ""), write("c/stream.json", "[")), ("stream.json is damaged", "remove it")),
    BadInput("checkpoint: a state of 2 GB", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", ""), sparse("c/trainer_state.json", 2 * 10**9)), ("trainer_state.json is damaged (it has 2,000,000,000 bytes", "remove it")),
    BadInput("checkpoint: an empty optimizer", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", '{"global_step": 2}'), write("c/optimizer.pt", "")), ("optimizer.pt is damaged", "resume from an earlier checkpoint")),
    BadInput("checkpoint: weights without a header", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", '{"global_step": 2}'), write("c/optimizer.pt", ""), write("c/model.safetensors", "")), ("model.safetensors is damaged", "resume from an earlier checkpoint")),
    BadInput("checkpoint: steps in words", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", '{"global_step": "2"}'), write("c/optimizer.pt", "")), ("global_step is str, not int", "resume from an earlier checkpoint")),
    BadInput("checkpoint: only a model", TRAIN, "--resume_from_checkpoint c", write("c/trainer_state.json", "{}"), ("resume_from_checkpoint=c", "holds only the model")),
    BadInput("checkpoint: of other settings", TRAIN, "--resume_from_checkpoint c", several(write("c/trainer_state.json", "{}"), write("c/optimizer.pt", ""), write("c/made_by.json", '{"seed": 5}')), ("seed was 5 and is 0", "start over in another --output_dir")),

    # Text to train on
    BadInput("text: missing", TRAIN, "--dataset nowhere.jsonl", None, ("dataset=nowhere.jsonl", "neither a file or folder here nor a hub dataset")),
    BadInput("text: empty", TRAIN, "", write("text.jsonl", ""), ("dataset=text.jsonl", "there is no text in it")),
    BadInput("text: blank", TRAIN, "--dataset a.txt", write("a.txt", "\n \n\n"), ("dataset=a.txt", "there is no text in it")),
    BadInput("text: binary JSON", TRAIN, "", write("text.jsonl", BINARY), ("dataset=text.jsonl", "cannot be read as json")),
    BadInput("text: truncated JSON", CACHE, "", write("text.jsonl", '{"text": "a b c"}\n{"text": "d'), ("dataset=text.jsonl", "cannot be read as json")),
    BadInput("text: not UTF-8", TRAIN, "--dataset a.txt", write("a.txt", LATIN * 50), ("dataset=a.txt", "cannot be read as text")),
    BadInput("text: not Parquet", TRAIN, "--dataset a.parquet", write("a.parquet", BINARY), ("dataset=a.parquet", "cannot be read as parquet")),
    BadInput("text: truncated gzip", TRAIN, "--dataset a.txt.gz", write("a.txt.gz", gzip.compress(b"words " * 500)[:-20]), ("dataset=a.txt.gz", "cannot be read as text")),
    BadInput("text: not zstandard", TRAIN, "--dataset a.jsonl.zst", write("a.jsonl.zst", BINARY), ("dataset=a.jsonl.zst", "cannot be read as json")),
    BadInput("text: an unknown kind", TRAIN, "--dataset a.docx", write("a.docx", BINARY), ("dataset=a.docx", "name a .txt, .jsonl, .csv or .parquet file")),
    BadInput("text: several kinds", CACHE, "--dataset texts", several(write("texts/a.txt", "a"), write("texts/b.csv", "text\nb")), ("dataset=texts", "a folder of one kind")),
    BadInput("text: no such column", TRAIN, "--text_column body", None, ("text_column=body", "has the columns text")),
    BadInput("text: a column of numbers", TRAIN, "", write("text.jsonl", '{"text": 5}\n{"text": 6}\n'), ("text_column=text", "int64 values", "correct it")),
    BadInput("text: lists after no value", TRAIN, "", write("text.jsonl", '{"text": null}\n' + '{"text": ["a"]}\n' * 30), ("text_column=text", "lists of string values", "no text")),
    BadInput("text: numbers after no value, in a stream", TRAIN, "--streaming True", write("text.jsonl", '{"text": null}\n' + '{"text": 5}\n' * 30), ("text_column=text", "int64 values", "correct it")),
    BadInput("text: numbers among text", TRAIN, "", write("text.jsonl", '{"text": "a"}\n{"text": 5}\n' * 30), ("text_column=text", "mixed values", "correct it")),
    BadInput("text: token ids in words", TRAIN, "--tokens_column ids", write("text.jsonl", '{"ids": ["a", "b"]}\n' * 30), ("tokens_column=ids", "lists of string values", "no lists of token ids")),
    BadInput("text: token ids that are floats, in a stream", TRAIN, "--tokens_column ids --streaming True", write("text.jsonl", '{"ids": [1.5, 2.5]}\n' * 30), ("tokens_column=ids", "lists of float64 values", "no lists of token ids")),
    BadInput("text: token ids that are true or false", TRAIN, "--tokens_column ids", write("text.jsonl", '{"ids": [true, false]}\n' * 30), ("tokens_column=ids", "lists of bool values", "no lists of token ids")),
    BadInput("text: lists of lists", CACHE, "--tokens_column ids", write("text.jsonl", '{"ids": [[1, 2], [3]]}\n' * 30), ("tokens_column=ids", "lists of lists of int64 values")),
    BadInput("text: a gap in token ids", TRAIN, "--tokens_column ids", write("text.jsonl", '{"ids": [1, 2]}\n' * 30 + '{"ids": [1, null]}\n'), ("tokens_column=ids: document 31 of", "holds None", "leave it out")),
    BadInput("text: a gap in token ids of a stream", CACHE, "--tokens_column ids --streaming True --max_rows 2", write("text.jsonl", '{"ids": [1, 2]}\n' * 30 + '{"ids": [1, null]}\n'), ("tokens_column=ids: document 31 of", "holds None", "leave it out")),
    BadInput("text: numbers in a CSV stream", TRAIN, "--streaming True --dataset a.csv --text_column n", write("a.csv", "text,n\n" + "a,5\n" * 30), ("text_column=n", "document 1 of a.csv is 5, which is no text")),
    BadInput("text: token ids beyond the tokenizer", TRAIN, "--tokens_column ids", write("text.jsonl", '{"ids": [1, 9999]}\n' * 30), ("tokens_column", "0 to 256")),
    BadInput("text: a mixture of one", TRAIN, "--dataset text.jsonl=1", None, ("dataset=text.jsonl=1", "needs no weight")),
    BadInput("text: a weight that is none", TRAIN, "--dataset a.txt=much,b.txt=0.5", None, ("`a.txt=much` is not NAME=WEIGHT",)),
    BadInput("text: too little for a step", TRAIN, "--gradient_accumulation_steps 900", None, ("a step takes 1,800",)),
    BadInput("text: one document", TRAIN, "", write("text.jsonl", '{"text": "a b c"}\n'), ("single document", "--heldout_documents 0")),
    BadInput("text: an endless stream", TRAIN, "--streaming True --max_steps=-1", None, ("max_steps=-1", "a stream has no length")),
    BadInput("text: a stream that is binary", TRAIN, "--streaming True", write("text.jsonl", BINARY), ("dataset=text.jsonl", "cannot be read as json")),
    BadInput("text: a buffer of nothing", TRAIN, "--shuffle_buffer 0", None, ("shuffle_buffer=0", "choose 1 or more")),
    BadInput("text: an unknown packing", TRAIN, "--packing tight", None, ("packing", "tight", "documents")),
    BadInput("text: fewer than no documents held out", TRAIN, "--heldout_documents=-1", None, ("heldout_documents=-1", "choose 0 or more")),

    # train.train: chats
    BadInput("chats: missing", TRAIN, "--sft_dataset nowhere.jsonl", TEMPLATE, ("sft_dataset=nowhere.jsonl", "neither a file or folder here nor a hub dataset")),
    BadInput("chats: empty", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", "")), ("sft_dataset=chats.jsonl", "there is no text in it")),
    BadInput("chats: binary", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", BINARY)), ("sft_dataset=chats.jsonl cannot be read as json", "download or save it again")),
    BadInput("chats: plain text", TRAIN, "--sft_dataset chats.txt", several(TEMPLATE, write("chats.txt", "Hello.")), ("sft_dataset=chats.txt", "chats are in `messages`")),
    BadInput("chats: other columns", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", '{"prompt": "a"}\n')), ("sft_dataset=chats.jsonl", "has the columns prompt", "`prompt` and `completion`")),
    BadInput("chats: numbers", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", '{"messages": 5}\n')), ("sft_dataset=chats.jsonl", "it holds no messages", "raise --sft_max_refused")),
    BadInput("chats: no role", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", '{"messages": [{"content": "a"}]}\n')), ("sft_dataset=chats.jsonl", "it holds no messages", "raise --sft_max_refused")),
    BadInput("chats: only questions", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')), ("sft_dataset=chats.jsonl", "no message of the assistant", "raise --sft_max_refused")),
    BadInput("chats: an answer that is a list", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", '{"messages": [{"role": "assistant", "content": [{"x": 1}]}]}\n')), ("sft_dataset=chats.jsonl", "the chat template fails", "raise --sft_max_refused")),
    BadInput("chats: tools nested without end", TRAIN, CHATS, several(TEMPLATE, write("chats.jsonl", json.dumps({"messages": [{"role": "assistant", "content": "a"}], "tools": DEEP}) + "\n")), ("sft_dataset=chats.jsonl", "its tools are no JSON", "raise --sft_max_refused")),
    BadInput("chats: a damaged template", TRAIN, CHATS, write("teacher/chat_template.jinja", "{% for"), ("sft_dataset=chats.jsonl", "the chat template fails", "correct the chats or their template")),
    BadInput("chats: a template that runs code", TRAIN, CHATS, write("teacher/chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ("sft_dataset=chats.jsonl", "the chat template fails", "unsafe")),
    BadInput("chats without a template", TRAIN, CHATS, None, ("sft_dataset", "no chat template", "add it as chat_template.jinja")),
    BadInput("more than all steps on chats", TRAIN, f"{CHATS} --sft_share 2", TEMPLATE, ("sft_share=2", "up to 1")),
    BadInput("a share of refused chats that is no number", TRAIN, f"{CHATS} --sft_max_refused nan", TEMPLATE, ("sft_max_refused=nan", "choose a share from 0 to 1")),
    BadInput("a share of no chats", TRAIN, "--sft_share 0.2", None, ("--sft_share only applies with --sft_dataset",)),
    BadInput("chats and passes over the text", TRAIN, f"-max_steps --num_train_epochs 1 {CHATS}", TEMPLATE, ("sft_dataset", "give --max_steps and not --num_train_epochs")),

    # train.weight_delta
    BadInput("a cosine beyond 1", DELTA, "--min_cosine 2", None, ("min_cosine=2", "choose a cosine from -1 to 1")),
    BadInput("a cosine that is no number", DELTA, "--min_cosine nan", None, ("min_cosine=nan", "choose a cosine from -1 to 1")),
    BadInput("a delta over a model", DELTA, "--save_directory teacher", None, ("teacher is not empty", "name another folder")),
    BadInput("a delta from several processes", DELTA, "", None, ("2 processes were started", "leave out torchrun"), {"WORLD_SIZE": "2"}),
    BadInput("a delta without a student", DELTA, "-student", None, ("--student", "required")),
    BadInput("a delta of a model that is no student", DELTA, "--student teacher", None, ("student_config.json cannot be read",)),
    BadInput("a delta from a teacher that is not there", DELTA, "--teacher_from nowhere", None, ("teacher_from=nowhere", "neither a model folder nor a hub repository")),
    BadInput("a delta to a teacher that is not there", DELTA, "--teacher_to nowhere", None, ("teacher_to=nowhere", "neither a model folder nor a hub repository")),
    BadInput("a delta to a teacher of other depth", DELTA, "--teacher_to student", None, ("teacher_to=student", "it has 4 layers", "a teacher of 6")),
    BadInput("student_config.json: out of range, for a delta", DELTA, "", student_layers([0, 2, 3, 9], [1, 4]), (NO_STUDENT, "every teacher layer exactly once")),
    BadInput("config.json: sizes that do not fit, for a delta", DELTA, "", edit(CONFIG, num_key_value_heads=0), ("teacher_from=teacher", "cannot build a model of its config.json", "download or save it again")),
    BadInput("safetensors: truncated, for a delta", DELTA, "", weights(lambda data: data[:-1]), DAMAGED),
    BadInput("safetensors: a header of exabytes of a student, for a delta", DELTA, "", weights(lambda data: HUGE_LENGTH + data[8:], "student"), DAMAGED),
    BadInput("index: an absolute path, for a delta", DELTA, "", index(weight_map={"a": "/etc/passwd"}), ("name files in its own folder", *DAMAGED)),
    BadInput("teachers whose weights are no numbers", DELTA, "", weights(lambda data: data[:-4096] + b"\xff" * 4096), ("holds numbers that are not finite", "download or save")),

    # train.cache_teacher, and its folder
    BadInput("no tokens per prediction", CACHE, "--top_k 0", None, ("top_k=0", "choose 1 or more")),
    BadInput("more tokens than there are", CACHE, "--top_k 9999", None, ("top_k=9999", "vocabulary has 257")),
    BadInput("no rows at once", CACHE, "--batch_size 0", None, ("batch_size=0", "choose 1 or more")),
    BadInput("no temperature", CACHE, "--T 0", None, ("temperature=0.0", "choose a number above 0")),
    BadInput("an infinite temperature", CACHE, "--T inf", None, ("temperature=inf", "choose a number above 0")),
    BadInput("no rows", CACHE, "--max_rows 0", None, ("max_rows=0", "choose 1 or more")),
    BadInput("a negative seed of the cache", CACHE, "--seed=-3", None, ("seed=-3", "choose 0 or more")),
    BadInput("a cache of a stream", CACHE, "--streaming True", None, ("max_rows", "a stream has no end")),
    BadInput("a cache without text", CACHE, "--dataset nowhere.txt", None, ("dataset=nowhere.txt", "neither a file or folder here nor a hub dataset")),
    BadInput("a cache in a file", CACHE, "--teacher_cache text.jsonl", None, ("text.jsonl", "is not a folder")),
    BadInput("cache.json: not JSON", CACHE, "--teacher_cache teacher_cache", write("teacher_cache/cache.json", "{"), ("cache.json", "is damaged")),
    BadInput("cache.json: a list", CACHE, "--teacher_cache teacher_cache", write("teacher_cache/cache.json", "[]"), ("cache.json", "is damaged")),
    BadInput("cache.json: empty", CACHE, "--teacher_cache teacher_cache", write("teacher_cache/cache.json", ""), ("cache.json", "is damaged")),
    BadInput("cache.json: binary", CACHE, "--teacher_cache teacher_cache", write("teacher_cache/cache.json", BINARY), ("cache.json", "is damaged")),
    BadInput("cache.json: of another teacher", CACHE, "--teacher_cache teacher_cache", write("teacher_cache/cache.json", '{"teacher": "other", "complete": false}'), ("teacher_cache=teacher_cache", "its teacher is other", "or make another")),
    BadInput("cache: rows that are damaged", CACHE, "--teacher_cache teacher_cache", damaged_cache(), ("rows-00000.safetensors", "is damaged")),
    BadInput("training on no cache", TRAIN, "--use_cosine_loss False --teacher_cache nowhere", None, ("teacher_cache=nowhere",)),
    BadInput("training on a cache with the cosine", TRAIN, "--teacher_cache nowhere", None, ("teacher_cache", "--use_cosine_loss False")),
    BadInput("training on a damaged cache", TRAIN, "--use_cosine_loss False --teacher_cache teacher_cache", write("teacher_cache/cache.json", "5"), ("cache.json", "is damaged")),

    # patching.orders and patching.similarity
    BadInput("a beam of nothing", ORDERS, "--beam 0", None, ("beam=0", "choose 1 or more")),
    BadInput("a search that is always made", ORDERS, "--order klpatch", None, ("--order klpatch is always searched here", "leave it out")),
    BadInput("orders without text", ORDERS, "-calibration", None, ("orders are measured on text", "--calibration")),
    BadInput("orders on no such text", ORDERS, "--calibration nowhere.txt", None, ("nowhere.txt", "neither a file or folder here nor a hub dataset")),
    BadInput("orders after the end of the text", ORDERS, "--calibration_skip 999", None, ("calibration=text.jsonl", "after its first 999")),
    BadInput("orders of a device that is none", ORDERS, "--device abacus", None, ("device=abacus",)),
    BadInput("orders of a student that is the teacher", ORDERS, "--student_model_name_or_path teacher --kept_layers 0-5", None, ("0 patchable layers", "no size between")),
    BadInput("order_kl.json: not JSON", ORDERS, "--save_directory found", write("found/order_kl.json", "{"), ("order_kl.json is damaged", "remove it")),
    BadInput("order_kl.json: a list", ORDERS, "--save_directory found", write("found/order_kl.json", "[]"), ("order_kl.json is damaged", "remove it")),
    BadInput("order_kl.json: texts", ORDERS, "--save_directory found", write("found/order_kl.json", '{"settings": 1, "kl": 2, "block_influence": 3}'), ("order_kl.json is damaged", "remove it")),
    BadInput("order_kl.json: binary", ORDERS, "--save_directory found", write("found/order_kl.json", BINARY), ("order_kl.json is damaged", "remove it")),
    BadInput("order_kl.json: nested without end", ORDERS, "--save_directory found", write("found/order_kl.json", DEEP), ("order_kl.json is damaged (it is nested too deeply)", "remove it")),
    BadInput("order_kl.json: 2 GB", ORDERS, "--save_directory found", several(folders("found"), sparse("found/order_kl.json", 2 * 10**9)), ("order_kl.json is damaged (it has 2,000,000,000 bytes", "remove it")),
    BadInput("order_kl.json: of other models", ORDERS, "--save_directory found", write("found/order_kl.json", '{"settings": {}, "kl": {}, "block_influence": null}'), ("order_kl.json was measured with", "choose another folder")),
    BadInput("similarity without text", SIMILARITY, "-calibration", None, ("hidden states are compared on text", "--calibration")),
    BadInput("similarity on no documents", SIMILARITY, "--calibration_texts 0", None, ("calibration_texts=0", "choose 1 or more")),
    BadInput("similarity on single tokens", SIMILARITY, "--calibration_length 1", None, ("calibration_length=1", "choose 2 or more")),
    BadInput("similarity on numbers", SIMILARITY, "", write("text.jsonl", '{"text": 1}\n'), ("column=text", "int64 values")),
    BadInput("similarity on lists after no value", SIMILARITY, "", write("text.jsonl", '{"text": null}\n{"text": ["a"]}\n'), ("column=text", "lists of string values", "correct it")),
    BadInput("an order by lists after no value", ORDERS, "", write("text.jsonl", '{"text": null}\n{"text": ["a"]}\n'), ("column=text", "lists of string values", "correct it")),
    BadInput("results on lists after no value", EVALUATE, "--baselines laco --calibration text.jsonl", write("text.jsonl", '{"text": null}\n{"text": ["a"]}\n'), ("column=text", "lists of string values", "correct it")),
    BadInput("similarity on another column", SIMILARITY, "--calibration_column body", None, ("column=body", "has the columns text")),
    BadInput("similarity into a file", SIMILARITY, "--save_directory text.jsonl", None, ("text.jsonl", "is not a folder")),
    BadInput("similarity on several ranks", SIMILARITY, "", None, ("2 processes were started",), {"WORLD_SIZE": "2"}),

    # evaluate.evaluate
    BadInput("no task", EVALUATE, "--tasks ,", None, ("no tasks", "--tasks")),
    BadInput("no folder of tasks", EVALUATE, "--include_path nowhere", None, ("include_path=nowhere", "there is no such folder")),
    BadInput("task file: not YAML", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", "task: [unclosed"), ("tasks=tasks/bad.yaml", "this is not a task file")),
    BadInput("task file: binary", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", BINARY), ("tasks=tasks/bad.yaml", "this is not a task file")),
    BadInput("task file: a list", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", "- a\n- b\n"), ("tasks=tasks/bad.yaml", "this is not a task file")),
    BadInput("task file: names no task", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", "output_type: multiple_choice\n"), ("tasks=tasks/bad.yaml", "names no task")),
    BadInput("task file: code", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", "task: !!python/object/apply:os.mkdir [ran]\n"), ("tasks=tasks/bad.yaml", "this is not a task file")),
    BadInput("task file: empty", EVALUATE, "--tasks tasks/bad.yaml", write("tasks/bad.yaml", ""), ("tasks=tasks/bad.yaml", "this is not a task file")),
    BadInput("no documents", EVALUATE, "--limit 0", None, ("limit=0.0", "choose a number above 0")),
    BadInput("documents that are no number", EVALUATE, "--limit nan", None, ("limit=nan", "choose a number above 0")),
    BadInput("samples: not JSON", EVALUATE, "--samples '{'", None, ("samples={", "this is not JSON")),
    BadInput("samples: a missing file", EVALUATE, "--samples nowhere.json", None, ("samples=nowhere.json", "no such file")),
    BadInput("samples: a list", EVALUATE, "--samples samples.json", write("samples.json", "[1, 2]"), ("samples=samples.json", "write a list of numbers for each task")),
    BadInput("samples: texts", EVALUATE, "--samples samples.json", write("samples.json", '{"choice": ["1"]}'), ("samples=samples.json", "write a list of numbers for each task")),
    BadInput("samples: binary", EVALUATE, "--samples samples.json", write("samples.json", BINARY), ("samples=samples.json", "this is not JSON")),
    BadInput("samples: 2 GB", EVALUATE, "--samples samples.json", sparse("samples.json", 2 * 10**9), ("samples=samples.json", "it has 2,000,000,000 bytes")),
    BadInput("negative examples", EVALUATE, "--num_fewshot=-1", None, ("num_fewshot=-1", "choose 0 or more")),
    BadInput("no rows per pass", EVALUATE, "--eval_batch_size 0", None, ("eval_batch_size=0", "choose 1 or more, or auto")),
    BadInput("two seeds", EVALUATE, "--seed 1,2", None, ("seed=1,2", "choose one number or four")),
    BadInput("a negative seed of evaluation", EVALUATE, "--seed=-1", None, ("seed=-1", "choose")),
    BadInput("arguments of generation without values", EVALUATE, "--gen_kwargs hot", None, ("gen_kwargs=hot", "write key=value")),
    BadInput("an unknown baseline", EVALUATE, "--baselines random", None, ("baselines=random", "choose from naive")),
    BadInput("a baseline without text", EVALUATE, "--baselines block_influence", None, ("--calibration",)),
    BadInput("compared with nothing", EVALUATE, "--compare empty", folders("empty"), ("compare=empty", "there is no model in this folder")),
    BadInput("compared with no model", EVALUATE, "--compare nowhere", None, ("compare=nowhere", "the model cannot be read")),
    BadInput("compared with a damaged tokenizer", EVALUATE, "--compare other", several(lambda folder: shutil.copytree(folder / "teacher", folder / "other"), write("other/tokenizer.json", "{")), ("compare=other", "the model cannot be read")),
    BadInput("a random student that is none", EVALUATE, "--random_student nowhere", None, ("nowhere", "neither a model folder nor a hub repository")),
    BadInput("a shard of none", EVALUATE, "--shard 3/2", None, ("shard=3/2", "write i/n")),
    BadInput("an unknown backend", EVALUATE, "--generation_backend magic", None, ("magic", "transformers")),
    BadInput("a Python that is none", EVALUATE, "--generation_backend vllm --vllm_python nowhere/python", None, ("vllm_python=nowhere/python", "name a Python")),
    BadInput("a Python without vLLM", EVALUATE, f"--generation_backend vllm --vllm_python {sys.executable}", None, ("needs vllm and lm_eval", "does not have both")),
    BadInput("vLLM's flags without vLLM", EVALUATE, "--vllm_args seed=1 --vllm_python python", None, ("--vllm_args and --vllm_python", "add --generation_backend vllm")),
    BadInput("a device that is none", EVALUATE, "--device abacus", None, ("device=abacus",)),
    BadInput("text to evaluate on: missing", EVALUATE, "--dataset nowhere.txt", None, ("dataset=nowhere.txt", "neither a file or folder here nor a hub dataset")),
    BadInput("text to evaluate on: empty", EVALUATE, "--dataset a.txt", write("a.txt", " \n"), ("dataset=a.txt", "there is no text in it")),
    BadInput("stored result: not JSON", EVALUATE, "--save_directory results", write(RESULT, '{"series": "family"'), ("family_k0.json is not JSON", "remove it")),
    BadInput("stored result: of another teacher", EVALUATE, "--save_directory results", None, ("family_k0.json was made with", "choose another --save_directory")),

    BadInput("stored result: of a newer version", EVALUATE, "--save_directory results", edit(RESULT, similarity={"to_teacher": 0.5, "text": "a", "sha256": "b", "tokens": 9}), ("family_k0.json was written by a newer version", "'tokens' of Similarity", "update")),
    BadInput("attention for packed rows alone", EVALUATE, "--attn_implementation varlen", None, ("attn_implementation=varlen", "it is for training", "choose sdpa")),
    BadInput("stored scores of documents: damaged", EVALUATE, "--save_directory results", write(DOCUMENTS, BINARY), ("family_k0.npz is damaged", "remove it")),
    BadInput("merged layers: a list", EVALUATE, f"{MERGED} --save_directory found", write("found/laco.json", "[]"), ("laco.json is damaged", "remove it")),
    BadInput("merged layers: 2 GB", EVALUATE, f"{MERGED} --save_directory found", several(folders("found"), sparse("found/laco.json", 2**31)), ("laco.json is", "2,147,483,648 bytes", "remove it")),
    BadInput("a folder in place of a sweep's report", EVALUATE, "", folders("out/summary.svg"), ("out/summary.svg is a folder", "choose another folder")),
    BadInput("a folder in place of a list of failures", EVALUATE, "", folders("out/failures.json"), ("out/failures.json is a folder", "choose another folder")),
    BadInput("a file in place of scores of documents", EVALUATE, "", write("out/documents", "x"), ("out/documents is not a folder",)),

    # evaluate.report, and stored results
    BadInput("a report on nothing", REPORT, "nowhere", None, ("nowhere", "there is no such folder")),
    BadInput("a report on no results", REPORT, "", remove("results/*.json"), ("results", "there are no results in it")),
    BadInput("a report on a file", REPORT, "text.jsonl", None, ("text.jsonl", "there is no such folder")),
    BadInput("a report into a file", REPORT, "--save_directory text.jsonl", None, ("text.jsonl", "is not a folder")),
    BadInput("a report on two sweeps in neither", REPORT, "-save_directory more", results_copied, ("several sweeps", "--save_directory")),
    BadInput("result: truncated", REPORT, "", write(RESULT, '{"series": "family", "results": {'), ("family_k0.json is not JSON", "remove it")),
    BadInput("result: binary", REPORT, "", write(RESULT, BINARY), ("family_k0.json is not JSON", "remove it")),
    BadInput("result: nested without end", REPORT, "", write(RESULT, DEEP), ("family_k0.json is not JSON", "remove it")),
    BadInput("result: nothing in it", REPORT, "", write(RESULT, '{"series": "family", "results": {}}'), ("family_k0.json is damaged", "remove it")),
    BadInput("result: results that are a number", REPORT, "", edit(RESULT, results=5), ("family_k0.json is damaged", "remove it")),
    BadInput("result: scores that are a list", REPORT, "", edit(RESULT, results={"choice": [0.5]}), ("family_k0.json is damaged", "remove it")),
    BadInput("result: a size in words", REPORT, "", edit(RESULT, num_layers_to_patch="one"), ("family_k0.json is damaged", "remove it")),
    BadInput("result: a series that is a number", REPORT, "", edit(RESULT, series=5), ("family_k0.json is damaged", "remove it")),
    BadInput("result: parameters in words", REPORT, "", edit(RESULT, parameters={"stored": "many", "both_counted": "more"}), ("family_k0.json is damaged", "remove it")),
    BadInput("result: parameters that are none", REPORT, "", edit(RESULT, parameters=[1]), ("family_k0.json is damaged", "remove it")),
    BadInput("result: a task without its fields", REPORT, "", edit(RESULT, tasks={"choice": {}}), ("family_k0.json is damaged", "remove it")),
    BadInput("result: runs that are a list", REPORT, "", edit(RESULT, runs=[1, 2]), ("family_k0.json is damaged", "remove it")),
    BadInput("result: a negative standard error", REPORT, "", edit(RESULT, results={"choice": {"acc,none": 0.5, "acc_stderr,none": -1.0}}), ("family_k0.json is damaged", "acc_stderr,none of choice is -1.0", "remove it")),
    BadInput("result: a negative depth", REPORT, "", edit(RESULT, depth=-4), ("family_k0.json is damaged", "depth is -4", "remove it")),
    BadInput("result: more layers than there are", REPORT, "", edit(RESULT, num_layers_to_patch=10**17), ("family_k0.json is damaged", "num_layers_to_patch is 100000000000000000", "99,999", "remove it")),
    BadInput("result: negative parameters", REPORT, "", edit(RESULT, parameters={"stored": -1, "both_counted": 4}), ("family_k0.json is damaged", "stored is -1", "remove it")),
    BadInput("result: a member without its size", REPORT, "", edit(RESULT, num_layers_to_patch=None), ("family_k0.json is damaged", "num_layers_to_patch is null", "remove it")),
    BadInput("result: of a newer version", REPORT, "", edit(RESULT, tasks={"choice": {"seconds": 1.0, "has_samples": False, "watts": 9}}), ("family_k0.json was written by a newer version", "'watts' of FinishedTask", "update")),
    BadInput("result: details of a newer version", REPORT, "", edit(RESULT, parameters={"stored": 10, "both_counted": 20, "active": 5}), ("family_k0.json was written by a newer version", "'active' of Parameters", "update")),
    BadInput("result: a device", REPORT, "", several(remove(RESULT), link(RESULT, "/dev/zero")), ("family_k0.json is not JSON", "not a regular file", "remove it")),
    BadInput("result: a pipe", REPORT, "", several(remove(RESULT), lambda folder: os.mkfifo(folder / RESULT)), ("family_k0.json is not JSON", "not a regular file", "remove it")),
    BadInput("result: 2 GB", REPORT, "", sparse(RESULT, 2**31), ("family_k0.json is not JSON", "2,147,483,648 bytes", "remove it")),
    BadInput("result: a folder", REPORT, "", several(remove(RESULT), folders(RESULT)), ("family_k0.json is not JSON", "not a regular file", "remove it")),
    BadInput("result: a link to itself", REPORT, "", several(remove(RESULT), link(RESULT, "family_k0.json")), ("family_k0.json cannot be read", "symbolic links", "remove it")),
    BadInput("result: a link to nothing", REPORT, "", several(remove(RESULT), link(RESULT, "nowhere")), ("family_k0.json cannot be read", "No such file", "remove it")),
    BadInput("a folder in place of a report's table", REPORT, "", folders("out/summary.md"), ("out/summary.md is a folder", "choose another folder")),
    BadInput("a folder in place of a report's plot", REPORT, "-save_directory", folders("results/summary.png"), ("results/summary.png is a folder", "choose another folder")),
    BadInput("failures that are a number", REPORT, "", write("results/failures.json", "5"), ("failures.json is damaged", "remove it")),
    BadInput("failures without reasons", REPORT, "", write("results/failures.json", '{"choice": [1]}'), ("failures.json holds no failures", "remove it")),
    BadInput("failures nested without end", REPORT, "", write("results/failures.json", DEEP), ("failures.json is", "nested too deeply", "remove it")),
    BadInput("documents: of three dimensions", REPORT, "", archive(DOCUMENTS, **{"choice/acc,none": numpy.zeros((2, 3, 4))}), ("family_k0.npz is damaged", "choice/acc,none has shape (2, 3, 4)", "remove it")),
    BadInput("documents: texts", REPORT, "", archive(DOCUMENTS, **{"choice/acc,none": numpy.array(["a", "b"])}), ("family_k0.npz is damaged", "type <U1", "remove it")),
    BadInput("documents: a single number", REPORT, "", archive(DOCUMENTS, **{"choice/acc,none": numpy.array(0.5)}), ("family_k0.npz is damaged", "has shape ()", "remove it")),
    BadInput("documents: complex numbers", REPORT, "", archive(DOCUMENTS, **{"choice/acc,none": numpy.array([1j])}), ("family_k0.npz is damaged", "type complex128", "remove it")),
    BadInput("documents: no archive", REPORT, "", write(DOCUMENTS, BINARY), ("family_k0.npz is damaged", "remove it")),
    BadInput("documents: truncated", REPORT, "", write(DOCUMENTS, b"PK\x03\x04" + BINARY), ("family_k0.npz is damaged", "remove it")),
    BadInput("documents: empty", REPORT, "", write(DOCUMENTS, b""), ("family_k0.npz is damaged", "remove it")),
    BadInput("documents: scores of exabytes", REPORT, "", zipped(DOCUMENTS, "choice/acc,none.npy", NPY_OF_EXABYTES), ("family_k0.npz is damaged", "remove it")),
    BadInput("documents: a pickle", REPORT, "", archive(DOCUMENTS, a=numpy.array([Runs()], dtype=object)), ("family_k0.npz is damaged", "remove it")),
]

OF_HUB = [
    # The name of a repository says how the stand-in hub of the test answers.
    BadInput("hub: a teacher that needs a login", PATCH, "--teacher_model_name_or_path status/401", None, ("teacher_model_name_or_path=status/401", "neither a model folder nor a hub repository")),
    BadInput("hub: a teacher that is forbidden", PATCH, "--teacher_model_name_or_path status/403", None, ("teacher_model_name_or_path=status/403", "neither a model folder nor a hub repository")),
    BadInput("hub: a teacher that does not exist", PATCH, "--teacher_model_name_or_path status/404", None, ("teacher_model_name_or_path=status/404", "neither a model folder nor a hub repository")),
    BadInput("hub: too many requests for a teacher", PATCH, "--teacher_model_name_or_path status/429", None, ("teacher_model_name_or_path=status/429", "neither a model folder nor a hub repository")),
    BadInput("hub: a server that fails", PATCH, "--teacher_model_name_or_path status/500", None, ("teacher_model_name_or_path=status/500", "neither a model folder nor a hub repository")),
    BadInput("hub: a line that breaks", PATCH, "--teacher_model_name_or_path status/0", None, ("teacher_model_name_or_path=status/0", "neither a model folder nor a hub repository")),
    BadInput("hub: a student that does not exist", ORDERS, "--student_model_name_or_path status/404", None, ("student_model_name_or_path=status/404", "neither a model folder nor a hub repository")),
    BadInput("hub: a teacher to train with that needs a login", TRAIN, "--teacher_model_name_or_path status/401", None, ("teacher_model_name_or_path=status/401", "neither a model folder nor a hub repository")),
    BadInput("hub: a compared model that needs a login", EVALUATE, "--compare status/401", None, ("compare=status/401", "the model cannot be read")),
    BadInput("hub: text that needs a login", TRAIN, "--dataset status/401", None, ("dataset=status/401", "neither a file or folder here nor a hub dataset")),
    BadInput("hub: text that does not exist", CACHE, "--dataset status/404", None, ("dataset=status/404", "neither a file or folder here nor a hub dataset")),
    BadInput("hub: too many requests for text", TRAIN, "--dataset status/429", None, ("dataset=status/429", "neither a file or folder here nor a hub dataset")),
    BadInput("hub: text on a line that breaks", SIMILARITY, "--calibration status/0", None, ("dataset=status/0", "neither a file or folder here nor a hub dataset")),
    BadInput("hub: an upload without a login", PATCH, "--push_to_hub me/model", None, ("token",)),
]
# fmt: on
