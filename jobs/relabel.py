"""Audited SARM -> training pairs poisoned and denoised by its features and by controls, the head retrained on each.

python jobs/relabel.py --out outputs/audit
python jobs/relabel.py --out outputs/audit --poison 0.01 0.05 --denoise 0.04 --seeds 10
"""

from sarm.audit.settings import Relabel
from sarm.runtime.job import run_command


def main(settings: Relabel) -> None:
    from sarm.runtime.audit.relabelling import relabel
    from sarm.runtime.session import open_session

    with open_session(settings, is_guest=True) as session:
        relabel(session, settings)


if __name__ == "__main__":
    run_command(Relabel, main, __doc__ or "")
