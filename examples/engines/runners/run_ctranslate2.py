"""Convert members with CTranslate2's converter and run them."""

import json
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
            name_special_tokens(Path(converted, "config.json"))
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


def name_special_tokens(path: Path) -> None:
    """Name the end-of-text token for those that a tokenizer lacks. The engine insists on names, and
    uses none for token ids.
    """
    settings = json.loads(path.read_text())
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    named = next(value for value in tokens.values() if value)
    path.write_text(json.dumps(settings | {name: tokens[name] or named for name in tokens}))


if __name__ == "__main__":
    protocol.run(protocol.parser().parse_args(), CTranslate2Model)
