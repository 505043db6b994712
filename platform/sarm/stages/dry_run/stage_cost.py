"""What a stage costs, and what its cost is worked out from."""

from typing import Any, NamedTuple

from sarm.data.formats.model_shapes import Shape
from sarm.engine.ray.machine import Machine
from sarm.settings.model import ModelSettings
from sarm.settings.run import RunSettings
from sarm.stages.dry_run.source_sizes import Sizes


class StageCost(NamedTuple):
    """What one stage takes; None where it is not known."""

    stage: str
    seconds: float | None
    """On the machine that is planned for."""
    gpu_hours: float | None
    host_gb: float | None
    """Of one process, or of the largest."""
    gpu_gb: float | None
    """Of one GPU, where the stage would use one."""
    disk_gb: float | None
    work: str
    """What it goes through, in words."""
    rows: float | None = None
    """Texts and pairs, activations, or pairs of all epochs that it goes through."""


class Known(NamedTuple):
    """What every formula needs of a config that may lack concerns."""

    config: Any
    run: RunSettings
    machine: Machine
    sizes: Sizes
    shape: Shape | None

    @property
    def model(self) -> ModelSettings:
        model: ModelSettings = self.config.model
        return model

    @property
    def reward_dtype(self) -> str:
        precision: str = self.config.reward.precision
        return precision

    @property
    def num_workers(self) -> int:
        """Of trainings: as many as are asked for and have a GPU, where there are GPUs."""
        asked = self.machine.workers(self.run.num_workers)
        return min(asked, self.machine.num_gpus) if self.machine.num_gpus else asked

    def time(self, flops: float, count: int, dtype: str, *, training: bool = False) -> tuple[float, float]:
        """(seconds, GPU-hours) of so many FLOPs."""
        return flops / self.machine.rate(self.run, count, dtype, training=training), flops / self.machine.gpu_rate(
            dtype
        ) / 3600
