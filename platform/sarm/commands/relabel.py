"""Audited SARM -> training pairs poisoned and denoised by its features and by controls, the head retrained on each.

python jobs/relabel.py --out outputs/audit
python jobs/relabel.py --out outputs/audit-chat --poison 0.01 0.05 --denoise 0.04 --seeds 10
"""

from sarm.commands.command import Command
from sarm.settings.audit import Relabel


def main(settings: Relabel) -> None:
    from sarm.engine.session import open_session
    from sarm.stages.relabel import relabel

    with open_session(settings, is_guest=True) as session:
        relabel(session, settings)


COMMAND = Command(settings=Relabel, main=main, about=__doc__, needs=("train",))
