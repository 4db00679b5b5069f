"""Hidden states at chosen depths, without keeping those in between.

Hidden state j is the input of layer j. The last one, with j = number of layers, is taken after the
final norm, as in transformers' `hidden_states`.

Shapes: B rows, T positions, N tokens, D hidden size.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.running.documents import boundaries_known, separate_documents


def visit_hidden_states(
    model: PreTrainedModel,
    indices: Sequence[int],
    visit: Callable[[int, Tensor], None],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    num_documents: int | None = None,
) -> None:
    """Run the model without its head and call `visit(j, state_BTD)` for each j in `indices` as soon
    as hidden state j is computed.

    With `positions_BT`, which start over at 0 with each document of a row, documents do not see
    each other. They take the place of the attention mask. `num_documents` is how many there are,
    for accelerators (see patching.running.documents).
    """
    layers = model.get_submodule(architecture_of(model.config).layers)

    def visit_input(index: int):
        def hook(_layer, args, kwargs) -> None:
            visit(index, args[0] if args else kwargs["hidden_states"])

        return layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [visit_input(index) for index in indices if index < len(layers)]
    arguments = {"attention_mask": attention_mask_BT}
    if positions_BT is not None:
        arguments |= separate_documents(model, positions_BT, num_documents)
    try:
        with boundaries_known(positions_BT, num_documents):
            last_BTD = model.base_model(
                input_ids=input_ids_BT, use_cache=False, **arguments
            ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    if len(layers) in indices:
        visit(len(layers), last_BTD)


def before_output_embeddings(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Return the input of the output embeddings, given the last hidden state.

    In a causal model this is the hidden state itself. In an encoder the head transforms it first.
    """
    head_path = architecture_of(model.config).head
    head, projection = model.get_submodule(head_path), model.get_output_embeddings()
    if head is projection:
        return hidden_ND
    (path,) = (name for name, module in head.named_modules() if module is projection)
    parent_path, _, name = path.rpartition(".")
    parent = head.get_submodule(parent_path)
    parent._modules[name] = nn.Identity()  # set directly, so that no parameter is re-registered
    try:
        return head(hidden_ND)
    finally:
        parent._modules[name] = projection


def hidden_states_at(
    model: PreTrainedModel,
    indices: Sequence[int],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    num_documents: int | None = None,
) -> list[Tensor]:
    """Return the hidden states `indices`, each of shape (B, T, D), in that sequence."""
    states: dict[int, Tensor] = {}
    inputs = (input_ids_BT, attention_mask_BT, positions_BT, num_documents)
    visit_hidden_states(model, indices, states.__setitem__, *inputs)
    return [states[index] for index in indices]
