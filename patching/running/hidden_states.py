"""Hidden states at chosen depths, handed over as they appear, without keeping those in between;
and what a model makes of the last one before its output embeddings read it.

Shapes: B rows, T positions, N tokens, D hidden size.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of


def visit_hidden_states(
    model: PreTrainedModel,
    indices: Sequence[int],
    visit: Callable[[int, Tensor], None],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
) -> None:
    """Run the model without its head and call `visit(j, state_BTD)` for each j of `indices` as soon
    as hidden state j is there.

    Hidden state j is what layer j reads; the last, behind all layers, is taken after the final
    norm, as transformers counts them too.
    """
    layers = model.get_submodule(architecture_of(model.config).layers)

    def when_read(index: int):
        def hook(_layer, args, kwargs) -> None:
            visit(index, args[0] if args else kwargs["hidden_states"])

        return layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [when_read(index) for index in indices if index < len(layers)]
    try:
        last_BTD = model.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    if len(layers) in indices:
        visit(len(layers), last_BTD)


def before_output_embeddings(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """What the output embeddings read of a last hidden state: that state itself in a causal model;
    in an encoder what its head, but for the projection to the vocabulary, makes of it.
    """
    head_path = architecture_of(model.config).head
    head, projection = model.get_submodule(head_path), model.get_output_embeddings()
    if head is projection:
        return hidden_ND
    (path,) = (name for name, module in head.named_modules() if module is projection)
    parent_path, _, name = path.rpartition(".")
    parent = head.get_submodule(parent_path)
    parent._modules[name] = nn.Identity()  # registered aside, so that no parameter moves
    try:
        return head(hidden_ND)
    finally:
        parent._modules[name] = projection


def hidden_states_at(
    model: PreTrainedModel,
    indices: Sequence[int],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
) -> list[Tensor]:
    """The hidden states `indices`, each of shape (B, T, D), in that order."""
    states: dict[int, Tensor] = {}
    visit_hidden_states(model, indices, states.__setitem__, input_ids_BT, attention_mask_BT)
    return [states[index] for index in indices]
