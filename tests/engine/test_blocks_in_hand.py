"""How many blocks an actor holds, as Ray Data is asked for it. A GPU waits for its next block if there are fewer."""

from types import SimpleNamespace

import pytest

from sarm.engine.ray import passes


@pytest.mark.parametrize(("use_gpu", "blocks"), [(True, 4), (False, 2)])
def test_an_actor_has_the_next_blocks_in_hand(use_gpu, blocks, monkeypatch):
    asked = {}
    pool = SimpleNamespace(map_batches=lambda actor, **options: asked.update(options))
    monkeypatch.setattr(passes.ray.data, "from_arrow", lambda tables: pool)
    work = SimpleNamespace(columns=(), keep=None, outputs={}, actor=None, arguments={})
    missing = [SimpleNamespace(number=number) for number in range(8)]
    passes._results(work, missing, threads=1, num_actors=2, use_gpu=use_gpu)
    strategy = asked["compute"]
    assert strategy.max_tasks_in_flight_per_actor == blocks
    assert strategy.max_concurrent_calls_per_actor == blocks
    assert strategy.enable_true_multi_threading
    assert asked["num_gpus"] == (1 if use_gpu else None)
