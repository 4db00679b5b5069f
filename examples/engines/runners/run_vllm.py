"""Run members in vLLM on the CPU. It gives the likeliest token of each position, not all logits."""

from pathlib import Path

import numpy as np
import protocol
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


class VllmModel:
    def __init__(self, folder: Path, num_positions: int) -> None:
        self.model = LLM(
            str(folder),
            dtype="float32",
            max_model_len=num_positions + 1,
            enforce_eager=True,
            skip_tokenizer_init=True,
        )

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        how = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=1, ignore_eos=True, detokenize=False
        )
        top1 = []
        for output in self._generate(tokens_RT, how):
            # The first entry is None, because nothing predicts the first token.
            row = [
                max(entry, key=lambda token, entry=entry: entry[token].logprob)
                for entry in output.prompt_logprobs[1:]
            ]
            top1.append([*row, output.outputs[0].token_ids[0]])
        return {"top1": np.array(top1)}

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        how = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = self._generate(prompts_PT, how)
        return np.array([list(output.outputs[0].token_ids) for output in outputs])

    def _generate(self, tokens_RT: np.ndarray, how: SamplingParams) -> list:
        prompts = [TokensPrompt(prompt_token_ids=row_T.tolist()) for row_T in tokens_RT]
        return self.model.generate(prompts, how, use_tqdm=False)


if __name__ == "__main__":
    arguments = protocol.parser().parse_args()
    num_positions = np.load(arguments.tokens).shape[1]
    protocol.run(arguments, lambda folder: VllmModel(folder, num_positions))
