"""Models whose code comes with their weights: nothing runs without --trust_remote_code, and what
ran is saved with the model.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_module
from patching_models import LAYER_MAP, family_pair, save_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    dynamic_module_utils,
)

from patching.patch import build_intermediate_model, iter_family, main
from patching.recipe import Reference
from train.student import new_student, save_student, student_companions

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .scale_own import SCALE

open(MARK, "a").close()  # seen if this code runs

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    scale = SCALE
"""
SCALE = "SCALE = 1.0\n"
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
CODE = {"configuration_own.py", "modeling_own.py", "scale_own.py"}
TOKENS = torch.arange(9)[None]


def edit(folder: str, name: str = "config.json", **changes: Any) -> None:
    path = Path(folder, name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path_factory, monkeypatch) -> None:
    """Keep copies of the code out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def own_code(tmp_path) -> tuple[tuple[str, str], Path]:
    """A pair with code of its own, and a file that this code creates when it runs."""
    mark = tmp_path / "ran"
    names = save_models(tmp_path, *family_pair("llama"))
    for name in names:
        edit(name, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
        for file_name, text in (
            ("configuration_own.py", CONFIGURATION),
            ("modeling_own.py", MODELING.replace("MARK", repr(str(mark)))),
            ("scale_own.py", SCALE),
        ):
            Path(name, file_name).write_text(text)
    return names, mark


def flags(names: tuple[str, str], folder: Path, *more: str) -> list[str]:
    return [
        *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
        *("--num_layers_to_patch", "1", "--save_directory", str(folder)),
        *more,
    ]


def test_own_code_runs_and_is_saved_only_with_the_flag(own_code, tmp_path, capsys):
    names, mark = own_code
    with pytest.raises(SystemExit) as ended:
        main(flags(names, tmp_path / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "trust_remote_code" in error
    assert error.count("\n") == 1
    for function in (build_intermediate_model, iter_family):
        with pytest.raises(ValueError, match="trust_remote_code"):
            function(*names, *([1] if function is build_intermediate_model else []))
    assert not mark.exists()

    model, _ = build_intermediate_model(*names, 1, trust_remote_code=True)
    assert mark.exists()
    sizes = [member.model for member in iter_family(*names, trust_remote_code=True)]
    assert type(model).__name__ == type(sizes[1]).__name__ == "OwnForCausalLM"
    assert torch.equal(model(TOKENS).logits, sizes[1](TOKENS).logits)

    out = tmp_path / "out"
    main(flags(names, out, "--trust_remote_code"))
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in out.glob("*.py")} == CODE
    for name in CODE:
        assert (out / name).read_bytes() == Path(names[0], name).read_bytes()
    shutil.rmtree(names[0])
    saved = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(saved(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("random", [False, True])
def test_a_student_takes_the_code_along(random, own_code, tmp_path):
    (name, _), _ = own_code
    teacher = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    student = new_student(teacher, LAYER_MAP, random)
    out = tmp_path / "new"
    save_student(student, student.state_dict(), out, torch.float32)
    arguments = (Reference(name), config, LAYER_MAP, torch.float32, None)
    student_companions(*arguments, trust_remote_code=True).write(out)
    shutil.rmtree(name)
    saved = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(saved(TOKENS).logits, student(TOKENS).logits)


@pytest.mark.slow
def test_a_list_of_sizes_in_a_fresh_process(own_code, tmp_path):
    """No class is known from an earlier call here."""
    names, _ = own_code
    home = str(tmp_path / "home")
    command = [*flags(names, tmp_path / "out")[:4], "--list"]
    done = run_module("patching.patch", *command, "--trust_remote_code", HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == LAYER_MAP.max_layers_to_patch + 2


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_did_not_run_is_not_named(trust, tmp_path, monkeypatch):
    """Many models that transformers knows still name the code they were published with."""
    names = save_models(tmp_path, *family_pair("llama"))
    edit(names[0], auto_map={"AutoModel": "modeling_own.OwnModel"})  # a class that is not used here
    out = tmp_path / "out"
    main(flags(names, out, *(["--trust_remote_code"] if trust else [])))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "provenance.json").read_text())["copied_file_to_file"]
    AutoModelForCausalLM.from_pretrained(out)


def test_code_of_a_tokenizer_goes_with_it(tmp_path):
    """Its files are copied as they are, so the code they name has to be there."""
    names = save_models(tmp_path, *family_pair("llama"))
    edit(
        names[0],
        "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    with pytest.raises(SystemExit):
        main(flags(names, tmp_path / "incomplete"))
    Path(names[0], "tokenization_own.py").write_text(TOKENIZATION)
    main(flags(names, tmp_path / "out"))
    shutil.rmtree(names[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"


def test_code_that_is_missing_is_named(own_code, tmp_path, capsys):
    names, _ = own_code
    main(flags(names, tmp_path / "first", "--trust_remote_code"))
    Path(names[0], "scale_own.py").unlink()
    with pytest.raises(SystemExit) as ended:
        main(flags(names, tmp_path / "out", "--trust_remote_code"))
    assert ended.value.code == 2
    assert "scale_own.py" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
