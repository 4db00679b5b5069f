"""A whole family as one lm-eval model."""

from collections.abc import Mapping

from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.assemble import assemble
from patching.recipe import Recipe


class FamilyLM(HFLM):
    """The members of `recipes`, by name, as one model of the harness."""

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        *,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = 1,
        max_length: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.models = {
            name: assemble(recipe, teacher=teacher, student=student)
            for name, recipe in recipes.items()
        }
        first = next(iter(recipes))
        super().__init__(
            pretrained=self.models[first],
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )
        if accelerator is not None and accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.activate(first)

    def activate(self, name: str) -> None:
        self.name = name
        self._model = self.models[name]
        self._config = self._model.config

    def forget(self) -> None:
        pass
