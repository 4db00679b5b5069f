"""What goes wrong on disks: one clear line, nothing loadable left, and a rerun works."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from patching_models import change_config, family_pair, save_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_disks import mounted
from transformers import AutoModelForCausalLM

from patching.files import outputs
from patching.patch import main


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A pair whose weights lie in several files each."""
    folder = tmp_path_factory.mktemp("original")
    save_models(folder, *family_pair("qwen3"), max_shard_size="60KB")
    return folder


@pytest.fixture
def pair(original, tmp_path) -> Path:
    """A copy of the pair to damage."""
    return shutil.copytree(original, tmp_path / "pair")


def arguments(pair: Path, out: Path) -> list[str]:
    return [
        *("--teacher_model_name_or_path", str(pair / "teacher")),
        *("--student_model_name_or_path", str(pair / "student")),
        *("--num_layers_to_patch", "1", "--save_directory", str(out)),
    ]


def refused(pair: Path, out: Path, capsys) -> str:
    """The one line that a run ends with. It leaves nothing new next to the pair."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments(pair, out))
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(out.parent.iterdir()) == before
    return captured.err


def works(pair: Path, out: Path) -> None:
    main(arguments(pair, out))
    AutoModelForCausalLM.from_pretrained(out)
    assert not [path for path in out.parent.iterdir() if "incomplete" in path.name]


def shard(pair: Path, parent: str = "teacher") -> Path:
    return sorted((pair / parent).glob("*.safetensors"))[1]


def with_header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a file's header and leave its numbers."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_tensor(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def overlap(header: dict) -> None:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry["data_offsets"])
    start, stop = entries[1]["data_offsets"]
    entries[1]["data_offsets"] = [start - 4, stop - 4]


HEADER_DAMAGES: dict[str, Callable[[dict], object]] = {
    "not an object": lambda header: [1],
    "unknown dtype": lambda header: first_tensor(header).update(dtype="F31"),
    "negative shape": lambda header: first_tensor(header).update(shape=[-1, 4]),
    "no offsets": lambda header: first_tensor(header).pop("data_offsets") and None,
    "offsets beyond the end": lambda header: first_tensor(header).update(
        data_offsets=[0, 10**9], shape=[10**9 // 4]
    ),
    "bytes that the shape does not have": lambda header: first_tensor(header).update(shape=[1]),
    "overlap": overlap,
}


@pytest.mark.parametrize("damage", HEADER_DAMAGES)
def test_a_damaged_header(damage, pair, tmp_path, capsys):
    with_header(shard(pair), HEADER_DAMAGES[damage])
    error = refused(pair, tmp_path / "out", capsys)
    assert f"{shard(pair)} is damaged" in error
    assert "download or save it again" in error


BODY_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:100],
    "cut in the numbers": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "a length of nonsense": lambda data: b"\xff" * 8 + data[8:],
    "a header of nonsense": lambda data: data[:8] + b"\xff" * 20 + data[28:],
    "an error page": lambda data: b"<html>502 Bad Gateway</html>" * 50,
}


@pytest.mark.parametrize("damage", BODY_DAMAGES)
@pytest.mark.parametrize("parent", ["teacher", "student"])
def test_a_damaged_file(parent, damage, pair, original, tmp_path, capsys):
    path = shard(pair, parent)
    path.write_bytes(BODY_DAMAGES[damage](path.read_bytes()))
    assert f"{path} is damaged" in refused(pair, tmp_path / "out", capsys)
    shutil.copy(original / parent / path.name, path)
    works(pair, tmp_path / "out")


def test_a_missing_file(pair, tmp_path, capsys):
    shard(pair).unlink()
    error = refused(pair, tmp_path / "out", capsys)
    assert f"{shard(pair).name}" not in error
    assert "model-00002-of" in error
    assert "is missing, but its index names it" in error


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"metadata": {}, "weight_map": {}}', '{"weight_map": {"a": "../x"}}']
)
def test_a_damaged_index(text, pair, tmp_path, capsys):
    (pair / "teacher" / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in refused(pair, tmp_path / "out", capsys)


def test_no_weights_at_all(pair, tmp_path, capsys):
    for path in (pair / "student").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        main(arguments(pair, tmp_path / "out"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tensor_that_is_missing(pair, tmp_path, capsys):
    index = json.loads((pair / "teacher" / "model.safetensors.index.json").read_text())
    name = "model.layers.5.mlp.up_proj.weight"
    path = pair / "teacher" / index["weight_map"][name]
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    error = refused(pair, tmp_path / "out", capsys)
    assert f"its weights lack {name}" in error


def test_shapes_that_disagree_with_the_config(pair, tmp_path, capsys):
    for parent in ("teacher", "student"):
        change_config(pair / parent, intermediate_size=40)
    error = refused(pair, tmp_path / "out", capsys)
    assert "in the weights and" in error
    assert "in the config" in error
    assert "[48, 32]" in error or "[32, 48]" in error


def test_the_same_faults_of_pickled_weights(tmp_path, capsys):
    names = save_models(tmp_path / "pair", *family_pair("qwen3"))
    path = Path(names[0], "model.safetensors")
    tensors = load_file(path)
    path.unlink()
    lacking = {k: v for k, v in tensors.items() if k != "model.layers.5.mlp.up_proj.weight"}
    wrong = tensors | {"model.norm.weight": torch.ones(31)}
    for content, message in (
        (lacking, "its weights lack model.layers.5.mlp.up_proj.weight"),
        (wrong, "model.norm.weight has shape [31] in the weights and [32] in the config"),
    ):
        torch.save(content, path.with_name("pytorch_model.bin"))
        with pytest.raises(SystemExit) as ended:
            main(arguments(tmp_path / "pair", tmp_path / "out"))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
PICKLE_DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the middle": (lambda data: data[: len(data) // 2], "is damaged: it is not a file of"),
    "cut at the start": (lambda data: data[:10], "is damaged: it is not a file of"),
    "empty": (lambda data: b"", "is damaged: it is not a file of"),
    "zeros": (lambda data: bytes(len(data)), "is damaged: it is not a file of"),
    "an error page": (lambda data: b"<html>502 Bad Gateway</html>" * 50, "is damaged: it is not"),
    "a pointer": (lambda data: POINTER, "is a Git LFS pointer, not the file itself: run `git lfs"),
}


@pytest.mark.parametrize("names_dtype", [True, False])
@pytest.mark.parametrize("damage", PICKLE_DAMAGES)
def test_damaged_pickles(names_dtype, damage, pair, tmp_path, capsys):
    teacher = pair / "teacher"
    for path in teacher.glob("*.safetensors*"):
        path.unlink()
    change, message = PICKLE_DAMAGES[damage]
    torch.save({"x": torch.ones(1000)}, teacher / "pytorch_model.bin")
    data = (teacher / "pytorch_model.bin").read_bytes()
    (teacher / "pytorch_model.bin").write_bytes(change(data))
    if not names_dtype:  # then it is read from the weights, in another place
        values = json.loads((teacher / "config.json").read_text())
        del values["dtype"]
        (teacher / "config.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit, match="2"):
        main(arguments(pair, tmp_path / "out"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{teacher / 'pytorch_model.bin'} {message}" in error
    assert "weights_only" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_in_place_of_a_file(name, pair, tmp_path, capsys):
    path = shard(pair) if name.endswith("safetensors") else pair / "teacher" / name
    path.write_bytes(POINTER)
    error = refused(pair, tmp_path / "out", capsys)
    assert f"error: {path} is a Git LFS pointer, not the file itself: run `git lfs pull`" in error


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        '{"copied_teacher_layers": [0.0, 2.0, 3.0, 5.0], "pruned_teacher_layers": [1, 4]}',
        '{"copied_teacher_layers": ["0", "2", "3", "5"], "pruned_teacher_layers": ["1", "4"]}',
        '{"copied_teacher_layers": [false, 2, 3, 5], "pruned_teacher_layers": [true, 4]}',
        '{"copied_teacher_layers": "0235", "pruned_teacher_layers": "14"}',
        '{"copied_teacher_layers": {"0": 1}, "pruned_teacher_layers": {}}',
        '{"copied_teacher_layers": null, "pruned_teacher_layers": 1}',
        f'{{"copied_teacher_layers": {DEEP}, "pruned_teacher_layers": [1, 4]}}',
        "[1, 2]",
        DEEP,
    ],
    ids=lambda text: text[:60],
)
def test_student_configs_that_are_none(text, pair, tmp_path, capsys):
    (pair / "student" / "student_config.json").write_text(text)
    assert "student_config.json is not a valid student config" in refused(
        pair, tmp_path / "out", capsys
    )


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "float99", 16])
def test_a_dtype_that_is_none(field, value, pair, tmp_path, capsys):
    change_config(pair / "teacher", **{field: value})
    error = refused(pair, tmp_path / "out", capsys)
    assert f"{field} in its config.json is {value}, write a dtype such as bfloat16" in error


def test_nested_too_deeply_for_json(pair, tmp_path, capsys):
    (pair / "teacher" / "config.json").write_text(f'{{"model_type": "qwen3", "x": {DEEP}}}')
    assert "config.json is not JSON" in refused(pair, tmp_path / "out", capsys)
    order = tmp_path / "order.json"
    order.write_text(DEEP)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(pair, tmp_path / "out"), "--order", str(order)])


@pytest.mark.parametrize(
    ("dtype", "num_bytes"), [("F4", 8), ("F6_E2M3", 12), ("F8_E8M0", 16), ("C64", 128)]
)
def test_unused_tensors_of_exotic_dtypes_are_no_damage(dtype, num_bytes, pair, tmp_path, capsys):
    path = shard(pair)
    path.write_bytes(path.read_bytes() + bytes(num_bytes))

    def add(header: dict) -> None:
        stop = max(e["data_offsets"][1] for name, e in header.items() if name != "__metadata__")
        offsets = [stop, stop + num_bytes]
        header["unused"] = {"dtype": dtype, "shape": [4, 4], "data_offsets": offsets}

    with_header(path, add)
    with safe_open(path, "pt") as file:  # other readers accept it too
        assert "unused" in file.keys()  # noqa: SIM118
    works(pair, tmp_path / "out")
    with_header(path, lambda header: header["unused"].update(shape=[5, 4]))
    assert "unused takes" in refused(pair, tmp_path / "again", capsys)


def test_a_used_tensor_of_an_exotic_dtype(pair, tmp_path, capsys):
    def change(header: dict) -> None:
        entry = first_tensor(header)
        entry.update(dtype="F8_E8M0", shape=[4 * entry["shape"][0], *entry["shape"][1:]])

    with_header(shard(pair), change)
    assert "is stored as F8_E8M0, use the original" in refused(pair, tmp_path / "out", capsys)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_parents_of_different_sizes(field, pair, tmp_path, capsys):
    change_config(pair / "student", **{field: 64})
    error = refused(pair, tmp_path / "out", capsys)
    assert f"{field} is 64 in the student and" in error


def test_an_output_folder_in_use(pair, tmp_path, capsys):
    out = tmp_path / "out"
    works(pair, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is not empty: name another folder" in refused(pair, out, capsys)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_too_little_room_is_seen_before_anything_is_written(pair, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = refused(pair, tmp_path / "out", capsys)
    assert "bytes and 1,000 are free there" in error


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 kB."""
    with mounted(tmp_path / "disk", "-o", "size=64k") as folder:
        yield folder


