"""The family in Python: from names or models, by size, sharing one copy of the weights."""

import pytest
import torch
from patching_models import LAYER_MAP, family_pair, save_models
from torch import nn
from transformers import AutoModelForCausalLM

from patching.architectures.models import load_model
from patching.assemble import assemble
from patching.checkpoints.layout import layout_of
from patching.devices import usable_device
from patching.family import Family
from patching.patch import build_intermediate_model, iter_family
from patching.recipe import intermediate_model, patched_model
from patching.running.placement import device_map_of, dispatch
from patching.student_config import StudentConfig

TOKENS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


@torch.no_grad()
def test_members_by_size(folders):
    family = Family.from_pretrained(*folders)
    assert len(family) == 3
    assert family.order == "last"
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    for k, original in ((0, student), (2, teacher), (-1, teacher)):
        member = family[k]
        assert torch.equal(member.model(TOKENS).logits, original(TOKENS).logits)
        assert member.num_layers_to_patch == k % 3
        assert member.recipe == family.recipe(k % 3)
    assert torch.equal(family.model(1)(TOKENS).logits, family[1].model(TOKENS).logits)
    with pytest.raises(IndexError, match="this family has sizes 0-2"):
        family[3]
    with pytest.raises(ValueError, match="num_layers_to_patch=3: this student has 2"):
        family.recipe(3)
    assert [member.num_layers_to_patch for member in family] == [0, 1, 2]


def test_a_size_by_layers_or_by_target(folders):
    family = Family.from_pretrained(*folders)
    sizes = family.sizes()
    assert [size.depth for size in sizes] == [family.recipe(k).depth for k in range(3)]
    assert family.recipe(patched_layers=[2]) == patched_model(LAYER_MAP, frozenset({2}))
    limit = sizes[0].parameters.stored
    assert family.recipe(target_params=limit) == family.recipe(0)
    assert family.recipe(target_bytes=10**12) == family.recipe(2)
    model = family.model(target_params=limit)
    assert sum(p.numel() for p in model.parameters()) == limit
    with pytest.raises(ValueError, match="target_params=1: no member of this family fits"):
        family.recipe(target_params=1)
    with pytest.raises(ValueError, match="name one size"):
        family.recipe()
    with pytest.raises(ValueError, match="name one size"):
        family.recipe(1, target_bytes=5)
    with pytest.raises(ValueError, match="this student has layers 0-3, not 9"):
        family.model(patched_layers={9})


def test_orders_are_names_lists_and_files(folders, tmp_path):
    (tmp_path / "order.json").write_text("[2, 0]")
    for order in ([2, 0], (2, 0), tmp_path / "order.json", str(tmp_path / "order.json")):
        assert Family.from_pretrained(*folders, order).recipe(1) == patched_model(
            LAYER_MAP, frozenset({2})
        )
    family = Family.from_pretrained(*folders, "first")
    assert family.with_order("last").recipe(1) == Family.from_pretrained(*folders).recipe(1)
    with pytest.raises(ValueError, match="order=middle: choose last, first"):
        Family.from_pretrained(*folders, "middle")


def test_weights_are_loaded_late_and_once(folders, monkeypatch):
    loads = []
    monkeypatch.setattr(
        "patching.parents.load_model", lambda *a: loads.append(a[0].name_or_path) or load_model(*a)
    )
    family = Family.from_pretrained(*folders, dtype=torch.float32)
    family.sizes(), family.recipe(1)
    assert loads == []
    family.model(0)
    assert loads == [folders[1]]  # the student alone
    for _ in family:
        pass
    assert sorted(loads) == sorted(folders)
    assert family.with_order("first").model(1).dtype == torch.float32
    assert len(loads) == 2
    family.parents.release()
    family.model(2)
    assert len(loads) == 3


def test_a_parent_by_name_follows_the_other_ones_device(folders):
    teacher = AutoModelForCausalLM.from_pretrained(folders[0]).to("meta")
    family = Family.from_pretrained(teacher, folders[1])
    assert family.parents.device == torch.device("meta")
    assert family.parents.load(["student"])["student"].device == torch.device("meta")
    student = AutoModelForCausalLM.from_pretrained(folders[1])
    with pytest.raises(ValueError, match="are on cpu and meta: move both to one device"):
        Family.from_pretrained(teacher, student)
    family.parents.release()
    assert family.parents.models.keys() == {"teacher"}  # what the caller gave stays


