"""From a SARM's folder to a service that is warm: everything checked before anything is loaded, weights read once."""

import os
import time
from pathlib import Path

import torch

from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.models import check_tokenizer, sarm_settings, sarm_spec, score_key
from sarm.passes.reader import Reader
from sarm.serve.encoding import Encoder
from sarm.serve.engine import Engine, Tokenised
from sarm.serve.heads import Heads, read_edit
from sarm.serve.metrics import Metrics
from sarm.serve.service import About, Service
from sarm.serve.variant_routes import Variants
from sarm.settings.model import ModelSettings
from sarm.settings.serving import Serving

_BATCH_TOKENS, _GPU_BATCH_TOKENS = 1024, 16_384
_PENALTY_STDS = 3.0
_WARM_UP = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "Slowly, and with yeast."}]  # fmt: skip


def load_service(settings: Serving) -> Service:
    """The service of a model, its engine running and warm.

    Raises UserError for a folder that is torn or holds no SARM, an edit of another head, a policy's tokenizer without a template.
    """
    reader, identity = _reader(settings)
    read_at = time.monotonic()
    policy = None
    if settings.policy_tokenizer is not None:
        policy = load_chat_tokenizer(ModelSettings(name=str(settings.policy_tokenizer)), settings.policy_tokenizer)
    model, chat = reader.model, reader.chat
    heads = Heads(model.score.weight.detach().squeeze(0).float().cpu().numpy())
    for text in settings.variants:
        name, _, path = text.partition("=")
        heads.add(name, read_edit(Path(path).expanduser()))
    variants = Variants(heads, settings.variants_folder)
    config = model.config
    std = config.reward_std if config.reward_std > 0 else 1.0
    fixed = getattr(config, "cut_off_reward", None)
    about = About(
        name=settings.name or settings.model.name,
        identity=identity,
        template=chat.template_hash,
        tokenizer=chat.tokenizer_hash,
        protocol=PROTOCOL_VERSION,
        reward_mean=config.reward_mean,
        reward_std=std,
        penalty=config.reward_mean - _PENALTY_STDS * std if fixed is None else fixed,
        max_length=chat.max_length,
    )
    engine = Engine(
        reader,
        threads=settings.threads or len(os.sched_getaffinity(0)),
        max_wait=settings.max_wait,
        cached=settings.cached,
    )
    encoder = Encoder(chat, model, policy, settings.on_foreign_text)
    service = Service(
        engine=engine,
        encoder=encoder,
        heads=heads,
        variants=variants,
        about=about,
        metrics=_metrics(engine, about),
        on_truncated=settings.on_truncated,
    )
    engine.start()
    _warm_up(service)
    service.ready_seconds = time.monotonic() - read_at
    return service


def _reader(settings: Serving) -> tuple[Reader, str]:
    folder = settings.model
    own = sarm_settings(folder)
    spec = sarm_spec(folder, dtype=settings.dtype)
    check_tokenizer(spec)
    is_gpu = torch.cuda.is_available()
    budget = settings.batch_tokens or (_GPU_BATCH_TOKENS if is_gpu else _BATCH_TOKENS)
    reader = Reader(folder, own, settings.dtype, budget)
    assert reader.chat is not None
    assert reader.model is not None
    return reader, score_key(spec)


def _metrics(engine: Engine, about: About) -> Metrics:
    metrics = Metrics()
    metrics.describe(name=about.name, identity=about.identity, template=about.template)
    metrics.gauge("sarm_queue_items", "Answers that wait.", lambda: engine.waiting[0])
    metrics.gauge("sarm_queue_tokens", "Tokens that wait or are being computed.", lambda: engine.waiting[1])
    metrics.gauge("sarm_queue_estimated_seconds", "What an answer would wait now.", lambda: engine.estimated_wait)
    metrics.gauge("sarm_computed_tokens", "Tokens of forward passes since the start.", lambda: engine.cost.tokens)
    metrics.gauge("sarm_read_tokens", "The same, had each answer been read alone.", lambda: engine.read_tokens)
    metrics.gauge("sarm_forward_seconds", "Seconds of forward passes since the start.", lambda: engine.cost.forward_seconds)  # fmt: skip
    return metrics


def _warm_up(service: Service) -> None:
    """Read one answer: what is first made at the first request is made, and a batch is timed."""
    encoded = service.encoder.messages(_WARM_UP)
    for future in service.engine.submit([Tokenised(encoded.ids, encoded.prompt_tokens)]):
        future.result()
