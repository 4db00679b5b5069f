"""A DistilBERT read as a BERT, and what is patched into it, against transformers' own classes and
hand-written chains of layers.
"""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, run_module, tiny_model
from masked_models import (
    NUM_POSITIONS,
    encoder_config,
    ids_and_mask,
    tiny_distilbert,
    word_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    RobertaConfig,
)

from examples.stdlib.train_standins import as_distilbert
from patching.architectures.checks import check_parents_match
from patching.architectures.distilbert import as_bert, as_bert_config
from patching.architectures.lookup import architecture_of
from patching.architectures.models import load_model
from patching.arguments import FamilyArguments
from patching.assemble import assemble, count_parameters
from patching.blocks import LayerMap
from patching.patch import build_intermediate_model, iter_family
from patching.patch import main as patch
from patching.recipe import Reference, intermediate_model, naively_pruned
from patching.student_config import KNOWN_STUDENTS, read_student_config
from train.masking import Masking

LAYER_MAP = LayerMap((0, 2, 4), 6)
KEPT = LAYER_MAP.kept


def pair(tied: bool):
    teacher = tiny_model(encoder_config("bert", 6, tied), seed=1)
    return teacher, tiny_distilbert(3, tied)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_distilbert_has_the_originals_logits(tied, tmp_path):
    original = tiny_distilbert(3, tied)
    ids_BT, mask_BT = ids_and_mask()
    bert = as_bert(original)
    for mask in (None, mask_BT):
        expected, logits = (model(ids_BT, attention_mask=mask).logits for model in (original, bert))
        real = torch.ones_like(ids_BT) if mask is None else mask
        assert torch.equal(logits[real.bool()], expected[real.bool()])
    embedding = bert.get_input_embeddings().weight
    assert embedding.data_ptr() == original.get_input_embeddings().weight.data_ptr()
    assert (bert.get_output_embeddings().weight is embedding) == tied
    bert.save_pretrained(tmp_path)
    again, found = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(again(ids_BT).logits, original(ids_BT).logits)
    assert again.config.tie_word_embeddings == tied
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_what_distilbert_lacks_is_filled_in_and_said():
    bert = as_bert(tiny_distilbert(3))
    assert not bert.bert.embeddings.token_type_embeddings.weight.any()
    assert bert.bert.pooler is None
    headless = DistilBertModel(DistilBertConfig(dim=32, n_heads=4, hidden_dim=48, n_layers=2))
    with pytest.raises(ValueError, match="DistilBertModel has no masked language modeling head"):
        as_bert(headless)
    bert_model = tiny_model(encoder_config("bert", 2))
    assert as_bert(bert_model) is bert_model


def test_a_base_model_on_disk_lacks_its_head(tmp_path):
    tiny_distilbert(2).distilbert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its weights lack vocab_layer_norm.bias, "):
        load_model(Reference(str(tmp_path)), torch.float32)


def chain(ids_BT, mask_BT, distilbert, bert, recipe):
    """The recipe's layers one after another, in the classes they come from."""
    mask_B11T = None if mask_BT is None else mask_BT[:, None, None].bool()
    own = {"student": distilbert.distilbert, "teacher": bert.bert}
    layers = {"student": own["student"].transformer.layer, "teacher": own["teacher"].encoder.layer}
    hidden_BTD = own[recipe.embedding].embeddings(input_ids=ids_BT)
    for parent, layer_idx, _ in recipe.layers:
        hidden_BTD = layers[parent][layer_idx](hidden_BTD, mask_B11T)
    if recipe.head == "teacher":
        return bert.cls(hidden_BTD)
    hidden_BTD = distilbert.activation(distilbert.vocab_transform(hidden_BTD))
    return distilbert.vocab_projector(distilbert.vocab_layer_norm(hidden_BTD))


