"""Frameworks' own clients against a server that has twice as much to do as it holds: a step of 256 rollouts finishes, and every reward is right.

They are no locked dependencies: `make test-clients` sets up an environment that has them.
"""

import ast
import asyncio
import importlib.util
import itertools
import os
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import uvicorn
from tests.serve.asked import PROMPT, conversation, readings, text_of
from tests.serve.conftest import MEAN, STD, served  # noqa: F401

from sarm.passes.reader import Reader
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.settings.serving import Serving

NUM = 256
# What waits at most, and how long the whole step takes to read.
HELD_SECONDS, WORK_SECONDS = 2.0, 4.0
LLAMA_FACTORY = Path(sys.prefix) / "llamafactory" / "llamafactory" / "train" / "ppo" / "ppo_utils.py"
SLIME = Path(os.environ.get("SLIME", "/nowhere")) / "slime" / "rollout" / "rm_hub" / "__init__.py"
ANSWERS = [f"{number} seeds grow slowly, {'very ' * (number % 7)}slowly" for number in range(NUM)]
TEXTS = [text_of(conversation(answer)).rstrip() for answer in ANSWERS]
OPENED = text_of(PROMPT, opened=True)


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed here: make test-clients")  # fmt: skip


@pytest.fixture(scope="module")
def expected(served):  # noqa: F811
    return [(one.reward - MEAN) / STD for one in readings(served, [conversation(answer) for answer in ANSWERS])]


@pytest.fixture
def busy(served, monkeypatch):  # noqa: F811
    """A server that reads so slowly, and how many requests it has refused as too many."""
    read = Reader.read

    def slowly(self, rows, cost=None, beat=None, **options):
        rows = list(rows)
        found = read(self, rows, cost, beat, **options)
        time.sleep(len(found) * WORK_SECONDS / NUM)
        return found

    monkeypatch.setattr(Reader, "read", slowly)
    service = load_service(Serving(model=served, threads=1, max_wait=HELD_SECONDS, batch_tokens=512, cached=0))
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", lambda: service.metrics.text().decode()
    server.should_exit = True
    thread.join(30)
    service.close()


def overloaded(metrics: str, route: str) -> bool:
    return f'sarm_requests_total{{route="{route}",status="503"}}' in metrics


def function_of(path: Path, *names: str, **members) -> types.SimpleNamespace:
    """Functions out of a file whose module wants packages that they do not."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if getattr(node, "name", "") in names]
    assert len(body) == len(names)
    found = {"_shared_session": None, **members}
    exec(compile(ast.Module(body, []), str(path), "exec", flags=__import__("__future__").annotations.compiler_flag), found)  # fmt: skip
    return types.SimpleNamespace(**found)


@needs("openrlhf")
def test_openrlhf(busy, expected):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    place, metrics = busy
    client = object.__new__(SingleTurnAgentExecutor)
    client.reward_endpoints = [f"http://{place}/get_reward?run=openrlhf"]
    client._reward_endpoint_cycle = itertools.cycle(client.reward_endpoints)

    async def step():
        return await asyncio.gather(*(client._fetch_rewards_via_http([text], [OPENED], [None]) for text in TEXTS))

    found = asyncio.run(step())
    assert [one[0]["rewards"][0] for one in found] == pytest.approx(expected, abs=1e-4)
    assert overloaded(metrics(), "/get_reward")


@needs("verl")
@pytest.mark.parametrize(("engine", "route"), [("vllm", "/classify"), ("sglang", "/v1/embeddings")])
def test_verl(busy, expected, tiny_chat, engine, route):
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    place, metrics = busy
    worker = object.__new__(RewardLoopWorker)
    worker.config = OmegaConf.create({"reward": {"reward_model": {"rollout": {"name": engine}, "model_path": "sarm"}}})
    worker.reward_router_address = place
    worker.input_tokenizer = worker.reward_model_tokenizer = tiny_chat.tokenizer

    def sample(answer):
        ids = tiny_chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
        raw = np.empty(1, object)
        raw[0] = PROMPT
        tensors = {"responses": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return DataProto.from_dict(tensors=tensors, non_tensors={"raw_prompt": raw})

    async def step():
        return await asyncio.gather(*(worker.compute_score_disrm(sample(answer)) for answer in ANSWERS))

    assert [one["reward_score"] for one in asyncio.run(step())] == pytest.approx(expected, abs=1e-4)
    assert overloaded(metrics(), route)


@needs("verl")
def test_verls_reward_manager(busy, expected, tiny_chat, monkeypatch):
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto

    from sarm.integrations.source import SOURCE, shared_rewards
    from sarm.integrations.verl import SarmRewardManager

    monkeypatch.setenv(SOURCE, f"http://{busy[0]}")
    shared_rewards.cache_clear()
    manager = SarmRewardManager(OmegaConf.create({}), tiny_chat.tokenizer, None)

    def sample(answer):
        ids = [*tiny_chat.tokenizer(answer, add_special_tokens=False)["input_ids"], tiny_chat.tokenizer.eos_token_id]
        raw = np.empty(1, object)
        raw[0] = PROMPT
        tensors = {"responses": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return DataProto.from_dict(tensors=tensors, non_tensors={"raw_prompt": raw})

    async def step():
        return await asyncio.gather(*(manager.run_single(sample(answer)) for answer in ANSWERS[:32]))

    assert [one["reward_score"] for one in asyncio.run(step())] == pytest.approx(expected[:32], abs=1e-4)
    shared_rewards.cache_clear()


@pytest.mark.skipif(not LLAMA_FACTORY.exists(), reason="LLaMA-Factory is not installed here: make test-clients")
def test_llama_factory(served, expected):  # noqa: F811
    """It has one request for a batch, no status check and no time limit: it is held."""
    import json

    import requests
    import torch

    client = function_of(LLAMA_FACTORY, "get_rewards_from_server", requests=requests, json=json, torch=torch)
    service = load_service(Serving(model=served, threads=1, cached=0))
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = client.get_rewards_from_server(f"http://127.0.0.1:{port}/v1/score/evaluation", TEXTS)
    server.should_exit = True
    thread.join(30)
    service.close()
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not SLIME.exists(), reason="slime is in no package: pass SLIME=FOLDER of a checkout")
def test_slime(busy, expected):
    import logging
    import random

    import aiohttp

    members = {"aiohttp": aiohttp, "asyncio": asyncio, "random": random, "logger": logging.getLogger("slime"), "Sample": object}  # fmt: skip
    client = function_of(SLIME, "_get_shared_session", "remote_rm", **members)
    place, _ = busy
    args = types.SimpleNamespace(rm_url=f"http://{place}/slime?run=slime")
    samples = [types.SimpleNamespace(prompt=OPENED, response=answer, label=None) for answer in ANSWERS]

    async def step():
        return await asyncio.gather(*(client.remote_rm(args, one) for one in samples))

    assert asyncio.run(step()) == pytest.approx(expected, abs=1e-4)
    # Its 64 connections are held: they never are too many.


@needs("trl")
def test_trl_trains_on_a_servers_rewards_and_the_watch_sees_its_steps(served, tmp_path, tiny_folder):  # noqa: F811
    import subprocess

    out = tmp_path / "grpo"
    command = [sys.executable, "docs/examples/trl_grpo.py", "--reward", str(served), "--policy", str(tiny_folder), "--steps", "3", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert all("reward" in line and "sarm/truncated" in line for line in lines)
