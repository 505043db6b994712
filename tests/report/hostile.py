"""Forty strings that would run code, load something or break out of a page if it were put together carelessly; and a store full of them.

Each script sets `window.hit`, so that one that ran leaves a trace.
"""

import pyarrow as pa

from sarm.contracts.tables import LATENT_CONTEXTS_TABLE, LATENT_SUMMARIES_TABLE
from sarm.interpret.context_store import ContextStore

_RUN = "window.hit=1"
STRINGS = [
    f"<script>{_RUN}</script>",
    f"<ScRiPt>{_RUN}</sCrIpT>",
    f"</script><script>{_RUN}</script>",
    f"</style><script>{_RUN}</script>",
    f"</title><script>{_RUN}</script>",
    f"</textarea><script>{_RUN}</script>",
    f"--><script>{_RUN}</script><!--",
    f"]]><script>{_RUN}</script>",
    f"<!--<script>{_RUN}</script>-->",
    f"<img src=x onerror={_RUN}>",
    f"<img src=x onerror='{_RUN}'//>",
    f'"><img src=x onerror={_RUN}>',
    f"'><img src=x onerror={_RUN}>",
    f"<svg onload={_RUN}>",
    f"<svg><script>{_RUN}</script></svg>",
    f"<svg><animate onbegin={_RUN} attributeName=x dur=1s>",
    f"<body onload={_RUN}>",
    f"<details open ontoggle={_RUN}>",
    f"<video><source onerror={_RUN}></video>",
    f"<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",  # noqa: F541
    f"<iframe src=\"javascript:parent.hit=1\"></iframe>",  # noqa: F541
    f"<object data='javascript:{_RUN}'></object>",
    f"<embed src='javascript:{_RUN}'>",
    f"<a href='javascript:{_RUN}' autofocus onfocus={_RUN}>x</a>",
    f"<input autofocus onfocus={_RUN}>",
    f"<select autofocus onfocus={_RUN}></select>",
    f"<marquee onstart={_RUN}>x</marquee>",
    f"<math><mtext></mtext><script>{_RUN}</script></math>",
    f"<template><script>{_RUN}</script></template><script>{_RUN}</script>",
    f"<noscript><p title=\"</noscript><img src=x onerror={_RUN}>\">",
    "<link rel=stylesheet href=//attacker.invalid/x.css>",
    "<base href=//attacker.invalid/>",
    "<meta http-equiv=refresh content='0;url=//attacker.invalid/'>",
    "<form action=//attacker.invalid/><button autofocus>x</button></form>",
    "<style>@import '//attacker.invalid/x.css';body{background:url(//attacker.invalid/x.png)}</style>",
    f"\" onmouseover=\"{_RUN}\" autofocus onfocus=\"{_RUN}\" x=\"",
    f"' autofocus onfocus='{_RUN}",
    f"<\x00script>{_RUN}</script>",
    "{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}",
    f"&lt;script&gt;{_RUN}&lt;/script&gt;\u202e<script>{_RUN}</script>",
]  # fmt: skip


def store(num_latents: int, texts: list[str], num_contexts: int = 12, prompt: str = "") -> ContextStore:
    """A contexts/v1 store of made-up figures over these texts, in turn."""
    rows, summaries = [], []
    for latent in range(num_latents):
        for rank in range(num_contexts):
            text = texts[(latent * num_contexts + rank) % len(texts)]
            place, top = ("rewarded", "sentence")[rank % 2], rank < num_contexts // 2
            rows.append(
                {
                    "latent": latent, "place": place, "kind": "top" if top else "decile", "decile": -1 if top else rank % 10 + 1,
                    "rank": rank // 2, "activation": 3.0 - rank / num_contexts, "text_id": f"p{rank}/chosen", "pair_id": f"p{rank}",
                    "side": "chosen", "prompt_hash": "0", "prompt": prompt or text, "text": text,
                    "span_start": 1 if len(text) > 8 else -1, "span_end": len(text) - 2 if len(text) > 8 else -1,
                }
            )  # fmt: skip
        counts = [latent % 7 + i if 18 < i < 26 else 0 for i in range(40)]
        for place in ("rewarded", "sentence"):
            summaries.append(
                {
                    "latent": latent, "place": place, "count": 9, "total": 90, "density": 0.1, "max": 3.0, "mean": 1.5,
                    "quantiles": [1.0] * 9, "chosen_mean": 0.5 + latent % 3, "rejected_mean": 0.25, "weight": 0.1,
                    "histogram": counts, "chosen_histogram": counts, "rejected_histogram": counts,
                }
            )  # fmt: skip
    return ContextStore(
        None,  # type: ignore[arg-type]
        pa.Table.from_pylist(rows, schema=LATENT_CONTEXTS_TABLE),
        pa.Table.from_pylist(summaries, schema=LATENT_SUMMARIES_TABLE),
        {"rows": 90, "model": "0" * 32},
    )
