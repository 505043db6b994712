"""How a run's report is cited, read from what the run left: manifests, and the command that its evaluation noted."""

import sys
from collections.abc import Mapping

from sarm.contracts.folders import Folders
from sarm.contracts.manifest import CLAIM, MANIFEST, Manifest, sha256_of
from sarm.contracts.untrusted import read_json
from sarm.report.citation import Citation

# Folders that make the report what it is, and what a citation calls them; a run with a dictionary from elsewhere has no texts.
_CITED = {"sarm": "model", "sae": "dictionary", "pairs": "preferences", "corpus": "texts"}
# What was read stands in the config of two of them.
_SOURCES = {"pairs": ("preferences", "pairs"), "corpus": ("texts", "texts")}


def citation_of(title: str, folders: Folders, manifests: Mapping[str, Manifest]) -> Citation:
    """The citation of a run's report; the folders that it is of are finished, by their names in `manifests`, oldest first."""
    there = [name for name in _CITED if name in manifests]
    commits = [manifests[name].git_commit for name in manifests if name in (*there, "evaluation")]
    return Citation(
        title=title,
        date=manifests["evaluation"].created[:10],
        # The package has been loaded, and an import of it from here would be a circle: its API runs stages.
        version=sys.modules["sarm"].__version__,
        commits=tuple(dict.fromkeys(commit for commit in commits if commit != "unknown")),
        sources={
            told: ", ".join(map(str, manifests[name].config.get(key) or ()))
            for name, (told, key) in _SOURCES.items()
            if name in manifests
        },
        seed=manifests["sarm"].config.get("seed"),
        manifests={_CITED[name]: sha256_of(folders.out / name / MANIFEST) for name in there},
        command=str(read_json(folders.evaluation / CLAIM).get("notes", {}).get("command", "")),
    )
