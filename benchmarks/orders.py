"""Searching an order: candidates that share layers, against each candidate as a separate model.

    python -m benchmarks.orders [--teacher DIR --student DIR --calibration TEXT]
    python -m benchmarks.orders --count

All sides measure the same sets of a KLPatch search, of a beam and of an exact search, on the same
text and with the same KL. They differ in what they run for it. `shared`, as patching.orders does,
runs each distinct prefix of layers once. `alone` runs each candidate from its embedding on.
`beside` also runs the teacher again for each candidate, as one must where its logits are too large
to keep. Without --teacher and --student, the models are a random pair of 16 layers. The output has
layer forwards of candidates and teacher, seconds, and whether all sides choose the same sets.
--count works out, from integers alone, what a KLPatch search takes for published layer maps, by the
order that it finds.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from patching.assemble import assemble
from patching.blocks import LayerMap, as_layer_list, default_kept_layers
from patching.family import Family
from patching.orders.measurements import SETS_PER_TREE
from patching.orders.search import PatchedLayers, all_sets, order_of_sets, search
from patching.recipe import initial_student, patched_model
from patching.running.calibration import Calibration, padded_batches
from patching.running.teacher_kl import TeacherKL


def random_models() -> tuple[LayerMap, dict[str, Qwen3ForCausalLM]]:
    """A teacher, and a student whose layers differ from it by noise."""
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(config).eval()
    layer_map = LayerMap(default_kept_layers(16, 2, 1, 2), 16)
    student = copy.deepcopy(assemble(initial_student(layer_map), teacher=teacher))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return layer_map, {"teacher": teacher, "student": student}


SIDES = ("shared", "alone", "beside")


class Forwards(NamedTuple):
    """Layers run, over all batches or for one of them."""

    candidates: int
    teacher: int

    def times(self, other: "Forwards") -> str:
        """How many times the layers of another side, for the candidates alone and in all."""
        return f"{self.candidates / other.candidates:.2f} x, {sum(self) / sum(other):.2f} x in all"


class Side:
    """Measures sets in one of the three ways and remembers the results."""

    def __init__(self, name: str, layer_map: LayerMap, teacher_kl: Callable[[], TeacherKL]) -> None:
        self.name, self.layer_map, self.teacher_kl = name, layer_map, teacher_kl
        self.found: dict[PatchedLayers, float] = {}
        self.kls = [teacher_kl()]
        """Measurers used so far; each has run the teacher once."""

    @property
    def forwards(self) -> Forwards:
        teacher = self.layer_map.num_teacher_layers * sum(len(kl.batches) for kl in self.kls)
        return Forwards(sum(kl.num_layer_forwards for kl in self.kls), teacher)

    def __call__(self, sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        layers = range(len(self.layer_map.kept))
        missing = sorted(set(sets) - self.found.keys(), key=lambda s: [i in s for i in layers])
        at_once = SETS_PER_TREE if self.name == "shared" else 1
        for start in range(0, len(missing), at_once):
            group = {
                as_layer_list(sorted(patched)): patched
                for patched in missing[start : start + at_once]
            }
            recipes = {name: patched_model(self.layer_map, s) for name, s in group.items()}
            if self.name == "beside" and self.found:
                self.kls.append(self.teacher_kl())
            remember = self.name == "shared" and len(missing) <= SETS_PER_TREE
            found = self.kls[-1].of(recipes, remember=remember)
            self.found |= {patched: found[name] for name, patched in group.items()}
        return self.found


PUBLISHED = {
    "Qwen3-4B, Qwen3-8B": LayerMap(default_kept_layers(36, 2, 1, 2), 36),
    "Pythia-2.8B, Pythia-6.9B": LayerMap(default_kept_layers(32, 2, 1, 2), 32),
    "Llama-3.2-3B": LayerMap(default_kept_layers(28, 2, 2, 1), 28),
    "the demo": LayerMap(default_kept_layers(12, 2, 1, 2), 12),
}


def forwards_of_search(layer_map: LayerMap, found: str | int) -> dict[str, Forwards]:
    """Layers that each side runs per batch, in a KLPatch search that finds the order `last`,
    `first`, or a random one (named by its seed).
    """
    asked: set[PatchedLayers] = set()
    draw = random.Random(found)

    def measure(sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        asked.update(sets)
        if isinstance(found, int):
            return {patched: draw.random() for patched in sorted(sets, key=sorted)}
        wanted = layer_map.patched_layers(layer_map.num_patched(next(iter(sets))), found)
        return {patched: float(patched != wanted) for patched in sets}

    search(layer_map, measure)
    recipes = [patched_model(layer_map, patched) for patched in asked]
    prefixes = {
        (r.embedding, *r.layers[:depth]) for r in recipes for depth in range(1, r.depth + 1)
    }
    teacher, alone = layer_map.num_teacher_layers, sum(recipe.depth for recipe in recipes)
    return {
        "shared": Forwards(len(prefixes), teacher),
        "alone": Forwards(alone, teacher),
        "beside": Forwards(alone, teacher * len(recipes)),
    }


def print_counts() -> None:
    for name, layer_map in PUBLISHED.items():
        for found in ("last", "first", "random"):
            seeds = range(20) if found == "random" else [found]
            counts = [forwards_of_search(layer_map, seed) for seed in seeds]
            cells = [name, found]
            for side in SIDES:
                sums = Forwards(*(sum(numbers) for numbers in zip(*(c[side] for c in counts))))
                candidates, teacher = (round(number / len(counts)) for number in sums)
                cells.append(f"{candidates:,} + {teacher:,}")
                if side == "shared":
                    shared = sums
                else:
                    cells[-1] += f" ({sums.times(shared)})"
            print(f"| {' | '.join(cells)} |")


def main(arguments: argparse.Namespace) -> None:
    if arguments.count:
        print_counts()
        return
    if arguments.teacher is None:
        layer_map, models = random_models()
        torch.manual_seed(1)
        ids = torch.randint(4096, (arguments.texts, arguments.length)).tolist()
        batches, name = padded_batches(ids), "random pair"
    else:
        family = Family.from_pretrained(arguments.teacher, arguments.student, dtype=torch.float32)
        layer_map, models = family.layer_map, family.parents.load(("teacher", "student"))
        text = Calibration.read(
            arguments.calibration, num_texts=arguments.texts, length=arguments.length
        )
        batches = text.batches(family.tokenizer, family.configs["teacher"])
        name = f"{arguments.student.parent.name}/{arguments.student.name}"
    print(
        f"{name}: {layer_map.num_teacher_layers} layers, kept {as_layer_list(layer_map.kept)}, "
        f"{layer_map.max_layers_to_patch} patchable; {sum(b['input_ids'].numel() for b in batches)}"
        f" tokens in {len(batches)} batches",
        flush=True,
    )
    searches: dict[str, Callable[[Side], tuple[PatchedLayers, ...]]] = {
        "klpatch": lambda side: search(layer_map, side),
        "beam 3": lambda side: search(layer_map, side, beam=3),
        "exact": lambda side: (side(all_sets(layer_map)), search(layer_map, side, beam=None))[1],
    }
    for title, find in searches.items():
        if title in arguments.skip:
            continue
        sides, seconds, found = {}, {}, {}
        for name in SIDES:
            start = time.perf_counter()
            sides[name] = Side(name, layer_map, partial(TeacherKL, **models, batches=batches))
            found[name] = find(sides[name])
            seconds[name] = time.perf_counter() - start
        same = "the same sets" if len(set(found.values())) == 1 else f"different sets, {found}"
        order = as_layer_list(order_of_sets(layer_map, found["shared"]))
        print(f"{title}: {len(sides['shared'].found)} models; order {order}, {same}")
        for name, side in sides.items():
            print(
                f"  {name:6} {side.forwards.candidates:6,} layer forwards of candidates, "
                f"{side.forwards.teacher:5,} of the teacher "
                f"({side.forwards.times(sides['shared'].forwards)}), "
                f"{seconds[name]:5.1f} s ({seconds[name] / seconds['shared']:.2f} x)",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--calibration", help="calibration text, as for patching.orders")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--skip", nargs="*", default=[], help="searches to skip")
    parser.add_argument("--count", action="store_true", help="count layers without running any")
    main(parser.parse_args())
