"""Both notebooks from top to bottom on the shipped stand-ins, and the stand-ins themselves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from examples.stdlib.corpus import is_held_out, iter_modules
from patching.architectures.distilbert import as_bert
from patching.patch import build_intermediate_model

NOTEBOOKS = ROOT / "notebooks"
STANDINS = ROOT / "examples" / "stdlib" / "standins"
NAMES = ("test_distilbert", "test_distilgpt2")
PAIRS = {"test_distilbert": ("bert", "distilbert"), "test_distilgpt2": ("gpt2", "distilgpt2")}
PROMPTS = {
    "test_distilbert": ("SENTENCE", "for i in [MASK] ( n ) :"),
    "test_distilgpt2": ("PROMPT", "for i in "),
}
NUM_TEXTS_AND_LINES = {"test_distilbert": (14, 3), "test_distilgpt2": (20, 40)}
"""A masked model reads a text as often as it has tokens, so it gets fewer and shorter ones."""
KEPT = (0, 2, 4, 7, 9, 11)


def write_texts(path: Path, num_lines: int) -> Path:
    """Some lines of each held-out module."""
    with path.open("w") as file:
        for module in iter_modules():
            lines = module.text.splitlines(keepends=True)
            if is_held_out(module.name) and len(lines) > 60:
                file.write(json.dumps({"text": "".join(lines[40 : 40 + num_lines])}) + "\n")
    return path


def code_cells(name: str) -> list[dict]:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def executed(request, tmp_path_factory):
    """A notebook with outputs, run on stand-ins, and the folder of its results."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat runs notebooks")
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks")
    pytest.importorskip("ipykernel", reason="a notebook needs a kernel")
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = (i for i, c in enumerate(notebook.cells) if "tags" in c.metadata)
    teacher, student = (str(STANDINS / part) for part in PAIRS[name])
    num_texts, num_lines = NUM_TEXTS_AND_LINES[name]
    texts = write_texts(folder / "heldout.jsonl", num_lines)
    variable, prompt = PROMPTS[name]
    values = {
        "TEACHER": teacher, "STUDENT": student, "DATASET": str(texts), "DATASET_CONFIG": "",
        "NUM_DOCUMENTS": num_texts, "RESULTS": str(folder / "results"), variable: prompt,
    }  # fmt: skip
    assert all(variable in notebook.cells[parameters].source for variable in values)
    source = "\n".join(f"{variable} = {value!r}" for variable, value in values.items())
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(source))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    return name, notebook, folder / "results"


def test_they_run_from_top_to_bottom(executed):
    _, notebook, _ = executed
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    images = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(images) == 1
    printed = "".join(o.get("text", "") for o in cells[-1].outputs if o.get("name") == "stdout")
    assert printed.count("\n") == 6
    assert printed.startswith("k = 0,  6 layers: ")
    assert "k = 5, 12 layers: " in printed


def test_the_report_is_shown_as_tables_and_progress_on_few_lines(executed):
    _, notebook, _ = executed
    (cell,) = (cell for cell in notebook.cells if "evaluate_family(" in cell.source)
    assert {output.get("name", "Markdown") for output in cell.outputs} == {"stderr", "Markdown"}
    (report,) = (o.data["text/markdown"] for o in cell.outputs if "data" in o)
    assert "\n| student | " in report
    assert "](summary" not in report, "a path in an output starts at the notebook"
    progress = "".join(o.text for o in cell.outputs if "text" in o)
    assert "sweep: 100%" in progress
    assert "\x1b[A" not in progress, "a notebook cannot move the cursor up"


def test_every_interpolated_size_beats_naive_pruning(executed):
    name, _, results = executed
    metric = "pseudo_perplexity" if name == "test_distilbert" else "perplexity"
    with (results / "summary.csv").open() as file:
        scores = {
            (row["series"], int(row["num_layers_to_patch"])): float(row["value"])
            for row in csv.DictReader(file)
            if row["metric"] == metric
        }
    assert len(scores) == 11
    family = [scores["family", k] for k in range(6)]
    naive = [scores["naive", k] for k in range(5)]
    assert all(ours < theirs for ours, theirs in zip(family, naive)), (family, naive)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_stored_clean(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert all(cell["outputs"] == [] for cell in code_cells(name))
    assert all(cell["execution_count"] is None for cell in code_cells(name))
    assert not any(word in text for word in ("/home/", "/Users/", "/tmp/", "/root/"))


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_documents_has_a_folder_of_its_own(name):
    """Results of one folder agree on how many documents they are measured on."""
    parameters = "".join(code_cells(name)[0]["source"])
    (line,) = (x for x in parameters.splitlines() if x.startswith("NUM_DOCUMENTS = "))
    folders = set()
    for changed in (line, "NUM_DOCUMENTS = 5"):
        values: dict = {}
        exec(parameters.replace(line, changed), values)
        folders.add(values["RESULTS"])
    assert len(folders) == 2


def set_up_in(folder: Path, name: str, url: str) -> subprocess.CompletedProcess:
    """The cell that looks for the toolkit, run where it is not; requirements are there already."""
    setup = "".join(code_cells(name)[1]["source"])
    installs = '[sys.executable, "-m", "pip", "install", "-q", *requirements]'
    assert installs in setup
    setup = setup.replace(installs, '["echo", *requirements]')
    program = f"TOOLKIT_URL = {url!r}\n{setup}\nimport patching\nprint(patching.__file__)"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_away_from_the_toolkit_they_clone_it(name, tmp_path):
    """As on Colab."""
    if not (ROOT / ".git").exists():
        pytest.skip("there is no repository to clone")
    done = set_up_in(tmp_path, name, f"file://{ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["-r", "toolkit/requirements.txt"]
    assert Path(done.stdout.split()[-1]).is_relative_to(tmp_path / "toolkit")


@pytest.mark.parametrize("name", NAMES)
def test_without_an_address_they_say_what_is_missing(name, tmp_path):
    assert 'TOOLKIT_URL = ""' in "".join(code_cells(name)[0]["source"])
    done = set_up_in(tmp_path, name, "")
    assert done.returncode == 1
    assert done.stderr.startswith("TOOLKIT_URL is not set")
    assert done.stderr.count("\n") == 1


def test_the_stand_ins_are_small_and_of_the_formats_of_the_public_models():
    types = {
        name: AutoConfig.from_pretrained(STANDINS / name)
        for name in ("bert", "distilbert", "gpt2", "distilgpt2")
    }
    for name, config in types.items():
        assert config.model_type == name.replace("distilgpt2", "gpt2")
        assert config.num_hidden_layers == (6 if name.startswith("distil") else 12)
        assert not (STANDINS / name / "student_config.json").exists()
    assert sum(path.stat().st_size for path in STANDINS.rglob("*.safetensors")) < 12e6


@torch.no_grad()
def test_a_trained_distilbert_has_the_originals_logits():
    folder = STANDINS / "distilbert"
    original = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["def main():", "import sys"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    real = batch["attention_mask"].bool()
    expected, logits = (model(**batch).logits for model in (original, as_bert(original)))
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    member, _ = build_intermediate_model(
        str(STANDINS / "bert"), str(folder), 0, dtype="float32", kept_layers=KEPT
    )
    torch.testing.assert_close(member(**batch).logits[real], expected[real], rtol=0, atol=1e-5)