@pytest.fixture
def mount_point(tmp_path) -> Iterator[Path]:
    """An empty file system of its own, as a new disk is."""
    with mounted(tmp_path / "mounted") as folder:
        (folder / "lost+found").mkdir()
        yield folder


def test_into_a_mount_point(pair, mount_point, capsys):
    works(pair, mount_point)
    assert "is not empty" in refused(pair, mount_point, capsys)


def test_into_the_current_folder(pair, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    main(arguments(pair, Path()))
    assert os.path.samefile(".", here)  # the folder a shell is in stays the same one
    AutoModelForCausalLM.from_pretrained(".")
    assert (here / "README.md").read_text().count("# here") == 1


@pytest.mark.parametrize("leads_to", ["an empty folder", "nothing yet"])
def test_into_a_link(leads_to, pair, tmp_path):
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    target.parent.mkdir()
    if leads_to == "an empty folder":
        target.mkdir()
    link.symlink_to(target)
    works(pair, link)
    assert link.is_symlink()
    AutoModelForCausalLM.from_pretrained(target)
    assert os.listdir(target.parent) == ["target"]


def test_a_link_to_itself(pair, tmp_path, capsys):
    (tmp_path / "link").symlink_to("link")
    assert "link" in refused(pair, tmp_path / "link", capsys)


def test_an_empty_folder_after_a_failed_and_a_killed_run(tmp_path):
    (tmp_path / ".incomplete-killed").mkdir()
    with pytest.raises(RuntimeError), outputs.new_folder(tmp_path):
        raise RuntimeError("disk full")
    assert os.listdir(tmp_path) == []
    outputs.check_new_folder(tmp_path)
    with pytest.raises(OSError, match="not empty any more"), outputs.new_folder(tmp_path) as mine:
        (mine / "file").touch()
        with outputs.new_folder(tmp_path) as other:
            (other / "file").write_text("of the other run")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "of the other run"


def test_room_is_looked_for_where_a_link_leads(tmp_path, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    (tmp_path / "other disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other disk" / "out")
    outputs.check_space(tmp_path / "link", 1)
    assert asked == [tmp_path / "other disk"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    outputs.write_text(tmp_path / "file", "old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        outputs.write_text(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("layout", ["copied", "loaded"])
def test_a_disk_that_fills_up_in_the_middle(
    layout, pair, small_disk, tmp_path, capsys, monkeypatch
):
    assert shutil.disk_usage(small_disk).free < 100_000
    monkeypatch.setattr(
        "patching.checkpoints.save.check_space", lambda *_: None
    )  # as if it filled up later
    if layout == "loaded":
        for path in (pair / "student").glob("*.index.json"):
            tensors = {}
            for file in (pair / "student").glob("*.safetensors"):
                tensors |= load_file(file)
                file.unlink()
            torch.save(tensors, pair / "student" / "pytorch_model.bin")
            path.unlink()
    with pytest.raises(SystemExit) as ended:
        main(arguments(pair, small_disk / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "could not be written" in error
    assert "nothing is left of it" in error
    assert list(small_disk.iterdir()) == []
    works(pair, tmp_path / "elsewhere")


KILLED = """
import os, signal, sys
from patching import patch
from patching.checkpoints import save, splice
calls = 0
def dies(function, after):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
where, after = sys.argv[1], int(sys.argv[2])
module = save if where in ("write_json", "write_text") else splice
setattr(module, where, dies(getattr(module, where), after))
patch.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "after"), [("copy_bytes", 4), ("write_json", 1)])
def test_a_run_that_is_killed_leaves_nothing_that_loads(where, after, pair, tmp_path):
    out = tmp_path / "results" / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(after), *arguments(pair, out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.incomplete-")
    assert any(left.iterdir())
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(left)
    works(pair, out)
    assert list(out.parent.iterdir()) == [out]  # the rerun cleaned up


def test_a_run_leaves_another_that_is_at_work_alone(tmp_path):
    with outputs.new_folder(tmp_path / "out") as first:
        (first / "file").touch()
        with outputs.new_folder(tmp_path / "out") as second:
            assert (first / "file").exists()
            assert first != second
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_becomes_shorter_while_it_is_copied(pair, tmp_path, capsys, monkeypatch):
    from patching.checkpoints.splice import Splice

    write = Splice.write

    def shorten_and_write(self, folder, same_files):
        path = self.shards[0].sources[-1].path
        os.truncate(path, path.stat().st_size // 2)
        write(self, folder, same_files)

    monkeypatch.setattr(Splice, "write", shorten_and_write)
    error = refused(pair, tmp_path / "out", capsys)
    assert "a weights file became shorter while it was copied" in error
