"""One optimizer step of distillation: this toolkit's against a straightforward implementation.

The straightforward one computes both models' full logits and all hidden states, `log_softmax` on
both, and one backward pass. Both sides have the same weights and tokens. They are timed in turn in
one process, and the peak memory of each is measured in a process of its own. With --growth: how
both grow with the number of tokens and with the vocabulary.

    python -m benchmarks.distill_step
    python -m benchmarks.distill_step --growth
    python -m benchmarks.distill_step --shape smollm2 --compile

--shape smollm2 has the shape of SmolLM2-135M and 16 rows of 256 tokens. --compile compiles our side
as `train.train --torch_compile` does.
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from benchmarks.ratios import ratio_of_pairs
from patching.blocks import LayerMap
from patching.running.peak_memory import peak_bytes_during
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count
from train.speed import reuse_freed_memory, speed_up
from train.student import new_student

WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.1, cosine=2.0, temperature=1.0)
COMPILED = SimpleNamespace(
    use_liger_kernel=False,
    torch_compile=True,
    torch_compile_backend="inductor",
    torch_compile_mode=None,
)
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "num_layers": 30, "row_length": 256}
MIB = 2**20
Step = Callable[[], Tensor]


def teacher_config(settings: argparse.Namespace) -> PreTrainedConfig:
    """Return the config of a Llama like SmolLM2-135M, or of a small Qwen3. The head is tied."""
    hidden_size = settings.hidden_size
    shape = {
        "vocab_size": settings.vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": hidden_size // 64,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    if settings.shape == "smollm2":
        return LlamaConfig(intermediate_size=1536, num_key_value_heads=3, **shape)
    key_value_heads = max(1, hidden_size // 128)
    return Qwen3Config(
        intermediate_size=3 * hidden_size, num_key_value_heads=key_value_heads, **shape
    )


def models(
    config: PreTrainedConfig, device: str
) -> tuple[PreTrainedModel, PreTrainedModel, LayerMap]:
    """Return a bf16 teacher and its fp32 student with half of the layers."""
    num_layers = config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    teacher.requires_grad_(False)
    layer_map = LayerMap((*range(0, num_layers - 1, 2), num_layers - 1), num_layers)
    student = new_student(teacher, layer_map)
    with torch.no_grad():  # a little noise, otherwise teacher and student would agree
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return student.train(), teacher, layer_map


def straightforward_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: LayerMap, ids_BT: Tensor
) -> Tensor:
    """The loss as one would first write it."""
    with torch.no_grad():
        from_teacher = teacher(ids_BT, output_hidden_states=True, use_cache=False)
    from_student = student(ids_BT, output_hidden_states=True, use_cache=False)
    log_p = from_student.logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    log_q = from_teacher.logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    cross_entropy = nn.functional.nll_loss(log_p, ids_BT[:, 1:].flatten())
    kl = nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    cosine = torch.stack(
        [
            1
            - nn.functional.cosine_similarity(
                from_student.hidden_states[i].float(), from_teacher.hidden_states[j].float(), dim=-1
            ).mean()
            for i, j in layer_map.alignment_pairs
        ]
    ).mean()
    return WEIGHTS.cross_entropy * cross_entropy + WEIGHTS.kl * kl + WEIGHTS.cosine * cosine


class Side:
    """One implementation of the step, with its own weights."""

    def __init__(
        self, name: str, student, teacher, layer_map: LayerMap, ids_BT: Tensor, compiled=False
    ) -> None:
        self.name, self.student = name, student
        if name == "ours":
            weights = WEIGHTS
            if compiled:
                weights = WEIGHTS._replace(compile_backend=COMPILED.torch_compile_backend)
                for model in (student, teacher):
                    speed_up(model, COMPILED)
            install_distillation_forward(student, teacher, layer_map, weights)
            counts = count(ids_BT)
            self.loss = lambda: student(input_ids=ids_BT, labels=ids_BT, counts=counts).loss
        else:
            self.loss = lambda: straightforward_loss(student, teacher, layer_map, ids_BT)
        self.device = ids_BT.device.type
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def backward(self) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # as while accumulating
        return loss


def both_sides(settings: argparse.Namespace) -> tuple[Side, Side]:
    if settings.device == "cpu":
        reuse_freed_memory()
    student, teacher, layer_map = models(teacher_config(settings), settings.device)
    ids_BT = torch.randint(
        settings.vocab_size,
        (settings.num_tokens // settings.row_length, settings.row_length),
        device=settings.device,
    )
    # Ours replaces the teacher's forward, so each side has its own teacher.
    plain = Side(
        "straightforward", copy.deepcopy(student), copy.deepcopy(teacher), layer_map, ids_BT
    )
    return Side("ours", student, teacher, layer_map, ids_BT, settings.compile), plain


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(run: Step, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_of_step(side: Side) -> int:
    """Return the most memory of a step beyond what stays: weights, gradients, optimizer states."""
    side.step()
    return peak_bytes_during(side.step, side.device)


def peak_in_own_process(settings: argparse.Namespace, index: int) -> int:
    """Measure side `index` in a new process, where it cannot reuse memory freed earlier."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (settings, index))


def _peak(settings: argparse.Namespace, index: int) -> int:
    torch.set_num_threads(settings.threads)
    sides = list(both_sides(settings))
    side = sides.pop(index)
    del sides
    return peak_of_step(side)


