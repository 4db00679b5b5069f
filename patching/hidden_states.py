"""Hidden states at chosen depths, without keeping those in between.

Shapes: B rows, T positions, D hidden size.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from patching.families import family_of


def hidden_states_at(
    model: PreTrainedModel,
    indices: Sequence[int],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
) -> list[Tensor]:
    """Run the model without its head; return hidden states `indices`, each of shape (B, T, D).

    Hidden state j is what layer j reads; the last, behind all layers, is taken after the final
    norm, as transformers counts them too.
    """
    layers = model.get_submodule(family_of(model.config).layers)
    states: dict[int, Tensor] = {}

    def keep(index: int):
        def hook(_layer, args, kwargs) -> None:
            states[index] = args[0] if args else kwargs["hidden_states"]

        return layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [keep(index) for index in indices if index < len(layers)]
    try:
        states[len(layers)] = model.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [states[index] for index in indices]
