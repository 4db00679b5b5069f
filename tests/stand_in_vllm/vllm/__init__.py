"""Stands in for vLLM where there is none: it loads the saved folder by plain transformers, and
generates for one prompt after the other.
"""

import json
import types
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class SamplingParams:
    def __init__(self, max_tokens, stop, temperature=1.0, **others):
        others.pop("skip_special_tokens", None)
        others.pop("spaces_between_special_tokens", None)
        assert temperature == 0, "the stand-in is greedy"
        assert not others, others
        self.max_tokens, self.stop = max_tokens, stop


class TokensPrompt(dict):
    pass


class LLM:
    def __init__(self, model, dtype, **options):
        settings = json.loads(Path(model, "config.json").read_text())
        assert settings.keys() >= {"rope_theta", "torch_dtype"}, "older releases read these"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        longest = options["max_model_len"] or self.model.config.max_position_embeddings
        config = types.SimpleNamespace(max_model_len=longest)
        self.llm_engine = types.SimpleNamespace(model_config=config)

    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        return [self._answer(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt, params):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        written = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens,
            do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        text = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in params.stop:
            text = text.split(stop)[0]
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)])
