"""Sources -> corpus/v1 and pairs/v1: cleaned, de-duplicated, split by the hash of the prompt.

python jobs/prepare_data.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py demo
"""

from sarm.config import PrepareData
from sarm.runtime.job import run_job


def main(config: PrepareData) -> None:
    from sarm.runtime import stages
    from sarm.runtime.session import open_session

    stages.check_sources(config.data)
    with open_session(config) as session:
        stages.prepare(session, config.data)


if __name__ == "__main__":
    run_job(PrepareData, main, __doc__ or "")
