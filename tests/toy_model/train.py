"""The other half of the toy model."""

from cog import BaseModel, Input, Path


class TrainingOutput(BaseModel):
    weights: Path


def train(
    dataset: Path = Input(description="A file."),
) -> TrainingOutput:
    return TrainingOutput(weights=dataset)