@torch.no_grad()
@pytest.mark.parametrize("order", ["last", "first"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_size_is_the_hand_written_chain(tied, order, tmp_path):
    teacher, student = pair(tied)
    ids_BT, mask_BT = ids_and_mask()
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        recipe = intermediate_model(LAYER_MAP, k, order)
        model = assemble(recipe, teacher=teacher, student=as_bert(student))
        assert type(model) is BertForMaskedLM
        for mask in (None, mask_BT):
            expected = chain(ids_BT, mask, student, teacher, recipe)
            logits = model(ids_BT, attention_mask=mask).logits
            real = torch.ones_like(ids_BT) if mask is None else mask
            torch.testing.assert_close(logits[real.bool()], expected[real.bool()])
        assert model.config.tie_word_embeddings == (tied and recipe.embedding == recipe.head)
        model.save_pretrained(tmp_path / f"{k}")
        again, found = BertForMaskedLM.from_pretrained(tmp_path / f"{k}", output_loading_info=True)
        assert not any(found.values())
        assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
        naive = assemble(naively_pruned(LAYER_MAP, recipe), teacher=teacher)
        assert naive.config.num_hidden_layers == recipe.depth
    assert torch.equal(model(ids_BT).logits, teacher(ids_BT).logits)


def test_both_counts_of_parameters_grow_with_depth_alone():
    """The decoder's bias has a second name in an untied model; it counts once more there."""
    teacher, student = pair(tied=True)
    bert = as_bert(student)
    counts = []
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        recipe = intermediate_model(LAYER_MAP, k, "last")
        counts.append(count_parameters(assemble(recipe, teacher=teacher, student=bert).config))
    layer = sum(parameter.numel() for parameter in bert.bert.encoder.layer[0].parameters())
    assert [count.both_counted - counts[0].both_counted for count in counts] == [
        i * layer for i in range(len(counts))
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A BERT and a DistilBERT as the hub has them: no student_config.json."""
    folder = tmp_path_factory.mktemp("masked_pair")
    for name, model in zip(("teacher", "student"), pair(tied=True)):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder / "teacher", folder / "student"


@torch.no_grad()
def test_from_folders_as_from_memory(folders):
    ids_BT, _ = ids_and_mask()
    teacher, student = pair(tied=True)
    names = map(str, folders)
    model, tokenizer = build_intermediate_model(*names, 1, kept_layers=KEPT)
    in_memory, _ = build_intermediate_model(
        teacher, student, 1, kept_layers=KEPT, tokenizer=word_tokenizer()
    )
    assert torch.equal(model(ids_BT).logits, in_memory(ids_BT).logits)
    assert tokenizer.padding_side == "right"
    sizes = list(iter_family(teacher, student, kept_layers=KEPT))
    assert [size.model.config.num_hidden_layers for size in sizes] == [3, 4, 5, 6]
    assert torch.equal(sizes[0].model(ids_BT).logits, student(ids_BT).logits)


@pytest.mark.slow
@torch.no_grad()
def test_the_command_line_saves_an_ordinary_bert(folders, tmp_path):
    teacher, student = map(str, folders)
    target = tmp_path / "model"
    done = run_module(
        *("patching.patch", "--teacher_model_name_or_path", teacher),
        *("--student_model_name_or_path", student, "--kept_layers", "0,2,4"),
        *("--num_layers_to_patch", "1", "--save_directory", target),
    )
    assert done.returncode == 0, done.stderr
    assert "the student is stored as a distilbert: the models are loaded instead" in done.stdout
    model = AutoModelForMaskedLM.from_pretrained(target)
    expected, _ = build_intermediate_model(teacher, student, 1, kept_layers=KEPT)
    ids_BT, _ = ids_and_mask()
    assert torch.equal(model(ids_BT).logits, expected(ids_BT).logits)
    assert type(model) is BertForMaskedLM
    assert len(AutoTokenizer.from_pretrained(target)) == len(word_tokenizer())
    card = (target / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM" in card
    assert not (target / "generation_config.json").exists()
    provenance = json.loads((target / "provenance.json").read_text())
    num_stored = count_parameters(model.config).stored
    assert provenance["parameters"]["stored"] == num_stored
    assert provenance["kv_cache_bytes_per_token"] == 0


@torch.no_grad()
@pytest.mark.parametrize("student_format", ["distilbert", "bert"])
def test_a_bert_as_the_hub_has_it(student_format, folders, tmp_path):
    """Norms under their old names, the heads of pretraining, a stored buffer: nothing is missed,
    also where weights are copied from file to file.
    """
    teacher, student = tmp_path / "teacher", folders[1]
    shutil.copytree(folders[0], teacher)
    weights = load_file(teacher / "model.safetensors")
    old_ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in old_ends.items():
        for name in [name for name in weights if name.endswith(new)]:
            weights[name.replace(new, old)] = weights.pop(name)
    weights["bert.pooler.dense.weight"] = torch.ones(32, 32)
    weights["cls.seq_relationship.weight"] = torch.ones(2, 32)
    weights["bert.embeddings.position_ids"] = torch.arange(NUM_POSITIONS)[None]
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    if student_format == "bert":
        student = tmp_path / "student"
        as_bert(tiny_distilbert(3)).save_pretrained(student)
        word_tokenizer().save_pretrained(student)
    patch(
        [
            *("--teacher_model_name_or_path", str(teacher), "--kept_layers", "0,2,4"),
            *("--student_model_name_or_path", str(student), "--num_layers_to_patch", "2"),
            *("--save_directory", str(tmp_path / "model")),
        ]
    )
    model, found = BertForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values())
    expected, _ = build_intermediate_model(*map(str, folders), 2, kept_layers=KEPT)
    ids_BT, _ = ids_and_mask()
    assert torch.equal(model(ids_BT).logits, expected(ids_BT).logits)


def test_kept_layers_that_do_not_fit_are_one_line(folders):
    teacher, student = map(str, folders)
    for kept, message in (
        ("0,2,4,5", "the student has 3 layers and kept_layers=0,2,4,5 names 4"),
        ("1,2,3", "kept layers [1, 2, 3]: they must start at 0"),
        ("0,x", "kept_layers=0,x: write numbers"),
    ):
        with pytest.raises(ValueError) as raised:
            FamilyArguments(teacher, student, kept_layers=kept).open_family()
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="or give --kept_layers"):
        build_intermediate_model(teacher, student, 1)


def test_public_students_without_a_config_are_known(tmp_path, monkeypatch):
    names = [name for name in KNOWN_STUDENTS if "/" not in name]
    assert len(names) == 5
    for name in names:
        for owner in ("", "distilbert/"):
            layer_map = read_student_config(owner + name).layer_map
            assert layer_map == LayerMap((0, 2, 4, 7, 9, 11), 12)
            assert layer_map.max_layers_to_patch == 5
    # A folder of that name is somebody's own model.
    (tmp_path / "distilgpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="distilgpt2/student_config.json cannot be read"):
        read_student_config("distilgpt2")


def test_the_published_configs_fit_together():
    """The fields of the configs on the hub, as far as the defaults do not hold them."""
    distilbert = DistilBertConfig(activation="gelu", tie_weights_=True, qa_dropout=0.1)
    check_parents_match(as_bert_config(distilbert), BertConfig())
    robertas = [
        RobertaConfig(
            num_hidden_layers=depth,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
        for depth in (6, 12)
    ]
    check_parents_match(*robertas)
    check_parents_match(GPT2Config(n_layer=6, summary_type="cls_index"), GPT2Config())


def test_a_decoder_of_these_architectures_is_refused():
    config = encoder_config("bert", 2)
    config.is_decoder = True
    with pytest.raises(ValueError, match="is_decoder=True in the bert config"):
        architecture_of(config)


def test_a_tokenizer_without_masks_is_refused():
    with pytest.raises(ValueError, match="needs a mask token and its tokenizer has none"):
        Masking.of(byte_tokenizer())


@torch.no_grad()
def test_the_way_back_that_makes_the_stand_in():
    bert = tiny_model(encoder_config("bert", 3))
    ids_BT, mask_BT = ids_and_mask()
    real_BT = mask_BT.bool()
    again = as_distilbert(bert)
    expected = bert(ids_BT, attention_mask=mask_BT).logits[real_BT]
    torch.testing.assert_close(again(ids_BT, attention_mask=mask_BT).logits[real_BT], expected)
    back = as_bert(again)(ids_BT, attention_mask=mask_BT).logits[real_BT]
    torch.testing.assert_close(back, expected)
