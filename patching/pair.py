"""A teacher and its student as the user names them: all checks from configs alone, weights only
when asked for.
"""

import hashlib
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from patching.auto_class import auto_class, predicts_masked_tokens
from patching.blocks import LayerMap, Order, parse_ranges
from patching.distilbert import as_bert, as_bert_config
from patching.families import check_parents_match, config_for, family_of
from patching.named_orders import SEARCHED_ORDERS, found_for, parse_order
from patching.recipe import Parent, Recipe, Reference, intermediate_model, naively_pruned
from patching.student_config import FILE_NAME, StudentConfig, read_student_config

DTYPES = ("auto", "bfloat16", "float16", "float32")

SAMPLED_BYTES = 2**20


@dataclass
class PairArguments:
    """Flags that name a family: shared by every command line that builds intermediate models."""

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    student_model_name_or_path: str = field(
        metadata={
            "help": "the student: a folder or a hub repository, with its student_config.json, or "
            "one of the public students whose layers are known"
        }
    )
    kept_layers: str | None = field(
        default=None,
        metadata={
            "help": "teacher layers that the student was made from, such as 0,2,4,7,9,11, for a "
            "student that does not say so itself"
        },
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
    order: str | None = field(
        default=None,
        metadata={
            "help": "which layers are patched as k grows: last, first, klpatch or block-influence "
            "(searched on --calibration), or a JSON file with a list of student layers, such as "
            "the order.json of patching.orders "
            "(by default what student_config.json records, else `first` for a llama and `last` "
            "for any other "
            "model_type)"
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

    @property
    def says_kept_layers(self) -> str:
        """Where the kept layers come from, for a message."""
        return FILE_NAME if self.kept_layers is None else f"--kept_layers {self.kept_layers}"

    def requested_order(self) -> Order | None:
        """The order the flags ask for, None where they leave it to the student or to a search
        (`searched_order`).

        Raises ValueError for two orders, and for one that is no name and no readable file.
        """
        if self.order is not None and (self.patch_first_k_layers or self.override_llama_patching):
            raise ValueError(
                f"--order {self.order} and --patch_first_k_layers or --override_llama_patching "
                "both name an order: give one of them"
            )
        if self.patch_first_k_layers:
            return "first"
        if self.override_llama_patching:
            return "last"
        return None if self.order in (None, *SEARCHED_ORDERS) else parse_order(self.order)


@dataclass
class MeasuringArguments(PairArguments):
    """And how their weights are run, for command lines that measure them."""

    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the weights, auto: the teacher's", "choices": DTYPES},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cuda, cuda:1, mps or cpu; by default a GPU where there is one"},
    )


@dataclass(frozen=True)
class Pair:
    """A checked teacher and student, their layer map and the order of patching."""

    arguments: PairArguments
    configs: dict[Parent, PreTrainedConfig]
    layer_map: LayerMap
    order: Order
    models: dict[Parent, PreTrainedModel] = field(default_factory=dict)
    """Parents that are in memory already; others are loaded when asked for."""

    @classmethod
    def from_pretrained(cls, arguments: PairArguments) -> "Pair":
        """Read both configs and student_config.json.

        Raises ValueError or OSError where one is missing, an architecture cannot be cut and joined,
        the two models do not fit together, or their depths are not what student_config.json says.
        """
        return cls.of(arguments, {})

    @classmethod
    def of(
        cls,
        arguments: PairArguments,
        models: dict[Parent, PreTrainedModel],
        student_config: StudentConfig | None = None,
        order: Order | None = None,
    ) -> "Pair":
        """The same where some parents are loaded models.

        `student_config` is read unless given, and `order` outranks every other way of naming one.

        Raises ValueError or OSError as `from_pretrained` does.
        """
        order = order or arguments.requested_order()
        models = {parent: as_bert(model) for parent, model in models.items()}
        configs: dict[Parent, PreTrainedConfig] = {}
        for parent, (name_or_path, revision) in references(arguments).items():
            if parent in models:
                configs[parent] = models[parent].config
                family_of(configs[parent])
            else:
                configs[parent] = read_config(
                    parent, name_or_path, revision, arguments.trust_remote_code
                )
        check_parents_match(configs["student"], configs["teacher"])
        if student_config is None:
            student_config = _student_config(arguments, configs["teacher"].num_hidden_layers)
        layer_map = student_config.layer_map
        for parent, depth in (
            ("student", len(layer_map.kept)),
            ("teacher", layer_map.num_teacher_layers),
        ):
            if configs[parent].num_hidden_layers != depth:
                raise ValueError(
                    f"the {parent} has {configs[parent].num_hidden_layers} layers and "
                    f"{arguments.says_kept_layers} speaks of {depth}: this student was not made "
                    "from this teacher"
                )
        order = order or student_config.patch_order or recommended_order(configs["teacher"])
        pair = cls(arguments, configs, layer_map, order, models)
        if arguments.order is not None and (before := found_for(arguments.order)):
            pair._check_order_was_found_for_it(before)
        layer_map.sequence(order)
        return pair

    @property
    def identity(self) -> dict[str, Any]:
        """What an order found for a pair belongs to: layers, and by `teacher` and `student` whose
        weights.
        """
        names = references(self.arguments)
        return {
            "model_type": self.configs["teacher"].model_type,
            "num_teacher_layers": self.layer_map.num_teacher_layers,
            "kept_layers": list(self.layer_map.kept),
            **{p: fingerprint(names[p].name_or_path, self.configs[p]) for p in sorted(names)},
        }

    def _check_order_was_found_for_it(self, before: Mapping[str, Any]) -> None:
        """Raise ValueError where the order's file names other layers; warn where other weights, for
        which it is an order as well, if not the one that a search would find.
        """
        for name, own in self.identity.items():
            other = before.get(name, own)
            found = f"--order {self.arguments.order} was found for {name}={other}"
            if name not in ("teacher", "student"):
                if other != own:
                    raise ValueError(
                        f"{found} and this pair has {own}: search one for it with patching.orders"
                    )
            elif str(other).split()[-1:] != own.split()[-1:]:  # a folder's name may change
                warnings.warn(f"{found}, and this one is {own}", stacklevel=2)

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
        needs; an encoder's on its own side.
        """
        generates = not predicts_masked_tokens(self.configs["teacher"])
        tokenizer = AutoTokenizer.from_pretrained(
            self.arguments.teacher_model_name_or_path,
            revision=self.arguments.revision,
            trust_remote_code=self.arguments.trust_remote_code,
            **({"padding_side": "left"} if generates else {}),
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
        if name != "auto":
            return getattr(torch, name)
        if "teacher" in self.models:
            return self.models["teacher"].dtype
        return self.configs["teacher"].dtype or torch.float32

    def load(
        self, parents: Iterable[Parent], dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> dict[Parent, PreTrainedModel]:
        """The weights of the named parents, both in one dtype on one device.

        Raises ValueError where weights are damaged or are not all that the config calls for, and
        where a parent is in memory already in another dtype.
        """
        models = {}
        for parent in sorted(parents):
            if parent not in self.models:
                reference = references(self.arguments)[parent]
                trust = self.arguments.trust_remote_code
                models[parent] = load_model(reference, dtype, trust).to(device)
            elif self.models[parent].dtype != dtype:
                raise ValueError(
                    f"the {parent} is in memory in {self.models[parent].dtype}, and {dtype} is "
                    "asked for: "
                    "load both models in one dtype"
                )
            else:
                models[parent] = self.models[parent]
        return models


def references(arguments: PairArguments) -> dict[Parent, Reference]:
    return {
        "teacher": Reference(arguments.teacher_model_name_or_path, arguments.revision),
        "student": Reference(arguments.student_model_name_or_path, arguments.student_revision),
    }


def _student_config(arguments: PairArguments, num_teacher_layers: int) -> StudentConfig:
    """What the flags say of the student's layers, else what it says itself."""
    if arguments.kept_layers is not None:
        kept = tuple(parse_ranges(arguments.kept_layers, "kept_layers"))
        return StudentConfig(LayerMap(kept, num_teacher_layers))
    return read_student_config(*references(arguments)["student"])


def usable_device(name: str | None) -> torch.device:
    """The named device, by default the accelerator where there is one. Raises ValueError if it is
    not there.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises either for a device it has not got
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


def load_model(
    reference: Reference,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A model with its weights, never from a pickle that could run code; `auto` is the dtype they
    are stored in. A DistilBERT becomes a BERT.

    transformers fills gaps with random numbers and a warning; here they are a ValueError, as are
    damaged files.
    """
    try:
        config = AutoConfig.from_pretrained(
            reference.name_or_path,
            revision=reference.revision,
            trust_remote_code=trust_remote_code,
        )
        model, found = auto_class(config).from_pretrained(
            reference.name_or_path,
            revision=reference.revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attn_implementation,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{reference.name_or_path}: its weights cannot be read ({error}); download or save "
            "them again"
        ) from error
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{reference.name_or_path}: {name} has shape {list(stored)} in the weights and "
            f"{list(expected)} by the config"
        )
    if found["missing_keys"]:
        raise ValueError(
            f"{reference.name_or_path}: its weights lack "
            f"{', '.join(sorted(found['missing_keys'])[:3])}"
        )
    return as_bert(model)


def read_config(
    parent: Parent, name_or_path: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """A model's config, from a folder or the hub; a DistilBERT's as that of a BERT.

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
    config = as_bert_config(config)
    family_of(config)
    return config


def recommended_order(teacher: PreTrainedConfig) -> Order:
    """The order the paper found to work by architecture: Llamas from the first layer, all others
    from the last.
    """
    return "first" if teacher.model_type == "llama" else "last"


def fingerprint(name_or_path: str, config: PreTrainedConfig) -> str:
    """Tells a model's weights from others that lay at the same place: the commit of a hub
    repository, of a folder a hash over the config and parts of the weights.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{config._commit_hash}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLED_BYTES))
    return f"{folder.name} {digest.hexdigest()[:16]}"
