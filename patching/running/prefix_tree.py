"""Many recipes of one teacher and student as a tree of layers, in which every distinct prefix runs
once.

Members of a family share most of their layers. The tree is walked depth first, and the output of a
layer is kept only where members diverge. Each member runs its architecture's own forward pass, in
which the layers of a shared prefix return what was kept instead of computing it. So masks, rotary
tables, scaled embeddings and capped logits are handled by transformers' code.

Shapes: B rows, T positions, N selected positions, D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.assemble import assemble
from patching.recipe import Recipe
from patching.running.chunks import CHUNK_LOGITS

LayerPath = tuple[Any, ...]
"""The embedding's parent and the sources of some first layers. Equal paths have equal states."""


class PrefixTree:
    """The models of `recipes`, by name, which share their tensors with teacher and student."""

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
        self._parts = {name: _parts_of(model) for name, model in self.models.items()}
        # Depth first: members next to each other share the longest prefixes.
        self.names = sorted(recipes, key=lambda name: _path(recipes[name]))
        self.paths = paths = [_path(recipes[name]) for name in self.names]
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
        self.num_layers_run = 0
        """Layers run so far, counted once per batch."""

    @property
    def num_layer_forwards(self) -> int:
        """Layers that run for one batch, over all members."""
        depths = [self.models[name].config.num_hidden_layers for name in self.names]
        return sum(depths) - sum(self._resume_at)

    @torch.no_grad()
    def logits(
        self, inputs: Mapping[str, Tensor], positions_N: Tensor
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield each member's logits at some positions of a batch, in chunks of at most
        `CHUNK_LOGITS` entries.

        A chunk is the member's name, the slice of `positions_N`, and its logits of shape (n, V).
        `inputs` are the arguments of the models' forward pass, with `input_ids` of shape (B, T).
        `positions_N` index its flattened rows. Members come in the tree's sequence.
        """
        for name, states, resume_at, keep in self._walk():
            model = self.models[name]
            end = model.config.num_hidden_layers
            step = max(1, CHUNK_LOGITS // model.config.vocab_size)
            for start in range(0, len(positions_N), step):
                chunk = slice(start, min(start + step, len(positions_N)))
                logits_NV = _run(
                    model,
                    inputs,
                    positions_N[chunk],
                    states,
                    resume_at,
                    keep | {end},
                    self._parts[name],
                )
                yield name, chunk, logits_NV
                resume_at = end

    @torch.no_grad()
    def head_inputs(
        self,
        inputs: Mapping[str, Tensor],
        positions_N: Tensor,
        known: MutableMapping[LayerPath, Any] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each member's name and the input of its head at those positions, of shape (N, D).

        The arguments are those of `logits`. `known` holds states of this batch from other trees of
        the same parents, by the path that leads to them. The states of this tree's members before
        each student layer are added to it, because the members of a next tree may diverge there.
        """
        for name, states, resume_at, keep in self._walk(known):
            model = self.models[name]
            head, head_inputs = model.get_output_embeddings(), []
            head.forward = lambda hidden, seen=head_inputs: seen.append(hidden) or hidden
            try:
                _run(model, inputs, positions_N, states, resume_at, keep, self._parts[name])
            finally:
                del head.forward
            yield name, head_inputs[0].flatten(0, 1)[: len(positions_N)]

    def _walk(
        self, known: MutableMapping[LayerPath, Any] | None = None
    ) -> Iterator[tuple[str, dict[int, Any], int, set[int]]]:
        """Yield for each member, in the tree's sequence, its name, the states of its prefix by
        depth, the deepest of these depths, and the depths whose states are to be added.
        """
        states: dict[int, Any] = {}
        for name, path, shared, keep in zip(self.names, self.paths, self._resume_at, self._keep):
            states = {depth: output for depth, output in states.items() if depth <= shared}
            before_student = set()
            if known is not None:
                before_student = {
                    depth for depth in range(1, len(path) - 1) if path[depth + 1][0] == "student"
                }
                for depth in range(len(path) - 1, max(states, default=0), -1):
                    if path[: depth + 1] in known:
                        states[depth] = known[path[: depth + 1]]
                        break
            resume_at = max(states, default=0)
            self.num_layers_run += len(path) - 1 - resume_at
            yield name, states, resume_at, keep | before_student
            for depth in before_student & states.keys():
                known[path[: depth + 1]] = states[depth]


def _path(recipe: Recipe) -> LayerPath:
    return (recipe.embedding, *recipe.layers)


def _shared_depth(a: tuple, b: tuple) -> int:
    """Return how many first layers two paths have in common, 0 if their embeddings differ."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return max(0, shared - 1)


def _parts_of(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """Return the layers and the module that reads their output: the final norm, or the head in
    models without one.
    """
    architecture = architecture_of(model.config)
    modules = dict(model.named_modules())
    return modules[architecture.layers], modules.get(
        architecture.norm, model.get_output_embeddings()
    )


def _run(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    positions_N: Tensor,
    states: dict[int, Any],
    resume_at: int,
    keep: Collection[int],
    parts: tuple[nn.ModuleList, nn.Module],
) -> Tensor:
    """Return the logits (N, V) at some positions, running the model from layer `resume_at` on.

    `states[j]` is the output of layer j - 1 as that layer returns it. Those at the depths `keep`
    are added. `parts` is the result of `_parts_of`.
    """
    layers, after_layers = parts
    num_positions, row_length = len(positions_N), inputs["input_ids"].shape[1]
    # Fill up whole rows, because some architectures restore the input's shape after the norm.
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
        undo.callback(after_layers.register_forward_pre_hook(select).remove)
        logits = model(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)[:num_positions]
