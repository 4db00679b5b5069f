"""Many recipes of one pair as a tree of layers: every distinct prefix of layers is run once.

Members of a family share most of their layers. The tree is walked depth first; what the layers give
is kept only where members part. Each member runs its architecture's own forward pass, in which the
layers of a shared prefix hand over what is kept instead of computing it: masks, rotary tables,
scaled embeddings and capped logits stay the architecture's affair.

Shapes: B rows, T positions, N selected positions, D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.assemble import assemble
from patching.divergence import CHUNK_LOGITS
from patching.families import family_of
from patching.recipe import Recipe


class PrefixTree:
    """The members of `recipes`, by name, sharing their tensors with teacher and student."""

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        *,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
    ) -> None:
        self.models = {
            name: assemble(recipe, teacher=teacher, student=student)
            for name, recipe in recipes.items()
        }
        # Depth first: neighbours in this sequence share the longest prefixes.
        self.names = sorted(recipes, key=lambda name: _path(recipes[name]))
        paths = [_path(recipes[name]) for name in self.names]
        self._resume_at = [
            0 if i == 0 else _shared_depth(paths[i - 1], path) for i, path in enumerate(paths)
        ]
        self._keep = [
            {
                depth
                for j, depth in enumerate(self._resume_at)
                if j > i and depth > self._resume_at[i] and depth == _shared_depth(path, paths[j])
            }
            for i, path in enumerate(paths)
        ]

    @property
    def num_layer_forwards(self) -> int:
        """Layers that one batch goes through, over all members."""
        depths = [self.models[name].config.num_hidden_layers for name in self.names]
        return sum(depths) - sum(self._resume_at)

    @torch.no_grad()
    def logits(
        self, inputs: Mapping[str, Tensor], positions_N: Tensor
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Each member's logits at some positions of a batch: its name, which of the positions, and
        theirs of shape (n, V), in chunks of at most `CHUNK_LOGITS` entries.

        `inputs` go to the models' forward pass, `input_ids` of shape (B, T) among them;
        `positions_N` count through its rows. Members come in the tree's sequence.
        """
        states: dict[int, Any] = {}
        for name, resume_at, keep in zip(self.names, self._resume_at, self._keep):
            model = self.models[name]
            states = {depth: output for depth, output in states.items() if depth <= resume_at}
            end = model.config.num_hidden_layers
            step = max(1, CHUNK_LOGITS // model.config.vocab_size)
            for start in range(0, len(positions_N), step):
                chunk = slice(start, min(start + step, len(positions_N)))
                logits_NV = _run(model, inputs, positions_N[chunk], states, resume_at, keep | {end})
                yield name, chunk, logits_NV
                resume_at = end


def _path(recipe: Recipe) -> tuple:
    """What a member's hidden states depend on, layer by layer: equal prefixes, equal states."""
    return (recipe.embedding, *recipe.layers)


def _shared_depth(a: tuple, b: tuple) -> int:
    """How many layers two paths begin with alike, 0 where their embeddings differ."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return max(0, shared - 1)


def _run(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    positions_N: Tensor,
    states: dict[int, Any],
    resume_at: int,
    keep: Collection[int],
) -> Tensor:
    """Logits (N, V) at some positions, by the model's own forward pass from layer `resume_at` on.

    `states[j]` is what the first j layers give, as the last of them returns it; those of `keep` are
    added.
    """
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    num_positions, row_length = len(positions_N), inputs["input_ids"].shape[1]
    # Whole rows again, for some architectures restore the shape of their input behind the norm.
    filled = nn.functional.pad(positions_N, (0, -num_positions % row_length))

    def select(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[filled].unflatten(0, (-1, row_length)),)

    with ExitStack() as undo:
        for layer in layers[:resume_at]:
            layer.forward = lambda *_, **__: states[resume_at]
            undo.callback(delattr, layer, "forward")
        for depth in (depth for depth in keep if depth > resume_at):
            hook = layers[depth - 1].register_forward_hook(
                lambda _layer, _args, output, depth=depth: states.__setitem__(depth, output)
            )
            undo.callback(hook.remove)
        modules = dict(model.named_modules())
        # A few models have no final norm.
        behind_layers = modules.get(family.norm, model.get_output_embeddings())
        undo.callback(behind_layers.register_forward_pre_hook(select).remove)
        logits = model(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)[:num_positions]
