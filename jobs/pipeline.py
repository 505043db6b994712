"""Every stage in order: sources -> activations -> SAE -> SARM -> evaluation -> report -> contexts -> feature pages.

python jobs/pipeline.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/pipeline.py demo
"""

from sarm.config import Pipeline
from sarm.runtime.job import run_job


def main(config: Pipeline) -> None:
    from sarm.data.models import check_model
    from sarm.runtime import stages
    from sarm.runtime.plan import refuse_other_run
    from sarm.runtime.session import open_session

    stages.check_sources(config.data)
    check_model(config.model)
    refuse_other_run(config)
    with open_session(config) as session:
        stages.prepare(session, config.data)
        stages.extract(session, config.model, config.extraction)
        stages.train_sae(session, config.sae)
        stages.train_sarm(session, config.model, config.reward)
        stages.evaluate(session, config.extraction, config.evaluation)
        # Seconds of imports, that who is refused at the first stage need not wait for.
        from sarm.interpret.summary import print_summary
        from sarm.runtime.contexts import reading
        from sarm.runtime.reporting import report

        files, content = report(session, config.run.out.name, config.evaluation)
        if config.pages.in_pipeline:
            reading.collect(session, config.contexts)
            reading.write_pages(session, config.pages)
    print_summary(content, files.html)
    if config.pages.in_pipeline:
        print(f"features {session.folders.pages / 'features.html'}")


if __name__ == "__main__":
    run_job(Pipeline, main, __doc__ or "")
