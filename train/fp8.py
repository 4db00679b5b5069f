"""FP8 products for the frozen teacher, on GPUs that have them.

Each row of a weight, and each token's input, is scaled to the range of float8_e4m3fn. The layers'
linear modules are replaced. Norms, attention, embeddings and the head stay as they are, and so do
routers, which would choose other experts. The teacher's states are then those of a slightly
different teacher: a product is off by a few percent.

Shapes: N tokens, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.experts import is_in_router
from patching.architectures.lookup import architecture_of
from train.training_args import DistillationArguments

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_CAPABILITY = (9, 0)
"""Of the GPU: scales per row need Hopper or later."""


def check_fp8(args: DistillationArguments) -> None:
    """Raise ValueError where the teacher cannot be run in FP8."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ValueError(
            f"teacher_fp8: needs a CUDA GPU of compute capability {least} or above, leave it out"
        )
    if args.fsdp:
        raise ValueError(
            "teacher_fp8: a sharded teacher keeps its dtype, leave out --teacher_fp8 or "
            "--fsdp_config"
        )
    if not args.bf16:
        raise ValueError("teacher_fp8: FP8 products give bf16, leave out --bf16 False")


class Fp8Linear(nn.Module):
    """A linear module with its weight in FP8, which gives bf16. It has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI, scale_O1 = scaled(linear.weight.detach())
        self.register_buffer("weight_OI", weight_OI, persistent=False)
        self.register_buffer("scale_1O", scale_O1.T.contiguous(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias_O", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_NI, scale_N1 = scaled(hidden.flatten(0, -2))
        out_NO = torch._scaled_mm(
            hidden_NI,
            self.weight_OI.T,
            scale_a=scale_N1,
            scale_b=self.scale_1O,
            bias=self.bias_O,
            out_dtype=torch.bfloat16,
        )
        return out_NO.unflatten(0, hidden.shape[:-1])


def scaled(values_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row in FP8, and the fp32 scales (R, 1) that give the rows back."""
    values_RI = values_RI.float()
    scale_R1 = values_RI.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (values_RI / scale_R1).to(FP8), scale_R1


def use_fp8(teacher: PreTrainedModel) -> None:
    """Replace the linear modules of a frozen model's layers in place. Routers are left alone, and
    modules with sides that are no multiples of 16, because the kernels need that.
    """
    for layer in teacher.get_submodule(architecture_of(teacher.config).layers):
        for name, module in [*layer.named_modules()]:
            sides = module.weight.shape if type(module) is nn.Linear else (1,)
            if not any(side % 16 for side in sides) and not is_in_router(name):
                layer.set_submodule(name, Fp8Linear(module))
