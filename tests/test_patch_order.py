"""Orders as users name them: a name, a list of layers, a JSON file."""

import json

import pytest
from patching_models import LAYER_MAP, family_pair, save_models

from patching.blocks import LayerMap
from patching.patch import main
from patching.patch_order import FoundOrder, read_order
from patching.student_config import StudentConfig, read_student_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


def flags(names: tuple[str, str], *more: object) -> list[str]:
    base = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]]
    return [*base, *map(str, more)]


def listed(capsys, names: tuple[str, str], *more: str) -> dict:
    main(flags(names, "--list", "--json", *more))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("as_object", [False, True])
def test_an_order_from_a_file(folders, tmp_path, capsys, as_object):
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"order": [2, 0], "kl": [1.0]} if as_object else [2, 0]))
    members = listed(capsys, folders, "--order", str(path))["members"]
    assert [member["patched_layers"] for member in members] == [[], [2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0]", "order 0: it leaves out the patchable layers 2"),
        ("[0, 2, 0]", "order 0,2,0: it names a layer twice"),
        ("[0, 2, 7]", "order 0,2,7: the student has layers 0-3, not 7"),
        ('{"layers": [0]}', "choose last or first, or write a list of student layers"),
        ('[0, "2"]', "choose last or first, or write a list of student layers"),
        ("[0", "the file is not JSON"),
    ],
)
def test_bad_orders_are_refused(folders, tmp_path, capsys, text, message):
    (tmp_path / "order.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, "--list", "--order", tmp_path / "order.json"))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_order_by_hand():
    layer_map = LayerMap((0, 2, 4, 5), 8)  # blocks 0-1, 2-3, 4, 5-7; patchable 0, 1, 3
    sizes = [sorted(layer_map.patched_layers(k, (1, 2, 3, 0))) for k in range(4)]
    assert sizes == [[], [1], [1, 2, 3], [0, 1, 2, 3]]
    assert layer_map.sequence("last") == (3, 2, 1, 0)
    assert layer_map.sequence((3, 1, 0)) == (3, 1, 0, 2)
    assert read_order("first") == FoundOrder("first")


def test_an_order_recorded_beside_the_student(tmp_path):
    StudentConfig(LAYER_MAP, (2, 0)).save(tmp_path)
    assert read_student_config(str(tmp_path)).patch_order == (2, 0)
    path = tmp_path / "student_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_order": [2]}))
    with pytest.raises(ValueError, match="it leaves out the patchable layers 0"):
        read_student_config(str(tmp_path))


@pytest.mark.parametrize("spelling", ["block_influence", "block-influence"])
def test_both_spellings_of_block_influence_name_the_same_search(folders, capsys, spelling):
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, "--list", "--order", spelling))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--order block_influence is measured on text: name some with --calibration" in error
