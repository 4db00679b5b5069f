"""One optimizer step of distillation: this toolkit's against a straightforward implementation.

The straightforward one computes both models' full logits and all hidden states, `log_softmax` on
both, and one backward pass. Both sides have the same weights and tokens. They are timed in turn in
one process, and the peak memory of each is measured in a process of its own. With --growth: how
both grow with the number of tokens and with the vocabulary.

    python -m benchmarks.distill_step
    python -m benchmarks.distill_step --growth
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks.ratios import ratio_of_pairs
from patching.blocks import LayerMap
from patching.running.peak_memory import peak_bytes_during
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count
from train.student import new_student

WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.1, cosine=2.0, temperature=1.0)
MIB = 2**20
Step = Callable[[], Tensor]


def models(
    vocab_size: int, hidden_size: int, num_layers: int, device: str
) -> tuple[PreTrainedModel, PreTrainedModel, LayerMap]:
    """Return a bf16 teacher shaped like a Qwen3 with a tied head, and its fp32 student with half
    of the layers.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
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

    def __init__(self, name: str, student, teacher, layer_map: LayerMap, ids_BT: Tensor) -> None:
        self.name, self.student = name, student
        if name == "ours":
            install_distillation_forward(student, teacher, layer_map, WEIGHTS)
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
    student, teacher, layer_map = models(
        settings.vocab_size, settings.hidden_size, settings.num_layers, settings.device
    )
    ids_BT = torch.randint(
        settings.vocab_size,
        (settings.num_tokens // settings.row_length, settings.row_length),
        device=settings.device,
    )
    # Ours replaces the teacher's forward, so each side has its own teacher.
    plain = Side(
        "straightforward", copy.deepcopy(student), copy.deepcopy(teacher), layer_map, ids_BT
    )
    return Side("ours", student, teacher, layer_map, ids_BT), plain


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


def report(settings: argparse.Namespace) -> None:
    rate = matrix_product_rate(settings.device)
    ours, plain = both_sides(settings)
    loss_difference, gradient_difference = agreement(ours, plain)
    print(
        f"same loss within {loss_difference:.1e}, same gradients within {gradient_difference:.1e}"
    )
    times = {ours.name: [], plain.name: []}
    for side in (ours, plain):
        side.step()
    with FlopCounterMode(display=False) as counter:
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
    flops = counter.get_total_flops()
    print(
        f"products: {flops / medians['ours'] / 1e9:,.0f} GFLOP/s of {rate / 1e9:,.0f} GFLOP/s "
        f"measured, {flops / medians['ours'] / rate:.0%}"
    )
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
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--growth", action="store_true", help="how both grow, at smaller sizes")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    (growth if parsed.growth else report)(parsed)
