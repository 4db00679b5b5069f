"""What a sweep measures: series of models.

family           every size between the student and its teacher
a baseline       the teacher pruned to each size's depth, see `evaluate.baselines`
random_student   every size between a second student and the same teacher
compare_NAME     any other model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from evaluate.arguments import EvaluationArguments
from evaluate.baselines import BASELINES
from evaluate.family import FamilyLM, SeparateModels
from evaluate.generation import Generator
from evaluate.masked_family import MaskedFamilyLM
from evaluate.plan import Plan
from evaluate.ranks import Ranks
from evaluate.result import Parameters
from evaluate.sources import generates
from evaluate.vllm import vllm_answers
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.assemble import count_parameters
from patching.checkpoints.fingerprint import GENERATION, TOKENIZER, fingerprint
from patching.family import Family
from patching.recipe import Recipe
from patching.running.layer_collapse import CollapsedTeacher, collapsed_model
from patching.running.prefix_tree import PrefixTree


def all_series(plan: Plan, ranks: Ranks) -> list[Series]:
    """Everything that a plan asks to measure."""
    family, other = plan.family, plan.random_family
    members = [SeriesMember("family", k, family.recipe(k)) for k in plan.sizes]
    for name in plan.arguments.baseline_names:
        model_of_size = BASELINES[name].model_of_size(plan, ranks)
        sizes = below_teacher(family, plan.sizes)
        members += [SeriesMember(name, k, model_of_size(k)) for k in sizes]
    merged = [member for member in members if isinstance(member.recipe, CollapsedTeacher)]
    members = [member for member in members if member not in merged]
    series: list[Series] = [FamilySeries(plan, family, members, ranks)]
    if merged:
        series.append(CollapsedSeries(plan, family, merged, ranks))
    if other is not None:
        sizes = below_teacher(other, plan.sizes)
        members = [SeriesMember("random_student", k, other.recipe(k)) for k in sizes]
        series.append(FamilySeries(plan, other, members, ranks))
    return series + [ComparedSeries(plan, name, ranks) for name in plan.compared]


def below_teacher(family: Family, sizes: Sequence[int]) -> list[int]:
    """Sizes whose model is not the teacher itself, which the family has already."""
    return [k for k in sizes if k < family.max_layers_to_patch]


class SeriesMember(NamedTuple):
    """One model of a sweep."""

    series: str
    num_layers_to_patch: int | None
    """None for a compared model."""
    recipe: Recipe | CollapsedTeacher | None = None

    @property
    def name(self) -> str:
        if self.num_layers_to_patch is None:
            return self.series
        return f"{self.series}_k{self.num_layers_to_patch}"


@dataclass(frozen=True)
class FamilySeries:
    """Members of a family, and baselines made from its teacher."""

    plan: Plan
    family: Family
    members: Sequence[SeriesMember]
    ranks: Ranks

    @cached_property
    def sources(self) -> dict[str, str]:
        """What scores come from besides weights and tasks, as `evaluate.sources` has it."""
        parents = self.family.parents
        configs = [parents.fingerprint(parent, GENERATION) for parent in ("student", "teacher")]
        return {
            "tokenizer": parents.fingerprint("teacher", TOKENIZER),
            "generation_config": " ".join(configs),
            **how_models_run(self.plan),
        }

    @property
    def teacher(self) -> PreTrainedModel:
        """The model that members are compared with. All families share it."""
        return self.plan.family.parents.load(["teacher"])["teacher"]

    def config(self, member: SeriesMember) -> PreTrainedConfig:
        return self.family.config(member.recipe)

    def facts(self, member: SeriesMember) -> dict[str, Any]:
        """Fields of a member's `Result` that are known before it runs."""
        return {
            "series": member.series,
            "num_layers_to_patch": member.num_layers_to_patch,
            "max_layers_to_patch": self.family.max_layers_to_patch,
            "order": self.family.order,
            "depth": member.recipe.depth,
            "parameters": parameters_of(self.plan, self.config(member)),
            "recipe": member.recipe.to_dict(),
        }

    def load(self, members: Sequence[SeriesMember]) -> MemberLM:
        """Some of the members as one lm-eval model."""
        recipes = {member.name: member.recipe for member in members}
        student = self.family.parents.load(["student"])["student"]
        tree = PrefixTree(recipes, teacher=self.teacher, student=student)
        return lm_of(tree, self.teacher.config, self.family.tokenizer, self.plan, self.ranks)

    def release(self) -> None:
        """Let go of weights that no other series needs."""
        self.family.parents.release("student")


