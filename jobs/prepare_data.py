"""Sources -> corpus/v1 and pairs/v1: cleaned, de-duplicated, split by the hash of the prompt.

python jobs/prepare_data.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py demo
"""

from sarm.settings.jobs import PrepareData
from sarm.stages.job import run_job


def main(config: PrepareData) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


if __name__ == "__main__":
    run_job(PrepareData, main, __doc__ or "")
