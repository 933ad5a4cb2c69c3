"""One training of the study."""

from collections.abc import Iterator

from adapters.turbo import TurboAdapter
from demo.subject import SCENES
from families.registry import BASES
from lab.experiments import training
from lab.experiments.training import Milestone, Recipe
from lab.experiments.turbo_retention.design import TURBO, WORD, Condition, Plan
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs


def training_adapter() -> TurboAdapter:
    """The miniature's own."""
    return training.training_adapter(BASES[TURBO])


def train(condition: Condition, plan: Plan, seed: int) -> Iterator[Milestone]:
    """Trains on the demo's sixteen scenes, and stops at every milestone of the plan."""
    settings = resolve(
        TrainingInputs(
            dataset=SCENES,
            base_model=condition.base,
            turbo_adapter=condition.turbo_adapter,
            placeholder_token=WORD,
            lr_scheduler=plan.lr_scheduler,
            learning_rate=plan.learning_rate,
            placeholder_learning_rate=0.02,
            batch_size=plan.batch_size,
            steps=plan.milestones[-1],
            seed=seed,
            caption_dropout=0.05,
        )
    )
    return training.train(Recipe(settings), plan.milestones)
