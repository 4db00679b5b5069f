"""Run members in whatever release of transformers is installed."""

from pathlib import Path

import numpy as np
import protocol
import torch
from transformers import AutoConfig, AutoModelForCausalLM


class TransformersModel:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        # `torch_dtype` is the older spelling of `dtype`, which releases before 4.56 do not know.
        settings = {"torch_dtype": dtype}
        if getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None):
            settings["attn_implementation"] = "eager"  # transformers 4 leaves the cap out elsewhere
        self.model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()

    @torch.inference_mode()
    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        rows = torch.from_numpy(tokens_RT).split(8)
        logits = [self.model(input_ids=row, use_cache=False).logits.float() for row in rows]
        return {"logits": torch.cat(logits).numpy()}

    @torch.inference_mode()
    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens, cache, chosen = torch.from_numpy(prompts_PT), None, []
        for _ in range(new_tokens):
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            chosen.append(tokens)
        return torch.cat(chosen, dim=1).numpy()


if __name__ == "__main__":
    arguments = protocol.parser().parse_args()
    dtype = getattr(torch, arguments.dtype)
    protocol.run(arguments, lambda folder: TransformersModel(folder, dtype))
