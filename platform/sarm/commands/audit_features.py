"""SARM and labelled pairs -> safety features by contrast, causal tests with matched controls, audit.html.

python jobs/audit_features.py demo --off-target rm_bench=chat.jsonl
python jobs/audit_features.py --sarm outputs/demo/sarm --select outputs/demo/pairs --target outputs/demo/pairs --off-target rm_bench=chat.jsonl --out outputs/audit-chat
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/audit_features.py demo --off-target rm_bench=chat.jsonl
"""

from pathlib import Path

from sarm.commands.command import Command
from sarm.settings.audit import AuditFeatures
from sarm.settings.jobs import TrainSarm
from sarm.stages.preset_command import Made


def reads(run: Path) -> dict[str, str]:
    """What an audit reads of a run's folder: the features of its SARM, chosen on training prompts, measured on held-out ones."""
    pairs = str(run / "pairs")
    return {"--sarm": str(run / "sarm"), "--select": pairs, "--target": pairs, "--out": str(run / "audit")}


def check(settings: AuditFeatures) -> None:
    """Sources that no stage makes are looked at before the stages run."""
    from sarm.audit.pairs import check_benchmarks

    check_benchmarks([*settings.select, *settings.target, *settings.off_target])


def main(settings: AuditFeatures) -> None:
    from sarm.engine.session import open_session
    from sarm.stages.audit import audit

    with open_session(settings) as session:
        audit(session, settings)


COMMAND = Command(
    settings=AuditFeatures, main=main, about=__doc__, made=Made(TrainSarm, reads, check), needs=("train",)
)
