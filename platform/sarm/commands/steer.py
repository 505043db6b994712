"""Audited SARM -> edited head weights, what the edit does on target and other pairs, and the edited model.

python jobs/steer.py --out outputs/audit --name doubled --edit scale --strength 2
python jobs/steer.py --out outputs/audit --name safer --edit goal --goal 1.0 --tolerance 0.1
python jobs/steer.py --out outputs/audit --name as-before --undo doubled
"""

from sarm.commands.command import Command
from sarm.settings.audit import Steer


def main(settings: Steer) -> None:
    from sarm.engine.session import open_session
    from sarm.stages.steer import steer

    with open_session(settings, is_guest=True) as session:
        steer(session, settings)


COMMAND = Command(settings=Steer, main=main, about=__doc__, needs=("train",))
