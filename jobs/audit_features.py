"""SARM and labelled pairs -> safety features by contrast, causal tests with matched controls, audit.html.

python jobs/audit_features.py --sarm outputs/demo/sarm --select outputs/demo/pairs --target outputs/demo/pairs --off-target rm_bench=chat.jsonl --out outputs/audit
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/audit_features.py --sarm ... (as above)
"""

from sarm.audit.settings import AuditFeatures
from sarm.runtime.job import run_command


def main(settings: AuditFeatures) -> None:
    from sarm.runtime.audit.auditing import audit
    from sarm.runtime.session import open_session

    with open_session(settings) as session:
        audit(session, settings)


if __name__ == "__main__":
    run_command(AuditFeatures, main, __doc__ or "")
