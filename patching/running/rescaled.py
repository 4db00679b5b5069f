"""Whether the layers of an architecture can be rescaled: multiplied in what they write to the
residual stream, without a change of what they compute.

The table says which parameters write (`patching.architectures.table`). Whether that is all depends
on the config, such as on norms before or after the layers' projections. So it is shown before a
model is rescaled, on a small random instance of the model's own code: every layer's output must be
longer by the factor, and the logits the same.

Norms add a small number to the square of what they divide by. A stream that is as short as that
number is not read quite the same at another length. The instance has a long one.

Shapes: T positions, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.models import auto_class
from patching.assemble import assemble
from patching.checkpoints.layout import layout_of
from patching.recipe import LayerSource, Recipe, with_scales

FACTOR = 1.5
TOLERANCE = 1e-5
"""Largest error, relative to the length of the whole output, that counts as rounding."""
NUM_HEADS, WIDTH, VOCAB_SIZE, NUM_TOKENS = 2, 32, 32, 8
"""Most attention heads of the instance, the width of its MLPs, its vocabulary, and its text."""
EMBEDDING_LENGTH = 10.0
"""Standard deviation of the instance's embeddings."""


def check_rescaling(config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Raise ValueError unless the layers of models with this config can be rescaled."""
    architecture = architecture_of(config, trust_remote_code)

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"model_type={config.model_type}: the scale of its layers cannot be matched, {reason} "
            "(--match_scale False)"
        )

    if architecture.carried:
        raise refuse("because images enter the residual stream next to the embeddings")
    if architecture.norm is None:
        raise refuse("because no norm lies between its layers and its head")
    try:
        model = small_instance(config, trust_remote_code)
        states, logits_TV = _outputs(model)
    except Exception as error:  # the code of a model may raise anything
        reason = str(error).partition("\n")[0]
        raise refuse(f"because a small model of its code cannot be run ({reason})") from error
    scaled_states, scaled_logits_TV = _outputs(rescaled(model, FACTOR))
    for i, (state_TD, scaled_TD) in enumerate(zip(states, scaled_states)):
        if not _is_close(scaled_TD, FACTOR * state_TD):
            raise refuse(f"because layer {i} of a small model then computes something else")
    if not _is_close(scaled_logits_TV, logits_TV):
        raise refuse("because the logits of a small model then change")


def rescaled(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Return the model with its embeddings and all its layers rescaled."""
    depth = model.config.get_text_config().num_hidden_layers
    whole = Recipe.of([LayerSource("student", i) for i in range(depth)])
    return assemble(with_scales(whole, {0: factor}), student=model)


def small_instance(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a narrow random model with a layer of each kind that the config has, in fp32. All its
    norms and biases differ from what a new model has.
    """
    layout = layout_of(config, torch.float32, trust_remote_code)
    kinds = sorted(set(layout.first_alike))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    recipe = Recipe.of([LayerSource("teacher", i) for i in kinds])
    values = _narrow(config_for(recipe, {"teacher": config}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class(config).from_config(
            type(config).from_dict(values),
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
        embeddings = tuple(f"{path}." for path in layout.architecture.embeddings)
        for name, parameter in model.named_parameters():
            if name.startswith(embeddings):
                parameter.normal_(std=EMBEDDING_LENGTH)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)
    return model.eval()


def _narrow(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config with few heads of the same size, and small MLPs."""
    values = config.to_dict()

    def field(name: str) -> str:
        return config.attribute_map.get(name, name)

    width, heads = config.hidden_size, config.num_attention_heads
    num_heads = min(heads, NUM_HEADS)
    if values.get(field("num_key_value_heads")):
        is_grouped = config.num_key_value_heads < heads
        values[field("num_key_value_heads")] = 1 if is_grouped else num_heads
    new_width = width // heads * num_heads
    values[field("num_attention_heads")], values[field("hidden_size")] = num_heads, new_width
    if values.get("word_embed_proj_dim") == width:
        values["word_embed_proj_dim"] = new_width
    values["vocab_size"] = VOCAB_SIZE
    for name, value in values.items():
        if name.endswith("_token_id") and value is not None:
            values[name] = 0
        elif ("intermediate" in name or name in ("ffn_dim", "n_inner")) and type(value) is int:
            values[name] = WIDTH
    return values


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> tuple[list[Tensor], Tensor]:
    """Return what each layer of a model writes on, of shape (T, D), and the logits (T, V)."""
    states: list[Tensor] = []

    def keep(_layer, _args, output) -> None:
        states.append((output if isinstance(output, Tensor) else output[0])[0])

    layers = model.get_submodule(architecture_of(model.config).layers)
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        ids_1T = torch.arange(1, NUM_TOKENS + 1)[None]
        return states, model(input_ids=ids_1T, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())
