"""Convert members with CTranslate2's converter and run them."""

import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import protocol
from ctranslate2.converters import TransformersConverter


class CTranslate2Model:
    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as converted:
            TransformersConverter(str(folder)).convert(converted, force=True)
            self.generator = ctranslate2.Generator(
                converted, compute_type="float32", intra_threads=1
            )

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        logits = [self._logits(row_T[None]) for row_T in tokens_RT]
        return {"logits": np.concatenate(logits)}

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens_PT = prompts_PT
        for _ in range(new_tokens):
            next_P = self._logits(tokens_PT)[:, -1].argmax(-1)
            tokens_PT = np.concatenate((tokens_PT, next_P[:, None]), axis=1)
        return tokens_PT[:, prompts_PT.shape[1] :]

    def _logits(self, tokens_RT: np.ndarray) -> np.ndarray:
        return np.array(self.generator.forward_batch(tokens_RT.tolist()))


if __name__ == "__main__":
    protocol.run(protocol.parser().parse_args(), CTranslate2Model)
