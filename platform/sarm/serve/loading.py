"""From a SARM's folder to a service that is warm: everything checked before anything is loaded, weights read once."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray

from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.sarm_folder import read_latents
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.models import (
    check_tokenizer,
    sarm_settings,
    sarm_spec,
    sarm_tokenizer,
    score_key,
    with_edit,
)
from sarm.passes.reader import Reader
from sarm.serve.drift_account import Account, DriftAccount
from sarm.serve.encoding import Encoder
from sarm.serve.engine import Engine, Tokenised
from sarm.serve.heads import Heads, read_edit
from sarm.serve.metrics import Metrics
from sarm.serve.names import Names, load_names
from sarm.serve.service import About, Service
from sarm.serve.shared_watch import Remote, SharedWatch, WatchHost
from sarm.serve.variant_routes import Variants
from sarm.serve.watch import Watch
from sarm.serve.watch_store import WatchStore
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.serving import Serving

_BATCH_TOKENS, _GPU_BATCH_TOKENS = 1024, 16_384
# Of a rollout that drives an alarm, its end.
_SHOWN_CHARACTERS = 2000
_WARM_UP = ("Slowly, and with yeast.", "In an oven, once the dough has risen.")


def leave_cores_to_the_engine() -> None:
    """Call it in a process that does nothing but serve, before anything is loaded.

    Each thread that computes has OpenMP workers of its own, and they sleep between two products once there are more of them than cores: a forward
    pass then takes a third longer.
    """
    torch.set_num_threads(1)


def load_service(settings: Serving, remote: Remote | None = None) -> Service:
    """The service of a model, its engine running and warm. With a `remote`, its answers are watched there.

    Raises UserError for a folder that is torn or holds no SARM, an edit of another head, a policy's tokenizer without a template.
    """
    reader, identity, edits = _reader(settings)
    read_at = time.monotonic()
    policy = None
    if settings.policy_tokenizer is not None:
        policy = load_chat_tokenizer(ModelSettings(name=str(settings.policy_tokenizer)), settings.policy_tokenizer)
    model, chat = reader.model, reader.chat
    heads, variants = _heads(settings, model.score.weight.detach().squeeze(0).float().cpu().numpy())
    config = model.config
    std = config.reward_std if config.reward_std > 0 else 1.0
    about = About(
        name=settings.name or settings.model.name,
        identity=identity,
        template=chat.template_hash,
        tokenizer=chat.tokenizer_hash,
        protocol=PROTOCOL_VERSION,
        reward_mean=config.reward_mean,
        reward_std=std,
        penalty=config.penalty,
        max_length=chat.max_length,
        feature_edits=edits,
    )
    engine = Engine(
        reader,
        threads=settings.threads or _cores(),
        max_wait=settings.max_wait,
        cached=settings.cached,
    )
    encoder = Encoder(chat, model, policy, settings.on_foreign_text)
    names = _names(settings)
    account: Account = SharedWatch(heads, remote) if remote is not None else _account(settings, heads, identity, chat, names)  # fmt: skip
    service = Service(
        engine=engine,
        encoder=encoder,
        heads=heads,
        variants=variants,
        about=about,
        metrics=_metrics(engine, about, account, settings.watched),
        names=names,
        account=account,
        on_truncated=settings.on_truncated,
    )
    engine.start()
    _warm_up(service)
    service.ready_seconds = time.monotonic() - read_at
    return service


def _reader(settings: Serving) -> tuple[Reader, str, tuple[dict[str, Any], ...]]:
    folder = settings.model
    own = sarm_settings(folder)
    spec = with_edit(sarm_spec(folder, dtype=settings.dtype), settings.edit)
    check_tokenizer(spec)
    is_gpu = torch.cuda.is_available()
    budget = settings.batch_tokens or (_GPU_BATCH_TOKENS if is_gpu else _BATCH_TOKENS)
    edit = Path(spec.edit) if spec.edit else None
    reader = Reader(folder, own, settings.dtype, budget, looks_unexplained=True, edit=edit)
    assert reader.chat is not None
    assert reader.model is not None
    carried = [(one["layer"], len(one["edits"]), "model") for one in reader.model.config.feature_edits]
    of = "server" if settings.edit else "model"
    spliced = [(one.layer, len(one.edits), of) for one in load_edit(edit).splices] if edit else []
    names = ("layer", "features", "of")
    return reader, score_key(spec), tuple(dict(zip(names, one, strict=True)) for one in (*carried, *spliced))


def load_watch(settings: Serving) -> WatchHost:
    """The watch of all replicas of a server, without the model's body. Raises UserError as `load_service` does."""
    spec = with_edit(sarm_spec(settings.model, dtype=settings.dtype), settings.edit)
    (weight_S,) = read_latents(settings.model, "score.weight")
    heads, variants = _heads(settings, weight_S)
    account = _account(settings, heads, score_key(spec), sarm_tokenizer(spec), _names(settings))
    return WatchHost(account, variants)


