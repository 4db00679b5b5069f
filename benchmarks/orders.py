"""Searching an order: candidates that share their layers against each as a model of its own.

    python -m benchmarks.orders [--teacher DIR --student DIR --calibration TEXT]

Both sides measure the same sets of a KLPatch search, of a beam and of all sets, on the same text
and with the same KL; only the layers are shared or not. Without a pair of your own it is a random
one of 16 layers. Prints layer forwards and seconds of both, and that they choose the same sets.
"""

import argparse
import copy
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from patching.assemble import assemble
from patching.blocks import LayerMap, as_layer_list, default_kept_layers
from patching.order_search import PatchedLayers, all_sets, as_order, search
from patching.orders import SETS_PER_TREE
from patching.pair import Pair, PairArguments
from patching.recipe import initial_student, patched_model
from patching.teacher_kl import TeacherKL
from patching.texts import Calibration, CalibrationArguments, padded_batches


def random_models() -> tuple[LayerMap, dict[str, Qwen3ForCausalLM]]:
    """Teacher and student, whose layers differ by noise."""
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


class Side:
    """Measures sets, shared or each by itself, and remembers what was measured."""

    def __init__(self, layer_map: LayerMap, kl: TeacherKL, is_shared: bool) -> None:
        self.layer_map, self.kl, self.is_shared = layer_map, kl, is_shared
        self.found: dict[PatchedLayers, float] = {}

    def __call__(self, sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        layers = range(len(self.layer_map.kept))
        missing = sorted(set(sets) - self.found.keys(), key=lambda s: [i in s for i in layers])
        at_once = SETS_PER_TREE if self.is_shared else 1
        for start in range(0, len(missing), at_once):
            group = {
                as_layer_list(sorted(patched)): patched
                for patched in missing[start : start + at_once]
            }
            recipes = {name: patched_model(self.layer_map, s) for name, s in group.items()}
            remember = self.is_shared and len(missing) <= SETS_PER_TREE
            found = self.kl.of(recipes, remember=remember)
            self.found |= {patched: found[name] for name, patched in group.items()}
        return self.found


def main(arguments: argparse.Namespace) -> None:
    if arguments.teacher is None:
        layer_map, models = random_models()
        torch.manual_seed(1)
        ids = torch.randint(4096, (arguments.texts, arguments.length)).tolist()
        batches, name = padded_batches(ids), "random pair"
    else:
        pair = Pair.from_pretrained(PairArguments(str(arguments.teacher), str(arguments.student)))
        layer_map, models = pair.layer_map, pair.load(["teacher", "student"], torch.float32)
        text = Calibration.read(
            CalibrationArguments(
                arguments.calibration,
                calibration_texts=arguments.texts,
                calibration_length=arguments.length,
            )
        )
        batches = text.batches(pair.tokenizer, pair.configs["teacher"])
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
        results = []
        for is_shared in (True, False):
            kl = TeacherKL(**models, batches=batches)
            start = time.perf_counter()
            side = Side(layer_map, kl, is_shared)
            sets = find(side)
            results.append((time.perf_counter() - start, kl.num_layer_forwards, sets, side.found))
        (own, forwards, sets, _), (alone, forwards_alone, sets_alone, found) = results
        same = "the same sets" if sets == sets_alone else f"other sets, {sets_alone}"
        print(
            f"{title}: {len(found)} models; layer forwards {forwards:,} instead of "
            f"{forwards_alone:,} ({forwards_alone / forwards:.2f} x fewer); {own:.1f} s instead of "
            f"{alone:.1f} s ({alone / own:.2f} x faster); order "
            f"{as_layer_list(as_order(layer_map, sets))}, {same}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--calibration", help="as patching.orders takes it")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--skip", nargs="*", default=[], help="searches to leave out")
    main(parser.parse_args())
