"""A teacher and its student as the user names them: all checks from configs alone, weights only
when asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from patching.blocks import LayerMap, Order
from patching.families import check_parents_match, config_for, family_of
from patching.recipe import Parent, Recipe, intermediate_model, naively_pruned
from patching.student_config import read_student_config

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class PairArguments:
    """Flags that name a family: shared by every command line that builds intermediate models."""

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    student_model_name_or_path: str = field(
        metadata={"help": "the student, with its student_config.json"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "the teacher's branch, tag or commit"}
    )
    student_revision: str | None = field(
        default=None, metadata={"help": "the student's branch, tag or commit"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modelling code that comes with a model"}
    )
    order: Order | None = field(
        default=None,
        metadata={
            "help": "which layers are patched as k grows (by default what student_config.json "
            "records, else `first` for a llama and `last` for any other model_type)"
        },
    )
    patch_first_k_layers: bool = field(
        default=False, metadata={"help": "the same as --order first"}
    )
    override_llama_patching: bool = field(
        default=False,
        metadata={
            "help": "obey --patch_first_k_layers even where it is absent, so that a llama is "
            "patched last first"
        },
    )

    def requested_order(self) -> Order | None:
        """The order the flags ask for, None where they leave it to the student. Raises ValueError
        for two orders.
        """
        if self.order is not None and (self.patch_first_k_layers or self.override_llama_patching):
            raise ValueError(
                f"--order {self.order} and --patch_first_k_layers or --override_llama_patching "
                "both name an order: give one of them"
            )
        if self.patch_first_k_layers:
            return "first"
        return "last" if self.override_llama_patching else self.order


@dataclass(frozen=True)
class Pair:
    """A checked teacher and student, their layer map and the order of patching."""

    arguments: PairArguments
    configs: dict[Parent, PreTrainedConfig]
    layer_map: LayerMap
    order: Order

    @classmethod
    def from_pretrained(cls, arguments: PairArguments) -> "Pair":
        """Read both configs and student_config.json.

        Raises ValueError or OSError where one is missing, the architecture has no row in the
        families table, the two models do not fit together, or their depths are not what
        student_config.json says.
        """
        requested = arguments.requested_order()
        trust = arguments.trust_remote_code
        configs: dict[Parent, PreTrainedConfig] = {
            "teacher": read_config(
                "teacher", arguments.teacher_model_name_or_path, arguments.revision, trust
            ),
            "student": read_config(
                "student", arguments.student_model_name_or_path, arguments.student_revision, trust
            ),
        }
        check_parents_match(configs["student"], configs["teacher"])
        student_config = read_student_config(
            arguments.student_model_name_or_path, arguments.student_revision
        )
        layer_map = student_config.layer_map
        for parent, depth in (
            ("student", len(layer_map.kept)),
            ("teacher", layer_map.num_teacher_layers),
        ):
            if configs[parent].num_hidden_layers != depth:
                raise ValueError(
                    f"the {parent} has {configs[parent].num_hidden_layers} layers and "
                    f"student_config.json speaks of {depth}: this student was not made from this "
                    "teacher"
                )
        recommended = student_config.patch_order or recommended_order(configs["teacher"])
        return cls(arguments, configs, layer_map, requested or recommended)

    def recipe(self, num_layers_to_patch: int) -> Recipe:
        """The family's member of size k. Raises ValueError for a k out of range."""
        return intermediate_model(self.layer_map, num_layers_to_patch, self.order)

    def naive_recipe(self, num_layers_to_patch: int) -> Recipe:
        """The teacher pruned to the depth of size k, without distillation."""
        return naively_pruned(self.layer_map, self.recipe(num_layers_to_patch))

    def config(self, recipe: Recipe) -> PreTrainedConfig:
        return config_for(recipe, self.configs)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, padding on the left with a padding token, as batched generation
        needs.
        """
        tokenizer = AutoTokenizer.from_pretrained(
            self.arguments.teacher_model_name_or_path,
            revision=self.arguments.revision,
            trust_remote_code=self.arguments.trust_remote_code,
            padding_side="left",
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def dtype(self, name: str | torch.dtype) -> torch.dtype:
        """`auto` is the teacher's dtype, float32 where its config names none."""
        if isinstance(name, torch.dtype):
            return name
        if name not in DTYPES:
            raise ValueError(f"dtype={name}: choose one of {', '.join(DTYPES)}")
        return (
            (self.configs["teacher"].dtype or torch.float32)
            if name == "auto"
            else getattr(torch, name)
        )

    def load(
        self, parents: Iterable[Parent], dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> dict[Parent, PreTrainedModel]:
        """The weights of the named parents, both in one dtype on one device."""
        arguments = self.arguments
        references = {
            "teacher": (arguments.teacher_model_name_or_path, arguments.revision),
            "student": (arguments.student_model_name_or_path, arguments.student_revision),
        }
        models = {}
        for parent in sorted(parents):
            name_or_path, revision = references[parent]
            models[parent] = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                revision=revision,
                trust_remote_code=arguments.trust_remote_code,
                dtype=dtype,
            ).to(device)
        return models


def read_config(
    parent: Parent, name_or_path: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """A model's config, from a folder or the hub.

    Raises ValueError where it cannot be read or its architecture has no row in the families table.
    """
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{parent}_model_name_or_path={name_or_path}: neither a model folder nor a hub "
            f"repository that can be read here ({error})"
        ) from error
    family_of(config)
    return config


def recommended_order(teacher: PreTrainedConfig) -> Order:
    """The order the paper found to work by architecture: Llamas from the first layer, all others
    from the last.
    """
    return "first" if teacher.model_type == "llama" else "last"
