"""An optimizer step of distillation at two commits of this repository.

Each side is a process that runs in its own checkout, with the shape of SmolLM2-135M and the same
tokens. Their steps take turns. Ratios of CPU time are less disturbed by other work on the machine
than those of elapsed time, if both run on one thread.

    git worktree add ../before COMMIT
    python -m benchmarks.commits ../before
    python -m benchmarks.commits ../before --compile both
    python -m benchmarks.commits ../before --compile now

The last one is what long runs of `train.train` do by default on a CPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

CHECKOUT = Path(__file__).parents[1]
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def take_steps(settings: argparse.Namespace, compiles: bool) -> None:
    """Take a step for each line of standard input, and print its elapsed seconds and its seconds of
    CPU time. The toolkit is that of the checkout in PYTHONPATH.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from patching.blocks import LayerMap
    from train import speed
    from train.distillation import install_distillation_forward
    from train.loss import LossWeights, count
    from train.student import new_student

    torch.set_num_threads(settings.threads)
    if hasattr(speed, "reuse_freed_memory"):  # an earlier commit may lack it
        speed.reuse_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    teacher.requires_grad_(False)
    num_layers = config.num_hidden_layers
    layer_map = LayerMap((*range(0, num_layers - 1, 2), num_layers - 1), num_layers)
    student = new_student(teacher, layer_map).train()
    with torch.no_grad():  # a little noise, otherwise teacher and student would agree
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    weights = LossWeights(cross_entropy=1.0, kl=0.1, cosine=2.0, temperature=1.0)
    if compiles:
        asked = SimpleNamespace(
            use_liger_kernel=False,
            torch_compile=True,
            torch_compile_backend="inductor",
            torch_compile_mode=None,
        )
        for model in (student, teacher):
            speed.speed_up(model, asked)
        if "compile_backend" in weights._fields:
            weights = weights._replace(compile_backend="inductor")
    install_distillation_forward(student, teacher, layer_map, weights)
    ids_BT = torch.randint(config.vocab_size, (settings.rows, settings.row_length))
    counts = count(ids_BT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = student(input_ids=ids_BT, labels=ids_BT, counts=counts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(time.perf_counter() - start, time.process_time() - cpu_start, flush=True)


def main(settings: argparse.Namespace) -> None:
    sides = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, *sys.argv[1:], "--take_steps", name],
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, folder in (("before", settings.before), ("now", CHECKOUT))
    ]
    times: list[list[tuple[float, ...]]] = [[], []]
    for repeat in range(settings.warm_up + settings.repeats):
        for side, of_side in zip(sides, times):
            side.stdin.write("\n")
            side.stdin.flush()
            taken = tuple(map(float, side.stdout.readline().split()))
            if repeat >= settings.warm_up:
                of_side.append(taken)
    for side in sides:
        side.communicate()
    for name, before, now in zip(("elapsed", "CPU"), zip(*times[0]), zip(*times[1])):
        gains = [a / b for a, b in zip(before, now)]
        print(
            f"{name}: {statistics.median(before):.2f} s before, {statistics.median(now):.2f} s "
            f"now, gain {statistics.median(gains):.2f} (pairs {min(gains):.2f} to {max(gains):.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="checkout of the other commit")
    parser.add_argument("--compile", choices=("both", "now"), help="sides to compile")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row_length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm_up", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("--take_steps", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.take_steps is None:
        main(parsed)
    else:
        take_steps(parsed, parsed.compile in ("both", parsed.take_steps))
