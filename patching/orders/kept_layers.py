"""Choose which teacher layers to keep, from the teacher alone and before any training.

Student layer i starts as teacher layer kept[i] and learns to produce the hidden state at the end of
its block. The less the rest of the block changes the hidden state after its first layer, the closer
the student layer is to that goal already:

    chosen = the kept layers with the highest mean over i of cos(h[kept[i] + 1], h[end of block i])

Here h[j] is the teacher's hidden state after j layers (before the final norm), and the cosine is a
mean over tokens. A block of one layer has cosine 1. The best layers are found exactly, by dynamic
programming over (teacher layers covered, layers kept). This measure is ours. The authors of arXiv
2510.05064 chose by hand, and found that the first two layers of Llama differ from the others.
"""

from collections.abc import Sequence

from torch import Tensor

from patching.blocks import LayerMap


def most_similar_layers(
    similarity_JJ: Tensor, num_kept: int, longest_block: int | None = None
) -> LayerMap:
    """Return the map of `num_kept` layers with the highest mean similarity.

    `similarity_JJ` compares hidden states by depth. No block is longer than `longest_block`, by
    default the shortest length with which `num_kept` blocks cover the teacher. That leaves few
    single layers, and so gives many sizes between student and teacher. Among equal maps, the one
    with the shortest last blocks wins.

    Raises ValueError if there is no such map.
    """
    num_layers = len(similarity_JJ) - 1
    fewest = 1 if longest_block is None else -(-num_layers // longest_block)
    if not fewest <= num_kept <= num_layers:
        blocks = "" if longest_block is None else f", in blocks of at most {longest_block}"
        raise ValueError(
            f"num_kept_layers={num_kept}: the teacher has {num_layers} layers{blocks}: choose "
            f"{fewest}-{num_layers} layers"
        )
    if longest_block is None:
        longest_block = -(-num_layers // num_kept)
    similarities: Sequence[Sequence[float]] = similarity_JJ.tolist()
    # Number of teacher layers covered -> best sum and its kept layers, after 0, 1, ... blocks.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(num_kept):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, kept) in sorted(best.items()):
            for stop in range(start + 1, min(start + longest_block, num_layers) + 1):
                value = total + similarities[start + 1][stop]
                if stop not in longer or value >= longer[stop][0]:
                    longer[stop] = value, (*kept, start)
        best = longer
    return LayerMap(best[num_layers][1], num_layers)


def mean_similarity(layer_map: LayerMap, similarity_JJ: Tensor) -> float:
    """Return what `most_similar_layers` maximizes, for any map."""
    values = [similarity_JJ[block.start + 1, block.stop].item() for block in layer_map.blocks]
    return sum(values) / len(values)
