"""Many recipes of one teacher and student as a tree of layers, in which every distinct prefix runs
once.

Members of a family share most of their layers. The tree is walked depth first, and the output of a
layer is kept only where members diverge. Each member runs its architecture's own forward pass, in
which the layers of a shared prefix return what was kept instead of computing it. So masks, rotary
tables, scaled embeddings and capped logits are handled by transformers' code.

Shapes: B rows, T positions, N selected positions, D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, suppress
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from patching.architectures.lookup import max_positions
from patching.assemble import assemble
from patching.recipe import Recipe
from patching.running.chunks import CHUNK_LOGITS, slices
from patching.running.joint import JointModel, joint_models
from patching.running.layer_calls import calling, layers_of
from patching.running.placement import over_devices

LayerPath = tuple[Any, ...]
"""The embedding's parent and factor, and the sources of some first layers. Equal paths have equal
states.
"""


class PrefixTree:
    """The models of `recipes`, by name, which share their tensors with teacher and student, and
    rescaled ones with each other.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        *,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
    ) -> None:
        shared: dict[str, dict] = {"rescaled": {}, "empty": {}}

        def assembled(recipe: Recipe) -> PreTrainedModel:
            return over_devices(assemble(recipe, teacher=teacher, student=student, **shared))

        self.models = {name: assembled(recipe) for name, recipe in recipes.items()}
        self._recipes, self._assembled = recipes, assembled
        self._layers = {name: layers_of(model) for name, model in self.models.items()}
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
        configs = [self.models[name].config.get_text_config() for name in self.names]
        depths = [config.num_hidden_layers for config in configs]
        return sum(depths) - sum(self._resume_at)

    @cached_property
    def joint_models(self) -> list[JointModel]:
        """All members as one model if they can step together, else each by itself."""
        return joint_models(self._recipes, self.models, self._assembled)

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
            layers = self._layers[name]
            output = _run_layers(model, layers, inputs, states, resume_at, keep)
            step = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
            for chunk, logits_NV in _after_layers(model, layers, inputs, output, positions_N, step):
                yield name, chunk, logits_NV

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
            layers = self._layers[name]
            output = _run_layers(model, layers, inputs, states, resume_at, keep)
            head, head_inputs = model.get_output_embeddings(), []
            head.forward = lambda hidden, seen=head_inputs: seen.append(hidden) or hidden
            try:
                for _ in _after_layers(
                    model, layers, inputs, output, positions_N, len(positions_N)
                ):
                    pass
            finally:
                del head.forward
            yield name, torch.cat([hidden_BTD.flatten(0, 1) for hidden_BTD in head_inputs])

    @torch.no_grad()
    def prefill(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Cache]]:
        """Yield each member's name, its logits after the last token of each row, of shape (B, V),
        and a cache of the keys and values of all tokens.

        Members share the tensors of their common layers. Appending to a cache leaves those as they
        are. `inputs` are those of `logits`, with rows padded on the left.
        """
        num_rows, row_length = inputs["input_ids"].shape
        last_B = torch.arange(1, num_rows + 1, device=inputs["input_ids"].device) * row_length - 1
        shared: list[CacheLayerMixin] = []
        for name, states, resume_at, keep in self._walk():
            model, layers = self.models[name], self._layers[name]
            cache = DynamicCache(config=model.config)
            caching = {**inputs, "past_key_values": cache, "use_cache": True}
            output = _run_layers(model, layers, caching, states, resume_at, keep)
            cache.layers[:resume_at] = [copy(layer) for layer in shared[:resume_at]]
            shared = [copy(layer) for layer in cache.layers]
            parts = _after_layers(model, layers, inputs, output, last_B, num_rows)
            yield name, torch.cat([logits_BV for _, logits_BV in parts]), cache

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
    return ((recipe.embedding, recipe.embedding_scale), *recipe.layers)


def _shared_depth(a: tuple, b: tuple) -> int:
    """Return how many first layers two paths have in common, 0 if their embeddings differ."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return max(0, shared - 1)


def whole_rows(length: int, step: int, row_length: int) -> Iterator[slice]:
    """Cut range(length) into slices of at most `step` entries, each of whole rows or shorter than
    a row.
    """
    if step < row_length:
        yield from slices(length, step)
        return
    whole = length - length % row_length
    yield from slices(whole, step - step % row_length)
    if whole < length:
        yield slice(whole, length)


class _LayersDone(Exception):
    """Ends a forward pass after the last layer."""


def _run_layers(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    inputs: Mapping[str, Tensor],
    states: dict[int, Any],
    resume_at: int,
    keep: Collection[int],
) -> Any:
    """Run the model from layer `resume_at` to its last layer; return the output of that.

    `states[j]` is the output of layer j - 1 as that layer returns it. Those at the depths `keep`
    are added.
    """
    end = len(layers)
    if resume_at == end:
        return states[end]
    outputs = {}

    def add(depth: int, output: Any) -> None:
        outputs[depth] = output
        if depth == end:
            raise _LayersDone

    with ExitStack() as undo:
        for layer in layers[:resume_at]:
            undo.enter_context(returning(layer, states[resume_at]))
        for depth in {*keep, end}:
            if depth > resume_at:
                hook = layers[depth - 1].register_forward_hook(
                    lambda _layer, _args, output, depth=depth: add(depth, output)
                )
                undo.callback(hook.remove)
        with suppress(_LayersDone):
            model(**{"use_cache": False} | dict(inputs))
    states |= {depth: output for depth, output in outputs.items() if depth in keep}
    return outputs[end]


def _after_layers(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    inputs: Mapping[str, Tensor],
    output: Any,
    positions_N: Tensor,
    step: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what the model returns at some positions, given its last layer's output, in chunks
    of at most `step` positions.

    The model runs on the chunk's positions alone, as rows no longer than those of `inputs`, and
    its layers return their output there.
    """
    ids_N = inputs["input_ids"].flatten()[positions_N]
    row_length = inputs["input_ids"].shape[1]
    if (longest := max_positions(model.config)) is not None:
        row_length = min(row_length, longest)  # a shared row may be longer than that
    state_BTD = output if isinstance(output, Tensor) else output[0]
    places_N = positions_N.to(state_BTD.device)  # where the last layer is
    for chunk in whole_rows(len(positions_N), step, row_length):
        shape = (-1, min(row_length, chunk.stop - chunk.start))
        selected_BTD = state_BTD.flatten(0, 1)[places_N[chunk]].unflatten(0, shape)
        with ExitStack() as undo:
            for layer in layers:
                like = selected_BTD if isinstance(output, Tensor) else (selected_BTD,)
                undo.enter_context(returning(layer, like))
            returned = model(ids_N[chunk].view(shape), use_cache=False)
        yield chunk, returned.logits.flatten(0, 1)


def returning(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Make a module return this output during the block, instead of computing one."""
    return calling(module, lambda *_, **__: output)
