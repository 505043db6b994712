"""`jobs/debias.py`: codes of answers with and without a property -> the features that carry it -> doses -> what the chosen one repairs and costs.

Features and doses are chosen on one half of the prompts, and everything is reported on the other.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from sarm.engine.ray.machine import machine_of
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.passes.models import ModelSpec, check_tokenizer, find_model
from sarm.settings.budget import dtype_of
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias
from sarm.stages.debias_dictionaries import dictionaries_of
from sarm.stages.debias_doses import Job, read_codes, try_doses
from sarm.stages.debias_measure import measure
from sarm.stages.debias_texts import texts_of
from sarm.stages.fitting import made_in, reading_budget


def debias(session: Session, settings: Debias) -> Path:
    """Every stage; returns the page. Finished stages of the same settings are left alone.

    Raises UserError for an unusable model, dictionary, source or property, before a cluster starts and before anything is written.
    """
    spec, batch_tokens = _fitted(session, settings)
    dictionaries = dictionaries_of(settings, spec)
    written = None
    if settings.judging.judges:
        if find_spec("openai") is None:
            raise UserError("--judging.judges needs the package openai. Run pip install 'sarm[judge]'.")
        # Its client takes a second, which who asks nobody need not wait for.
        from sarm.stages.debias_paraphrases import written_paraphrases

        written = written_paraphrases(settings)
    texts = texts_of(settings, written)
    check_tokenizer(spec)
    job = Job(session, settings, spec, batch_tokens, dictionaries, texts)
    read_codes(job)
    try_doses(job)
    return measure(job)


def _fitted(session: Session, settings: Debias) -> tuple[ModelSpec, int]:
    """The model and the tokens of a pass on the run's device; a job that has begun goes on in the dtype that it began in."""
    device = machine_of(settings.run).device(settings.run.use_gpu)
    known = made_in(session.run.out / "codes", "dtype") if settings.dtype == "auto" else settings.dtype
    spec = replace(find_model(settings.of_model()), dtype=known or dtype_of(device))
    if spec.kind == "callable":
        raise UserError(f"{settings.model} is a function, which has no features to suppress. Pass --model a folder.")
    if spec.kind == "sarm" and settings.debias.positions != "all":
        raise UserError(f"{settings.model} is a SARM, which is edited at all tokens. Pass --debias.positions all.")
    if spec.edit:
        raise UserError(f"{settings.model} is read with the edit in {spec.edit} already. Move it away, to look at the model as it is.")  # fmt: skip
    budget = reading_budget(device, Path(spec.place), spec.max_length, settings.batch_tokens, spec.dtype)
    say(f"budget: passes of {budget.batch_tokens:,} tokens in {budget.dtype}")
    return spec, budget.batch_tokens