def test_a_build_for_an_accelerator_that_is_not_there_runs_on_the_cpu(monkeypatch):
    """PyTorch from pip is built for CUDA on Linux, also where there is no GPU."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert usable_device(None) == torch.device("cpu")


def test_weights_go_to_their_device_as_they_are_read(folders, monkeypatch):
    maps = []
    monkeypatch.setattr("patching.parents.load_model", lambda *a: maps.append(a[-1]) or a)
    for how, expected in (({"device": "meta"}, {"": torch.device("meta")}),
                          ({"device_map": "auto"}, "auto")):  # fmt: skip
        Family.from_pretrained(*folders, **how).parents.load(["teacher"])
        assert maps.pop() == expected


@torch.no_grad()
def test_how_weights_are_loaded(folders):
    expected = Family.from_pretrained(*folders, attn_implementation="sdpa").model(1)(TOKENS).logits
    family = Family.from_pretrained(*folders, device_map="cpu", attn_implementation="eager")
    model = family.model(1)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(TOKENS).logits, expected)
    with pytest.raises(ValueError, match="dtype=int8: choose auto, bfloat16"):
        Family.from_pretrained(*folders, dtype="int8")


def with_adapters(model):
    model._hf_peft_config_loaded = True  # what add_adapter of transformers leaves
    return model


def test_several_devices_are_told_apart_by_layer(folders):
    model = Family.from_pretrained(*folders).model(1)
    model.model.layers[2].to("meta")  # the only second device there is everywhere
    places = device_map_of(model)
    assert places.pop("model.layers.2") == torch.device("meta")
    assert set(places.values()) == {torch.device("cpu")}
    layers = {f"model.layers.{i}" for i in range(len(model.model.layers)) if i != 2}
    assert places.keys() == layers | {"model.embed_tokens", "model.norm", "lm_head"}
    with pytest.raises(ValueError, match="device_map offloads some of the weights"):
        dispatch(model)


class PeftModelForCausalLM(nn.Module):
    pass


class DistributedDataParallel(nn.Module):
    pass


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (with_adapters, "the teacher has PEFT adapters: merge them first"),
        (lambda model: PeftModelForCausalLM(), "is a PeftModelForCausalLM.*merge_and_unload"),
        (lambda model: DistributedDataParallel(), "is a DistributedDataParallel.*its .module"),
        (torch.compile, "is a OptimizedModule.*torch.compile was called on"),
        (lambda model: model.model, "has no language modeling head"),
    ],
)
def test_wrapped_models_are_named_and_refused(folders, wrap, message):
    teacher = wrap(AutoModelForCausalLM.from_pretrained(folders[0]))
    with pytest.raises(ValueError, match=message) as refused:
        Family.from_pretrained(teacher, folders[1])
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_models_in_memory_share_their_tensors():
    teacher, student = family_pair("qwen3", tied=True)
    config = StudentConfig(LAYER_MAP)
    tokenizer = object()
    model, same = build_intermediate_model(
        teacher, student, 1, False, student_config=config, tokenizer=tokenizer
    )
    assert same is tokenizer
    pointers = {p.data_ptr() for parent in (teacher, student) for p in parent.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= pointers
    expected = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    with pytest.raises(ValueError, match="load both models in one dtype"):
        build_intermediate_model(
            teacher, student.to(torch.float16), 1, student_config=config, tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match="does not say where it came from: give kept_layers"):
        build_intermediate_model(teacher, student, 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give its tokenizer too"):
        build_intermediate_model(teacher, student, 1, student_config=config)
    with pytest.raises(ValueError, match="both name an order"):
        build_intermediate_model(teacher, student, 1, True, order="last", student_config=config)


@torch.no_grad()
def test_a_loaded_model_knows_its_folder(folders):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folders[0])
    student = AutoModelForCausalLM.from_pretrained(folders[1])
    tokens = torch.arange(8)[None]
    by_name, _ = build_intermediate_model(*folders, 1)
    for parents in ((teacher, student), (teacher, folders[1]), (folders[0], student)):
        model, tokenizer = build_intermediate_model(*parents, 1)
        assert torch.equal(model(tokens).logits, by_name(tokens).logits)
        assert tokenizer.padding_side == "left"


@torch.no_grad()
def test_every_size_in_turn_over_one_copy_of_the_parents(folders, monkeypatch):
    loads = []
    monkeypatch.setattr(
        "patching.parents.load_model", lambda *a: loads.append(a[0].name_or_path) or load_model(*a)
    )
    members = iter_family(*folders, patch_first_k_layers=True)
    assert loads == []
    tokens = torch.arange(8)[None]
    seen = []
    pointers = set()
    for k, recipe, model in members:
        seen.append(k)
        assert recipe.depth == model.config.num_hidden_layers
        with monkeypatch.context() as counted:
            counted.setattr("patching.parents.load_model", load_model)
            built, _ = build_intermediate_model(*folders, k, True)
        assert torch.equal(model(tokens).logits, built(tokens).logits)
        pointers |= {p.data_ptr() for p in model.parameters()}
    assert seen == [0, 1, 2]
    assert sorted(loads) == sorted(folders)
    teacher, student = (
        Family.from_pretrained(*folders).config(recipe)
        for recipe in (
            patched_model(LAYER_MAP, frozenset(range(4))),
            patched_model(LAYER_MAP, frozenset()),
        )
    )
    count = len(list(layout_of(teacher, torch.float32).tensors)) - 1
    count += len(list(layout_of(student, torch.float32).tensors)) - 1
    assert len(pointers) == count  # each parent's tensors once, head and embedding being one
    assert [k for k, *_ in iter_family(*folders, sizes=[2, 0])] == [2, 0]
    with pytest.raises(ValueError, match="num_layers_to_patch=3"):
        iter_family(*folders, sizes=[3])
