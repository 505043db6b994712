"""Every knob of the platform: one frozen dataclass per concern, and one per job that names the concerns the job reads.

The flags of a job are the fields below (`--sae.k 27`), and their help texts are these docstrings. A field marked
`OPERATIONAL` says how fast or where a stage runs, not what it computes: changing it does not make a finished stage foreign.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings, PagesSettings
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import ChainSettings, Flat, StageName
from sarm.settings.sae import AlsoSaes, SaeSettings

Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Clean, de-duplicate and split the sources into corpus/v1 and pairs/v1."""

    stage: ClassVar[StageName] = "prepare_data"
    uses_cluster: ClassVar[bool] = False
    """Whether the job may need Ray; one that says nothing may."""
    run: Annotated[ChainSettings, Flat] = ChainSettings()
    data: DataSettings = DataSettings()


@dataclass(frozen=True, kw_only=True)
class ExtractActivations(PrepareData):
    """Write the residual stream at sentence ends and at the rewarded tokens as activations/v1."""

    stage: ClassVar[StageName] = "extract_activations"
    uses_cluster: ClassVar[bool] = True
    model: ModelSettings = ModelSettings()
    extraction: ExtractionSettings = ExtractionSettings()


@dataclass(frozen=True, kw_only=True)
class _TrainingSae(ExtractActivations):
    sae: SaeSettings = SaeSettings()

    def __post_init__(self) -> None:
        units = self.extraction.units
        if self.sae.recipe == "turn_ends" and TURN_END not in units:
            raise UserError(
                f"the recipe turn_ends learns from turn ends, which --extraction.units {' '.join(units)} does not extract. Pass --extraction.units turn_end, or --sae.recipe papers."
            )
        if self.sae.recipe == "papers" and units[0] == TURN_END:
            raise UserError(
                f"the recipe papers learns from sentence ends, which --extraction.units {' '.join(units)} does not put first. Pass --extraction.units document, or --sae.recipe turn_ends."
            )


@dataclass(frozen=True, kw_only=True)
class TrainSae(_TrainingSae):
    """Train the SAE on sentence ends, then on chat ends; several at once, if asked."""

    stage: ClassVar[StageName] = "train_sae"
    also: AlsoSaes = AlsoSaes()


@dataclass(frozen=True, kw_only=True)
class TrainSarm(_TrainingSae):
    """Train the SARM (and the scalar-head baseline) on the preference pairs."""

    stage: ClassVar[StageName] = "train_sarm"
    reward: RewardSettings = RewardSettings()


@dataclass(frozen=True, kw_only=True)
class Evaluate(TrainSarm):
    """Score held-out pairs, attribute rewards to features, write the report."""

    stage: ClassVar[StageName] = "evaluate"
    evaluation: EvaluationSettings = EvaluationSettings()


@dataclass(frozen=True, kw_only=True)
class CollectContexts(TrainSarm):
    """Collect the texts that make each latent of the trained reward model fire, and how often they do."""

    stage: ClassVar[StageName] = "collect_contexts"
    contexts: ContextsSettings = ContextsSettings()


@dataclass(frozen=True, kw_only=True)
class Pipeline(Evaluate):
    """Every stage, from sources to report and feature pages; also the whole of a preset."""

    stage: ClassVar[StageName] = "feature_pages"
    contexts: ContextsSettings = ContextsSettings()
    pages: PagesSettings = PagesSettings()

    def part(self, job: type[Job]) -> Job:
        """The same settings as the config of one job, e.g. `preset.part(TrainSae)`; what only that job has stays at its default."""
        own = {f.name for f in dataclasses.fields(self)}
        return job(**{f.name: getattr(self, f.name) for f in dataclasses.fields(job) if f.name in own})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FeaturePages(Pipeline):
    """Write pages that show each feature with its contexts, weight and scores."""
