"""Distilling masked language models: the loss against its definition, saving and resuming."""

import json

import pytest
import torch
from conftest import ROOT, run_module, tiny_model
from masked_models import encoder_config, texts_of, word_tokenizer
from safetensors.torch import load_file
from training_runs import LAYER_MAP, MASKING, WORDS, rows, teacher_of, trainer_for
from transformers import AutoConfig, AutoModelForMaskedLM

from patching.assemble import count_parameters
from patching.patch import build_intermediate_model
from patching.running.hidden_states import before_output_embeddings
from train.batches import collate
from train.distillation import install_distillation_forward
from train.loss import IGNORED_LABEL, LossWeights, count
from train.masking import generator_for
from train.train import main


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_what_the_projection_reads_makes_the_logits(model_type):
    model = tiny_model(encoder_config(model_type, 2))
    ids_BT = torch.arange(5, 15)[None]
    states_BTD = model.base_model(ids_BT).last_hidden_state
    names = [name for name, _ in model.named_modules()]
    read_BTD = before_output_embeddings(model, states_BTD)
    assert torch.equal(model.get_output_embeddings()(read_BTD), model(ids_BT).logits)
    assert not torch.equal(read_BTD, states_BTD)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_loss_is_its_definition_over_masked_positions(model_type):
    teacher = teacher_of(model_type)
    student = tiny_model(encoder_config(model_type, len(LAYER_MAP.kept)), seed=3)
    batch = MASKING.hide(collate(list(rows(6, WORDS))), generator_for(0))
    mask_BT = batch["labels"] != IGNORED_LABEL
    weights = LossWeights(cross_entropy=1.0, kl=0.3, cosine=2.0, temperature=2.0)
    with torch.no_grad():
        ours, theirs = (
            model(batch["input_ids"], attention_mask=mask_BT.long(), output_hidden_states=True)
            for model in (student, teacher)
        )
    cross_entropy = kl = cosine = 0.0
    num_targets = 0
    for b, t in mask_BT.nonzero().tolist():
        for i, j in LAYER_MAP.alignment_pairs:
            s, u = ours.hidden_states[i][b, t].double(), theirs.hidden_states[j][b, t].double()
            cosine += (1 - s @ u / (s.norm() * u.norm())) / len(LAYER_MAP.alignment_pairs)
        label = int(batch["labels"][b, t])
        if label < 0:
            continue
        num_targets += 1
        z_s, z_t = ours.logits[b, t].double(), theirs.logits[b, t].double()
        cross_entropy -= z_s.log_softmax(-1)[label]
        q_t, q_s = (z_t / 2).softmax(-1), (z_s / 2).softmax(-1)
        kl += (q_t * (q_t.log() - q_s.log())).sum()
    assert num_targets > 3
    counts = count(batch["labels"], is_masked_model=True)
    assert counts == (num_targets, int(mask_BT.sum()))
    sums = (cross_entropy / num_targets, kl / num_targets, cosine / int(mask_BT.sum()))
    expected = [value.item() for value in sums]

    install_distillation_forward(student, teacher, LAYER_MAP, weights)
    terms = student.train()(**batch, counts=counts)
    found = [term.item() for term in (terms.cross_entropy, terms.kl, terms.cosine)]
    assert found == pytest.approx(expected, rel=1e-5)
    loss = expected[0] + 0.3 * 4 * expected[1] + 2 * expected[2]
    assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
    terms.loss.backward()
    head = student.cls.predictions.transform if model_type == "bert" else student.lm_head
    assert head.dense.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a teacher, and a file of text."""
    folder = tmp_path_factory.mktemp("masked")
    tiny_model(encoder_config("bert", 4)).save_pretrained(folder / "teacher")
    word_tokenizer().save_pretrained(folder / "teacher")
    texts = texts_of(range(3, 40))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    return folder / "teacher", folder / "text.jsonl"


def command(folders, save_directory, *flags: str) -> list[str]:
    teacher, text = folders
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": save_directory, "dataset": text,
        "max_length": 20, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False,
        "heldout_documents": 4, "save_steps": 2, "disable_tqdm": True, "kept_layers": "0,2,3",
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *flags]


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_student_has_both_names_of_its_bias(tmp_path, tied):
    teacher = tiny_model(encoder_config("bert", LAYER_MAP.num_teacher_layers, tied))
    trainer = trainer_for(tmp_path, teacher, max_steps=2)
    trainer.train()
    names = dict(trainer.model.named_parameters())
    assert "cls.predictions.decoder.bias" in names
    assert "cls.predictions.bias" not in names
    trainer.save_student(tmp_path / "student", torch.float32)
    saved, found = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not any(found.values())
    bias = trainer.model.get_output_embeddings().bias
    assert torch.equal(saved.cls.predictions.bias, bias)
    assert torch.equal(saved.cls.predictions.decoder.bias, bias)
    assert (saved.cls.predictions.decoder.bias is saved.cls.predictions.bias) == tied


@pytest.mark.slow
def test_the_command_line_distills_and_resumes(folders, tmp_path):
    """A resumed run draws the same masks as an uninterrupted one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(command(folders, whole))
    main(command(folders, parts, "--save_total_limit", "2"))
    run = json.loads((whole / "run.json").read_text())
    assert {"eval_cross_entropy", "eval_kl", "eval_cosine"} <= run["held_out"].keys()
    weights = load_file(whole / "model.safetensors")
    start = load_file(folders[0] / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(weights["bert.encoder.layer.0.output.dense.weight"], start)

    again = tmp_path / "again"
    checkpoint = parts / "checkpoints" / "checkpoint-2"
    main(command(folders, again, "--resume_from_checkpoint", str(checkpoint)))
    for name, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name

    model, _ = build_intermediate_model(str(folders[0]), str(whole), 1)
    assert model.config.num_hidden_layers == 4
    student = AutoModelForMaskedLM.from_pretrained(whole)
    assert student.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "25"], "max_length=25: this bert model has positions for 24 tokens"),
        (["--kept_layers", "0,9"], "kept layers [0, 9]"),
    ],
)
def test_wrong_flags_are_one_line(folders, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exited:
        main(command(folders, tmp_path / "student", *flags))
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_dry_run_counts_an_encoder(folders, tmp_path, capsys):
    main(command(folders, tmp_path / "student", "--dry_run"))
    printed = capsys.readouterr().out
    assert "student of 3 layers from 4 (bert): 0,2,3" in printed
    counts = count_parameters(AutoConfig.from_pretrained(folders[0]))
    assert f"{counts.stored / 1e6:,.2f} M" in printed


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_sharded_ranks_train_an_encoder(folders, tmp_path, tied):
    """Each rank draws its own masks, so no number can be compared with one process's."""
    teacher = tmp_path / "teacher"
    model = tiny_model(encoder_config("bert", 4, tied))
    model.save_pretrained(teacher)
    word_tokenizer().save_pretrained(teacher)
    target = tmp_path / "student"
    words = command((teacher, folders[1]), target, "--fsdp_config", str(teacher))
    sharded = ["torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_module(*sharded, "tests/shard_on_cpu.py", *words, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [
        json.loads((target / f"checkpoints/held_{rank}.json").read_text()) for rank in (0, 1)
    ]
    for name, share in reports[0]["student"].items():
        assert share["share"][0] < share["whole"][0], name
    student, found = AutoModelForMaskedLM.from_pretrained(target, output_loading_info=True)
    assert not any(found.values())
    for name in ("transform.dense.weight", "decoder.weight", "decoder.bias"):
        path = f"cls.predictions.{name}"
        assert not torch.equal(student.get_parameter(path), model.get_parameter(path)), name
    log = json.loads((target / "run.json").read_text())["log"]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
