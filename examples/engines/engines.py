"""The engines that members are checked in, and what each of them is known not to take."""

from pathlib import Path
from typing import NamedTuple

RUNNERS = Path(__file__).parent / "runners"


class Engine(NamedTuple):
    title: str
    environment: str
    """A name in `environments.ENVIRONMENTS`."""
    runner: str
    options: tuple[str, ...] = ()
    gguf: str | None = None
    """Number type of the GGUF file that the runner reads, if it needs one."""
    must_pass: bool = False


ENGINES = {
    "transformers4": Engine(
        "transformers 4.57, fp32", "transformers4", "run_transformers.py", must_pass=True
    ),
    "llama_cpp": Engine(
        "llama.cpp, fp32", "llama_cpp", "run_llama_cpp.py", gguf="f32", must_pass=True
    ),
    "llama_cpp_f16": Engine(
        "llama.cpp, fp16",
        "llama_cpp",
        "run_llama_cpp.py",
        ("--dtype", "float16"),
        gguf="f16",
        must_pass=True,
    ),
    "mlx_lm": Engine("mlx-lm on CPU, fp32", "mlx_lm", "run_mlx_lm.py", must_pass=True),
    "vllm": Engine("vLLM on CPU, fp32", "vllm", "run_vllm.py"),
    "ctranslate2": Engine("CTranslate2, fp32", "transformers4", "run_ctranslate2.py"),
}


class Limit(NamedTuple):
    """Something that an engine does not take, whatever a checkpoint says."""

    reason: str
    untied_only: bool = False
    """Whether it concerns only members whose head is not the embedding."""


LIMITS: dict[tuple[str, str], Limit] = {
    ("mlx_lm", "gpt2"): Limit(
        "It reads the tensor names of the first GPT-2 files, without `transformer.`, which "
        "transformers does not write, and always ties the head."
    ),
    ("mlx_lm", "gemma2"): Limit(
        "It runs every layer with full attention, so it is right for texts as long as the window, "
        "and always ties the head."
    ),
    ("ctranslate2", "llama"): Limit(
        "It runs theta 10,000 without scaling: where a config has `rope_scaling`, its converter "
        "reads `rope_theta` only inside that, and files of Llama 3 do not have it there."
    ),
    ("ctranslate2", "gemma2"): Limit(
        "Its converter knows neither the window of every second layer nor the soft caps."
    ),
    ("ctranslate2", "gemma3_text"): Limit(
        "It converts, but the decoder takes no text longer than the sliding window in one pass: it "
        "plans the padding of one window with the length of the whole text."
    ),
    **dict.fromkeys(
        [("llama_cpp", "gemma2"), ("llama_cpp_f16", "gemma2")],
        Limit(
            "Its converter drops the head and uses the embedding in its place.", untied_only=True
        ),
    ),
}
"""By engine and architecture. A member outside its engine's limits must agree."""