def agreement(ours: Side, plain: Side) -> tuple[float, float]:
    """Return the relative differences of the loss, and of all gradients as one vector."""
    losses, norms = [], []
    for side in (ours, plain):
        side.optimizer.zero_grad()
        losses.append(float(side.backward()))
    pairs = list(zip(ours.student.parameters(), plain.student.parameters()))
    norms = [sum(float((a.grad - b.grad).square().sum()) for a, b in pairs) ** 0.5]
    norms.append(sum(float(b.grad.square().sum()) for _, b in pairs) ** 0.5)
    return abs(losses[0] - losses[1]) / abs(losses[1]), norms[0] / norms[1]


def matrix_product_rate(device: str, size: int = 2048, repeats: int = 5) -> float:
    """Return the FLOP/s of a large bf16 matrix product on this machine, the best of a few."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(repeats))


class ProductShapes(TorchDispatchMode):
    """Counts the matrix products that run, by shapes, strides and dtypes of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            factors = args[:2] if packet == torch.ops.aten.mm else args[1:3]
            self.counts[tuple((a.shape, a.stride(), a.dtype) for a in factors)] += 1
        return func(*args, **(kwargs or {}))


def rate_of_products(counts: Counter[tuple], device: str, repeats: int = 5) -> float:
    """Return the FLOP/s of these products alone, each the best of a few, written to the same memory
    every time.
    """
    flops = total_seconds = 0.0
    for factors, num_runs in counts.items():
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride, dtype in factors
        )
        out = a @ b
        best = min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats))  # noqa: B023
        flops += num_runs * 2 * a.shape[0] * a.shape[1] * b.shape[1]
        total_seconds += num_runs * best
    return flops / total_seconds


def report(settings: argparse.Namespace) -> None:
    large_rate = matrix_product_rate(settings.device)
    if settings.compile:  # inside compiled layers products cannot be seen
        uncompiled, _ = both_sides(argparse.Namespace(**vars(settings) | {"compile": False}))
        with ProductShapes() as products, FlopCounterMode(display=False) as counter:
            uncompiled.step()
        del uncompiled, _
    ours, plain = both_sides(settings)
    loss_difference, gradient_difference = agreement(ours, plain)
    print(
        f"same loss within {loss_difference:.1e}, same gradients within {gradient_difference:.1e}"
    )
    times = {ours.name: [], plain.name: []}
    for side in (ours, plain):
        side.step()
    if not settings.compile:
        with ProductShapes() as products, FlopCounterMode(display=False) as counter:
            ours.step()
    for _ in range(settings.repeats):
        for side in (ours, plain):
            times[side.name].append(seconds(side.step, settings.device))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours.step()
    del ours, plain, side
    medians = {name: statistics.median(values) for name, values in times.items()}
    pair_ratios = [a / b for a, b in zip(*times.values())]
    print(f"time: {medians['ours']:.2f} s, straightforward {medians['straightforward']:.2f} s")
    print(f"      {ratio_of_pairs(pair_ratios)}")
    peaks = [peak_in_own_process(settings, index) for index in (0, 1)]
    print(
        f"memory: {peaks[0] / MIB:,.0f} MiB, straightforward {peaks[1] / MIB:,.0f} MiB, "
        f"ratio 1/{peaks[1] / peaks[0]:.1f}"
    )
    rate = counter.get_total_flops() / medians["ours"]
    print(f"products: {rate / 1e9:,.0f} GFLOP/s in the step")
    for name, alone in (
        ("the same products alone", rate_of_products(products.counts, settings.device)),
        ("one large product", large_rate),
    ):
        print(f"      {rate / alone:.0%} of the {alone / 1e9:,.0f} GFLOP/s of {name}")
    print(
        profiled.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40
        )
    )


def growth(settings: argparse.Namespace) -> None:
    print("tokens  vocabulary  ours s  plain s  ratio  ours MiB  plain MiB  ratio")
    shapes = [(tokens, 32768) for tokens in (512, 1024, 2048)]
    shapes += [(1024, vocabulary) for vocabulary in (16384, 65536, 131072)]
    for num_tokens, vocab_size in shapes:
        changed = argparse.Namespace(
            **vars(settings)
            | {"num_tokens": num_tokens, "vocab_size": vocab_size, "row_length": 256}
        )
        ours, plain = both_sides(changed)
        medians = []
        for side in (ours, plain):
            side.step()
            runs = [seconds(side.step, settings.device) for _ in range(settings.repeats)]
            medians.append(statistics.median(runs))
        del ours, plain, side
        peaks = [peak_in_own_process(changed, index) / MIB for index in (0, 1)]
        print(
            f"{num_tokens:6}  {vocab_size:10}  {medians[0]:6.2f}  {medians[1]:7.2f}  "
            f"{medians[0] / medians[1]:5.2f}  {peaks[0]:8,.0f}  {peaks[1]:9,.0f}  "
            f"1/{peaks[1] / peaks[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("qwen3", "smollm2"), default="qwen3")
    parser.add_argument("--compile", action="store_true", help="compile our side")
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--growth", action="store_true", help="how both grow, at smaller sizes")
    if parser.parse_known_args()[0].shape == "smollm2":
        parser.set_defaults(**SMOLLM2)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    (growth if parsed.growth else report)(parsed)
