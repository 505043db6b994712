"""Every stage in order: sources -> activations -> SAE -> SARM -> evaluation -> report -> contexts -> feature pages.

python jobs/pipeline.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/pipeline.py demo
"""

from sarm.settings.jobs import Pipeline
from sarm.stages.job import run_job


def main(config: Pipeline) -> None:
    from sarm.stages.chain import run_chain

    files, content = run_chain(config)["evaluate"]
    from sarm.report.summary import print_summary

    print_summary(content, files.html)
    if config.pages.in_pipeline:
        print(f"features {config.run.out / 'features' / 'features.html'}")


if __name__ == "__main__":
    run_job(Pipeline, main, __doc__ or "")
