"""What contexts and audits assume of an SAE: that a latent is silent or fires, more or less, and never below 0."""

from pathlib import Path

from sarm.contracts.untrusted import read_json
from sarm.nn.architectures import ARCHITECTURES
from sarm.settings.checks import UserError


def refuse_bidirectional(architecture: str, what: str) -> None:
    """Raise UserError for an architecture whose latents mean one thing where they are positive and another where they are negative.

    Tallies, strongest texts, deciles, explanations and contrasts are of one meaning a latent: the other would be left out without a word.
    """
    if architecture in ARCHITECTURES and ARCHITECTURES[architecture].is_bidirectional:
        raise UserError(
            f"{what} take a latent to have one meaning, and those of {architecture} SAEs have two, one for each sign. Pass another --sae.architecture, or end with the report (--pages.no-in-pipeline, or jobs/evaluate.py), whose contributions count both."
        )


def check_sarm(folder: Path, what: str) -> None:
    """`refuse_bidirectional` for a reward model's folder that is known to be one."""
    refuse_bidirectional(str((read_json(folder / "config.json").get("sae") or {}).get("architecture")), what)
