"""The page on which people try a served model. It is a constant: the model and its texts come when it asks the server."""

import functools

from sarm.report.render import TEMPLATES, html


@functools.cache
def try_page() -> str:
    """One page for every model, which asks the server that it came from."""
    script = (TEMPLATES / "try.js").read_text(encoding="utf-8")
    return html("try", title="Try the reward model", facts={}, script=script, asks_server=True)
