"""The settings of a fleet. Does not import Ray or PyTorch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FleetSettings(BaseModel):
    """What `python -m fleet` and the file of `serve deploy` set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = Field("auto", description="the base model of all replicas")
    replicas: int = Field(1, ge=1, le=1000, description="engines, each with a GPU of its own")
    max_replicas: int = Field(0, ge=0, le=1000, description="autoscaling up to this; 0: off")
    loras: int = Field(20, ge=1, le=10_000, description="LoRAs that a replica holds in CPU memory")
    lora_memory: int = Field(8, ge=1, le=10_000, description="GB of CPU memory for them")
    disk: int = Field(32, ge=1, le=100_000, description="GB of downloaded LoRAs on each machine")
    ongoing: int = Field(4, ge=1, le=100, description="requests at a replica; one is generated")
    queued: int = Field(64, ge=1, le=10_000, description="requests that wait; more get 429")
    fronts: int = Field(1, ge=1, le=1000, description="processes that check requests")
    gpus: float = Field(0, ge=0, le=8, description="GPUs of a replica and of a training; 0: a CPU")
    store: str | None = Field(
        None, description="URL for weights, such as s3://bucket/weights; None: one machine"
    )
    runs: str | None = Field(
        None, description="URL for training runs, such as s3://bucket/runs; None: no trainings"
    )
    jobs: str | None = Field(
        None, description="address of Ray's dashboard, to which trainings are submitted"
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; it must be 0 or at least replicas, "
                f"{self.replicas}"
            )
        if self.runs and not self.jobs:
            raise ValueError("runs needs jobs, the address of Ray's dashboard")
        return self
