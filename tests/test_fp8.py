"""A teacher in FP8, with the products of a CPU, and of a GPU if it has them."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from patching_models import GATED
from torch import nn
from transformers import CONFIG_MAPPING

from patching.running.hidden_states import hidden_states_at
from train.fp8 import LEAST_CAPABILITY, Fp8Linear, use_fp8
from train.student import cast_parameters
from train.train import main


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_fp8_is_a_few_percent_off(bias):
    torch.manual_seed(0)
    linear, hidden = nn.Linear(64, 48, bias=bias), torch.randn(2, 5, 64)
    linear.weight.data[3] *= 100  # each row has its own scale
    with torch.no_grad():
        out = Fp8Linear(linear)(hidden)
        error = (out.float() - linear(hidden)).norm(dim=(0, 1)) / linear(hidden).norm(dim=(0, 1))
    assert out.shape == (2, 5, 48)
    assert out.dtype == torch.bfloat16
    assert error.max() < 0.08


HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
ON_GPU = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with FP8 products")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("kind", ["llama-untied", "gpt_neox-untied"])
def test_a_teacher_in_fp8_has_nearly_the_same_states(kind, device):
    teacher = tiny_model(tiny_config(kind, 4)).to(device)
    cast_parameters(teacher, torch.bfloat16)
    ids_BT = torch.randint(0, 256, (2, 16), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        (before,) = hidden_states_at(teacher, [4], ids_BT)
        use_fp8(teacher)
        (after,) = hidden_states_at(teacher, [4], ids_BT)
    assert any(type(module) is Fp8Linear for module in teacher.modules())
    assert type(teacher.get_output_embeddings()) is nn.Linear
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    assert 0.98 < cosine.min() < 1


@pytest.mark.parametrize("model_type", ["afmoe", "jetmoe"])
def test_what_chooses_experts_stays_as_it_is(model_type):
    experts = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2}
    widths = {"head_dim": 8, "moe_intermediate_size": 16}
    config = CONFIG_MAPPING[model_type](num_hidden_layers=2, **GATED | experts | widths)
    teacher = tiny_model(config)
    before = {name for name, module in teacher.named_modules() if type(module) is nn.Linear}
    use_fp8(teacher)
    kept = {name for name, module in teacher.named_modules() if type(module) is nn.Linear}
    routers = {name for name in before if "router" in name}
    assert routers
    assert kept == routers | {"lm_head"}
    assert len(kept) < len(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be FP8 here")
def test_fp8_is_refused_without_the_hardware(pair_folders, text_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--teacher_model_name_or_path", str(pair_folders[0]), "--dataset", str(text_file),
              "--save_directory", str(tmp_path / "s"), "--teacher_fp8"])  # fmt: skip
    assert raised.value.code == 2
    assert "needs a CUDA GPU of compute capability 9.0" in capsys.readouterr().err
