"""Score held-out pairs, measure with intervals beside the baselines, attribute rewards to features, write the report.

python jobs/evaluate.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/evaluate.py demo
"""

from sarm.config import Evaluate
from sarm.runtime.job import run_job


def main(config: Evaluate) -> None:
    from sarm.interpret.summary import print_summary
    from sarm.runtime import stages
    from sarm.runtime.reporting import report
    from sarm.runtime.session import open_session

    with open_session(config) as session:
        stages.evaluate(session, config.extraction, config.evaluation)
        files, content = report(session, config.run.out.name, config.evaluation)
    print_summary(content, files.html)


if __name__ == "__main__":
    run_job(Evaluate, main, __doc__ or "")