@dataclass(frozen=True)
class CollapsedSeries(FamilySeries):
    """Teachers with merged layers. Each member runs on its own: a tree's layers are those of
    teacher and student.
    """

    def config(self, member: SeriesMember) -> PreTrainedConfig:
        return self.family.config(member.recipe.places)

    def load(self, members: Sequence[SeriesMember]) -> MemberLM:
        models = {member.name: collapsed_model(member.recipe, self.teacher) for member in members}
        tree = SeparateModels(models)
        return lm_of(tree, self.teacher.config, self.family.tokenizer, self.plan, self.ranks)


@dataclass(frozen=True)
class ComparedSeries:
    """One model of any architecture, with the interface of a `FamilySeries`."""

    plan: Plan
    name: str
    ranks: Ranks
    teacher = None

    @cached_property
    def members(self) -> list[SeriesMember]:
        return [SeriesMember(self.name, None)]

    @cached_property
    def sources(self) -> dict[str, str]:
        reference = self.plan.compared[self.name].reference
        return {
            "tokenizer": fingerprint(reference, TOKENIZER),
            "generation_config": fingerprint(reference, GENERATION),
            **how_models_run(self.plan),
        }

    def facts(self, member: SeriesMember) -> dict[str, Any]:
        config = self.plan.compared[self.name].config
        return {
            "series": self.name,
            "num_layers_to_patch": None,
            "depth": config.get_text_config().num_hidden_layers,
            "parameters": parameters_of(self.plan, config),
        }

    def load(self, members: Sequence[SeriesMember]) -> MemberLM:
        reference, _, tokenizer = self.plan.compared[self.name]
        parents = self.plan.family.parents
        model = load_model(
            reference,
            parents.dtype,
            parents.trust_remote_code,
            parents.attn_implementation,
            parents.placement,
        ).eval()
        tree = SeparateModels({self.name: model})
        return lm_of(tree, model.config, tokenizer, self.plan, self.ranks)

    def release(self) -> None:
        pass


Series = FamilySeries | ComparedSeries
MemberLM = FamilyLM | MaskedFamilyLM
"""lm-eval models that answer for one member at a time: both can `activate` a member, `forget` what
they computed, and have its `name`, its `model` and a `tokenizer`."""


def lm_of(
    tree: PrefixTree | SeparateModels,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    ranks: Ranks,
) -> MemberLM:
    """A tree's members as one lm-eval model."""
    if predicts_masked_tokens(config):
        return MaskedFamilyLM(tree, tokenizer=tokenizer, ranks=ranks)
    arguments = plan.arguments
    return FamilyLM(
        tree,
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        max_batch_size=arguments.max_batch_size,
        generation_batch_size=arguments.generation_batch_size,
        generator=generator_of(arguments),
        max_length=arguments.max_length,
        ranks=ranks,
    )


def generator_of(arguments: EvaluationArguments) -> Generator | None:
    """What generates instead of the members themselves, None if they do."""
    if arguments.generation_backend == "transformers":
        return None
    options = {"max_length": arguments.max_length} if arguments.max_length else {}
    options |= {"trust_remote_code": arguments.trust_remote_code}
    options |= arguments.values_of("vllm_args")
    return partial(vllm_answers, options=options, python=arguments.vllm_python)


def how_models_run(plan: Plan) -> dict[str, str]:
    """Flags that change scores in the way models run, as far as they are given."""
    names = ("max_length", "attn_implementation")
    values = {name: getattr(plan.arguments, name) for name in names}
    return {name: str(value) for name, value in values.items() if value is not None}


def sources_of(series: Series, loaded: TaskDict) -> dict[str, str]:
    """What the scores of a task come from besides the task, whose requests have been built."""
    backend = series.plan.arguments.generation_backend
    if backend == "transformers" or not generates(loaded):
        return series.sources
    return series.sources | {"generation_backend": backend}


def parameters_of(plan: Plan, config: PreTrainedConfig) -> Parameters:
    count = count_parameters(config, plan.arguments.trust_remote_code)
    return Parameters(**count._asdict())
