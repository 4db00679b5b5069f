"""How much memory the states of an optimizer take."""

from torch import nn

BYTES_PER_WEIGHT = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "stable_adamw": 8,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "paged_adamw_32bit": 8,
    "ademamix": 12,
    "paged_ademamix_32bit": 12,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "rmsprop_bnb": 4,
    "rmsprop_bnb_32bit": 4,
    "adagrad": 4,
    "rmsprop": 4,
    "sgd": 0,
}
"""Bytes of state per weight by `--optim`: moments in fp32, or quantized."""
QUANTIZED_EXCEPT_EMBEDDINGS = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}
"""The same for bitsandbytes. Trainer keeps the states of embeddings in fp32."""
OPTIONS = {"momentum": 4, "centered": 4}
"""Bytes per weight of what `--optim_args` adds to sgd and rmsprop."""


def optimizer_bytes(model: nn.Module, optimizer: str, options: str | None = None) -> int:
    """Return the bytes of state for a model's weights. `options` are `--optim_args`."""
    parameters = list(model.parameters())
    num_weights = sum(parameter.numel() for parameter in parameters)
    if optimizer == "adafactor":  # a row and a column for each matrix
        return 4 * sum(
            sum(parameter.shape[-2:]) * parameter.shape[:-2].numel()
            if parameter.ndim > 1
            else parameter.numel()
            for parameter in parameters
        )
    if optimizer in QUANTIZED_EXCEPT_EMBEDDINGS:
        embeddings = {
            id(parameter): parameter.numel()
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        num_whole = sum(embeddings.values())
        bytes_each = QUANTIZED_EXCEPT_EMBEDDINGS[optimizer]
        return bytes_each * (num_weights - num_whole) + 4 * bytes_each * num_whole
    given = dict(part.split("=") for part in (options or "").replace(" ", "").split(",") if part)
    added = sum(
        bytes_each
        for name, bytes_each in OPTIONS.items()
        if given.get(name, "0").lower() not in ("0", "0.0", "false")
    )
    return (BYTES_PER_WEIGHT[optimizer] + added) * num_weights
