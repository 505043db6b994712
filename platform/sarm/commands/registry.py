"""The commands of the program `sarm`, by what people come for. Each is a module of this room, and a script in `jobs/` (`tune/`)."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A command: the module that holds it, what it does, and the arguments that it always has."""

    name: str
    module: str
    about: str
    first: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        """Where a checkout has its script."""
        return f"{'tune' if self.module == 'ablation' else 'jobs'}/{self.module}.py"


GROUPS: dict[str, tuple[Entry, ...]] = {
    "begin": (
        Entry("demo", "pipeline", "the whole chain on a small model and real preferences", ("demo",)),
        Entry("inspect", "prepare_data", "show what a data source is taken for", ("--inspect",)),
    ),
    "use a finished reward model": (
        Entry("card", "reward_card", "one reward as a sum of named features"),
        Entry("evaluate", "evaluate", "benchmarks with intervals (--model), or a run's report"),
        Entry("compare", "compare", "two evaluations, row by row"),
        Entry("serve", "serve", "a reward server for RLHF frameworks"),
        Entry("push", "push", "the model with a model card, to a folder or the hub"),
        Entry("convert-sarm", "convert_sarm", "from and to the papers' layout"),
    ),
    "train": (
        Entry("pipeline", "pipeline", "every stage, from sources to feature pages"),
        Entry("prepare-data", "prepare_data", "sources to corpus and pairs"),
        Entry("extract-activations", "extract_activations", "texts to activations"),
        Entry("train-sae", "train_sae", "activations to a sparse autoencoder"),
        Entry("train-sarm", "train_sarm", "pairs and autoencoder to a reward model"),
        Entry("convert-sae", "convert_sae", "autoencoders of other libraries, both ways"),
        Entry("ablation", "ablation", "a grid of layers, widths and other settings"),
        Entry("ui", "ui", "MLflow, opened at the list of runs"),
    ),
    "read and edit": (
        Entry("collect-contexts", "collect_contexts", "the texts that make each latent fire"),
        Entry("feature-pages", "feature_pages", "pages of features"),
        Entry("interpret", "interpret", "explain latents and test the explanations"),
        Entry("rate", "rate", "ratings by people"),
        Entry("audit-features", "audit_features", "find safety features and test them causally"),
        Entry("steer", "steer", "edit the head of an audited model"),
        Entry("debias", "debias", "find what a model over-rewards, and suppress it"),
        Entry("relabel", "relabel", "poisoned and denoised training"),
    ),
}
ENTRIES = {entry.name: entry for group in GROUPS.values() for entry in group}


def name_of(module: str) -> str:
    """What the command of a module is called."""
    return next(entry.name for entry in ENTRIES.values() if entry.module == module and not entry.first)
