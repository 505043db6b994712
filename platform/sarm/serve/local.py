"""Rewards of a model in this process, by the same engine and the same rules as the server's."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sarm.client.rewards import Body, RewardError, Rewards
from sarm.serve.engine import OverloadedError
from sarm.serve.faults import RequestError
from sarm.serve.loading import load_service
from sarm.serve.own_route import rewards
from sarm.serve.schemas import Query, RewardsRequest
from sarm.settings.serving import Serving


class LocalRewards(Rewards):
    """A SARM's folder, loaded here. `serving` are settings of `jobs/serve.py`; options as `Rewards` takes them.

    Raises UserError for a folder that is torn or holds no SARM.
    """

    def __init__(self, model: str | Path, *, serving: dict[str, Any] | None = None, **options: Any):
        super().__init__(**options)
        # A training run waits for its rewards, however long they take.
        settings = Serving(model=Path(model), **{"max_wait": 86_399.0, **(serving or {})})
        self._service = load_service(settings)

    def close(self) -> None:
        """End its engine."""
        self._service.close()

    def _send(self, body: Body) -> Body:
        return _finished(self._asend(body))

    async def _asend(self, body: Body) -> Body:
        try:
            return await rewards(self._service, RewardsRequest.model_validate(body), Query())
        except ValidationError as error:
            raise RewardError(f"bad_request: {error}", code="bad_request") from error
        except RequestError as error:
            raise RewardError(f"{error.code}: {error.told}", status=error.status, code=error.code, item=error.item) from error  # fmt: skip
        except OverloadedError as error:
            raise RewardError(str(error), status=503, code="overloaded") from error


def _finished(work: Coroutine[Any, Any, Body]) -> Body:
    """The outcome of a coroutine, also where a loop runs in this thread already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
