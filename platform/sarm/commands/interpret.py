"""Explain latents from their contexts, test every explanation on texts of other prompts, rate them; report, tables, MLflow.

    python jobs/interpret.py demo
    python jobs/interpret.py outputs/demo/contexts --out outputs/demo/explanations
    python jobs/interpret.py outputs/demo/contexts --out outputs/explained --judging.judges gpt-4o-mini --judging.prices gpt-4o-mini=0.15/0.6 --judging.max-usd 2
    python jobs/interpret.py outputs/demo/contexts --out outputs/explained --judging.judges qwen3@http://localhost:8000/v1 --judging.retry-failed

Without a judge every latent gets an extractive label. Keys come from OPENAI_API_KEY, or --judging.keys HOST=env:NAME or HOST=file:PATH.
"""

from pathlib import Path

from sarm.commands.command import Command
from sarm.settings.jobs import CollectContexts
from sarm.settings.judging import Interpret
from sarm.stages.preset_command import Made


def reads(run: Path) -> dict[str, str]:
    """What is explained of a run's folder, and where the explanations go."""
    return {"contexts": str(run / "contexts"), "--out": str(run / "explanations")}


def main(settings: Interpret) -> None:
    from sarm.stages.interpret import run_interpretation

    run_interpretation(settings)


COMMAND = Command(settings=Interpret, main=main, about=__doc__, made=Made(CollectContexts, reads), needs=("judge",))