def _heads(settings: Serving, weight_S: Float32[NDArray[np.float32], " d_sae"]) -> tuple[Heads, Variants]:
    heads = Heads(weight_S)
    for text in settings.variants:
        name, _, path = text.partition("=")
        heads.add(name, read_edit(Path(path).expanduser()))
    return heads, Variants(heads, settings.variants_folder)


def _names(settings: Serving) -> Names:
    return load_names(settings.model, settings.contexts, settings.explanations)


def _account(settings: Serving, heads: Heads, identity: str, chat: ChatTokenizer, names: Names) -> DriftAccount:
    if wrong := [latent for latent in settings.watched if not 0 <= latent < heads.num_latents]:
        raise UserError(f"latent {wrong[0]} is none of this model's {heads.num_latents}. Pass --watched with others.")
    watch = Watch(
        heads,
        identity,
        step_answers=settings.step_answers,
        decode=lambda ids: chat.tokenizer.decode(list(ids), skip_special_tokens=False)[-_SHOWN_CHARACTERS:],
        silent_S=names.silent(heads.num_latents),
        store=None if settings.drift_folder is None else WatchStore(settings.drift_folder),
    )
    return DriftAccount(watch, heads, names, settings.name or settings.model.name)


def _metrics(engine: Engine, about: About, account: Account, watched: Sequence[int]) -> Metrics:
    metrics = Metrics()
    metrics.describe(name=about.name, identity=about.identity, template=about.template)
    metrics.gauge("sarm_queue_items", "Answers that wait.", lambda: engine.waiting[0])
    metrics.gauge("sarm_queue_tokens", "Tokens that wait or are being computed.", lambda: engine.waiting[1])
    metrics.gauge("sarm_queue_estimated_seconds", "What an answer would wait now.", lambda: engine.estimated_wait)
    metrics.gauge("sarm_computed_tokens", "Tokens of forward passes since the start.", lambda: engine.cost.tokens)
    metrics.gauge("sarm_read_tokens", "The same, had each answer been read alone.", lambda: engine.read_tokens)
    metrics.gauge("sarm_forward_seconds", "Seconds of forward passes since the start.", lambda: engine.cost.forward_seconds)  # fmt: skip
    for name, words in (
        ("alarms", "Alarms of the watch since the start."),
        ("unwatched", "Answers that the watch had to pass over."),
        ("streams", "Runs, splits and variants that are watched."),
    ):
        metrics.gauge(f"sarm_drift_{name}", words, partial(_figure, account, name))
    for latent in watched:
        metrics.watched(latent, partial(_contribution, account, latent))
    return metrics


def _figure(account: Account, name: str) -> float:
    return account.figures()[name]


def _contribution(account: Account, latent: int) -> float:
    return account.figures((latent,))[str(latent)]


def _cores() -> int:
    """Cores that this process may use; where the system does not say, as on macOS, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warm_up(service: Service) -> None:
    """Read two answers, one after the other: what is first made at the first request is made, and a batch is timed without that."""
    for answer in _WARM_UP:
        asked = {"role": "user", "content": "How do I bake bread?"}
        encoded = service.encoder.messages([asked, {"role": "assistant", "content": answer}])
        for future in service.engine.submit([Tokenised(encoded.ids, encoded.prompt_tokens)]):
            future.result()
