"""Run members, converted to GGUF, in llama.cpp through its Python binding."""

import ctypes
from pathlib import Path

import llama_cpp
import llama_cpp.llama_cpp as binding
import numpy as np
import protocol
from llama_cpp import Llama

CACHE_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}
GGUF_NAMES = {"float32": "f32.gguf", "float16": "f16.gguf"}


default_params = binding.llama_model_default_params


def without_repacking() -> binding.llama_model_params:
    """Keep quantized weights as they are stored. Repacked ones use matrix instructions (AMX) that
    a virtual machine may report and not run.
    """
    parameters = default_params()
    parameters.use_extra_bufts = False
    return parameters


binding.llama_model_default_params = without_repacking


class LlamaCppModel:
    def __init__(self, path: Path, num_positions: int, cache_type: int) -> None:
        self.model = Llama(
            str(path),
            n_ctx=num_positions,
            n_batch=num_positions,
            n_ubatch=num_positions,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn=False,
            swa_full=True,
            verbose=False,
        )

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        return {"logits": np.stack([self._logits(row_T.tolist()) for row_T in tokens_RT])}

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        chosen = []
        for prompt_T in prompts_PT:
            tokens = [int(self._logits(prompt_T.tolist())[-1].argmax())]
            while len(tokens) < new_tokens:
                self.model.eval(tokens[-1:])
                tokens.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            chosen.append(tokens)
        return np.array(chosen)

    def _logits(self, tokens: list[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(tokens)
        return self.model.scores[: len(tokens)].copy()


def quantized(path: Path, kind: str) -> Path:
    """Quantize a GGUF file with llama.cpp's quantizer, as `llama-quantize` does."""
    target = path.with_name(f"{kind}.gguf")
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        parameters.nthread = 1
        status = llama_cpp.llama_model_quantize(
            str(path).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if status != 0:
            target.unlink(missing_ok=True)
            raise RuntimeError(f"llama_model_quantize returned {status}")
    return target


if __name__ == "__main__":
    parser = protocol.parser()
    parser.add_argument("--quantize", help="llama.cpp's name of a quantization, such as q4_0")
    arguments = parser.parse_args()
    num_positions = np.load(arguments.tokens).shape[1]
    cache_type = CACHE_TYPES[arguments.dtype]

    def load(folder: Path) -> LlamaCppModel:
        path = folder / GGUF_NAMES[arguments.dtype]
        if arguments.quantize:
            path = quantized(path, arguments.quantize)
        return LlamaCppModel(path, num_positions, cache_type)

    protocol.run(arguments, load)
