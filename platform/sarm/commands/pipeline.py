"""Every stage in order: sources -> activations -> SAE -> SARM -> evaluation -> report -> contexts -> feature pages.

python jobs/pipeline.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/pipeline.py demo
"""

from sarm.commands.command import Command
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS


def main(config: Pipeline) -> None:
    from sarm.stages.chain import run_chain

    files, content = run_chain(config)["evaluate"]
    from sarm.report.summary import print_summary

    print_summary(content, files.html)
    if config.pages.in_pipeline:
        print(f"features {config.run.out / 'features' / 'features.html'}")


COMMAND = Command(settings=Pipeline, main=main, about=__doc__, presets=PRESETS, needs=("train",))
