"""What the folders of the pipeline's stages hold: the `schema` that `manifest.json` gives, and that readers ask for.

Apart from the modules that read and write them, so that a job can refuse a folder of another kind before torch is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

CORPUS_FOLDER = "corpus/v1"
PAIRS_FOLDER = "pairs/v1"
RESPONSES_FOLDER = "responses/v1"
ACTIVATIONS_FOLDER = "activations/v1"
SAE_FOLDER = "sae/v1"
SARM_FOLDER = "sarm/v1"
SPARSE_RM_FOLDER = "sparse_rm/v1"
EVALUATION_FOLDER = "evaluation/v1"
CONTEXTS_FOLDER = "contexts/v1"
EXPLANATIONS_FOLDER = "explanations/v1"
PAGES_FOLDER = "feature_pages/v1"
FEATURE_EDIT_FOLDER = "feature_edit/v1"
STYLE_CODES_FOLDER = "style_codes/v1"
DOSES_FOLDER = "debias_doses/v1"
DEBIAS_FOLDER = "debias/v1"

HEAD_EDIT = "edit.json"
"""In a reward model's folder: the weights of its head that were edited, and the model that it was made from."""
SWEEP_FILE = "sweep.json"
"""In a sweep's folder: the settings that all its cells have in common."""
BASELINES = {
    "scalar_head": "scalar head, same backbone",
    "scalar_head_full": "scalar head, whole backbone",
    "sarm_random_encoder": "SARM, random encoder",
    "sarm_random_directions": "SARM, random directions alone",
    "sarm_random_linear": "SARM, random linear map",
    "sarm_token_sae": "SARM, token-level SAE",
}
"""Where the baselines of reward training go, and what a report calls them."""


@dataclass(frozen=True)
class Folders:
    """Where each stage of a run writes."""

    out: Path

    corpus = property(lambda self: self.out / "corpus")
    pairs = property(lambda self: self.out / "pairs")
    responses = property(lambda self: self.out / "responses")
    text_activations = property(lambda self: self.out / "activations" / "text")
    chat_activations = property(lambda self: self.out / "activations" / "chat")
    heldout_activations = property(lambda self: self.out / "activations" / "heldout")
    sae = property(lambda self: self.out / "sae")
    sarm = property(lambda self: self.out / "sarm")
    scalar_head = property(lambda self: self.out / "scalar_head")
    evaluation = property(lambda self: self.out / "evaluation")
    contexts = property(lambda self: self.out / "contexts")
    explanations = property(lambda self: self.out / "explanations")
    pages = property(lambda self: self.out / "features")

    def inputs(self, *names: str) -> dict[str, tuple[Path, str]]:
        """Path and schema of the folders that a stage reads, by the names that manifests give them: their schema, or their place."""
        known = {
            CORPUS_FOLDER: (self.corpus, CORPUS_FOLDER),
            PAIRS_FOLDER: (self.pairs, PAIRS_FOLDER),
            RESPONSES_FOLDER: (self.responses, RESPONSES_FOLDER),
            "activations/text": (self.text_activations, ACTIVATIONS_FOLDER),
            "activations/chat": (self.chat_activations, ACTIVATIONS_FOLDER),
            "activations/heldout": (self.heldout_activations, ACTIVATIONS_FOLDER),
            SAE_FOLDER: (self.sae, SAE_FOLDER),
            SARM_FOLDER: (self.sarm, SARM_FOLDER),
            EVALUATION_FOLDER: (self.evaluation, EVALUATION_FOLDER),
            CONTEXTS_FOLDER: (self.contexts, CONTEXTS_FOLDER),
            EXPLANATIONS_FOLDER: (self.explanations, EXPLANATIONS_FOLDER),
            **{name: (self.out / name, SARM_FOLDER) for name in BASELINES},
        }
        return {name: known[name] for name in names if name in known}

    def states(self, name: str) -> Path:
        """Where the training of the folder of this name keeps its states."""
        return self.out / "training" / name

    def activations(self, name: str, layer: int, first_layer: int) -> Path:
        """Where the activations `name` of one of a pass's layers go; those of the first have no folder of their own."""
        return self.out / "activations" / ("" if layer == first_layer else f"layer{layer}") / name
