"""Run members in mlx-lm on the CPU."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import protocol
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


class MlxModel:
    def __init__(self, folder: Path) -> None:
        self.model, _ = load_model(folder)

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        logits = []
        for row_T in tokens_RT:
            logits.append(np.array(self.model(mx.array(row_T[None])).astype(mx.float32)))
        return {"logits": np.concatenate(logits)}

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens, cache, chosen = mx.array(prompts_PT), make_prompt_cache(self.model), []
        for _ in range(new_tokens):
            tokens = self.model(tokens, cache=cache)[:, -1:].argmax(-1)
            chosen.append(np.array(tokens))
        return np.concatenate(chosen, axis=1)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    protocol.run(protocol.parser().parse_args(), MlxModel)
