"""Which teacher layers to keep, from the teacher alone and before any training.

Student layer i begins as teacher layer kept[i] and learns to end where its block ends. The less the
block turns the hidden state behind its first layer, the nearer it is to that already:

    chosen = the kept layers of highest mean over i of cos(h[kept[i] + 1], h[end of block i])

with h[j] the teacher's hidden state after j layers (before the final norm), mean over tokens. A
block of one layer is at its end, cosine 1. The best layers are found exactly, by dynamic
programming over (teacher layers covered, layers kept). This measure is ours; arXiv 2510.05064
chose by hand, and found the first two layers of Llama unlike the others.
"""

from collections.abc import Sequence

from torch import Tensor

from patching.blocks import LayerMap


def most_similar_layers(
    similarity_JJ: Tensor, num_kept: int, longest_block: int | None = None
) -> LayerMap:
    """The map of `num_kept` layers with the highest mean similarity, no block longer than that.

    `similarity_JJ` is that of hidden states by depth. Without a `longest_block` it is the shortest
    with which so few layers reach the end: single layers are then few, and the sizes between
    student and teacher many. Of equal maps the one whose last blocks are the shortest.

    Raises ValueError where no such map exists.
    """
    num_layers = len(similarity_JJ) - 1
    fewest = 1 if longest_block is None else -(-num_layers // longest_block)
    if not fewest <= num_kept <= num_layers:
        blocks = "" if longest_block is None else f" with blocks of at most {longest_block}"
        raise ValueError(
            f"{num_kept} kept layers of {num_layers}{blocks}: choose {fewest}-{num_layers} layers"
        )
    if longest_block is None:
        longest_block = -(-num_layers // num_kept)
    similarities: Sequence[Sequence[float]] = similarity_JJ.tolist()
    # By teacher layers covered: the best sum and its kept layers, after 0, 1, ... blocks.
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
    """What `most_similar_layers` makes high, of any map."""
    values = [similarity_JJ[block.start + 1, block.stop].item() for block in layer_map.blocks]
    return sum(values) / len(values)
