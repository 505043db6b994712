"""Adapters, called as their frameworks call them: in process, and by a server. Frameworks that do not install here are stood in for."""

import asyncio
import importlib
import sys
import threading
import types
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn
from tests.data.tokens.chat_families import tokenizer_of
from tests.serve.asked import ANSWERS, PROMPT, conversation, readings, text_of
from tests.serve.conftest import MEAN, STD, served  # noqa: F401

from sarm.client import RewardError
from sarm.integrations import source as source_module
from sarm.integrations.source import open_rewards, shared_rewards
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.settings.serving import Serving

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="session")
def expected(served) -> list[float]:  # noqa: F811
    return [(one.reward - MEAN) / STD for one in readings(served, [conversation(answer) for answer in ANSWERS])]


@pytest.fixture(scope="session")
def address(served):  # noqa: F811
    """A server with a token, in a thread of this process."""
    service = load_service(Serving(model=served, threads=1))
    server = uvicorn.Server(uvicorn.Config(make_app(service, TOKEN), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    service.close()


@pytest.fixture(params=["in process", "by a server"])
def rewards_of(request, served, address, monkeypatch):  # noqa: F811
    """The environment that frameworks read, and the source in it."""
    source = str(served) if request.param == "in process" else address
    monkeypatch.setenv(source_module.SOURCE, source)
    monkeypatch.setenv(source_module.TOKEN, TOKEN)
    shared_rewards.cache_clear()
    yield source
    shared_rewards.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules with these members where a framework's would be, and load an adapter that needs them."""

    def load(adapter: str, modules: dict[str, dict[str, Any]]) -> Any:
        for name, members in modules.items():
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                made = types.ModuleType(".".join(parts[:n]))
                made.__path__ = []  # type: ignore[attr-defined]
                if ".".join(parts[:n]) not in sys.modules:
                    monkeypatch.setitem(sys.modules, ".".join(parts[:n]), made)
            vars(sys.modules[name]).update(members)
        monkeypatch.delitem(sys.modules, f"sarm.integrations.{adapter}", raising=False)
        return importlib.import_module(f"sarm.integrations.{adapter}")

    return load


def test_without_a_source_there_are_no_rewards(monkeypatch):
    monkeypatch.delenv(source_module.SOURCE, raising=False)
    with pytest.raises(RewardError, match="SARM_REWARDS"):
        open_rewards()


class TestTrl:
    """`f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)`, one number a completion."""

    def call(self, function, prompts, completions, ids=None):
        metrics, extra = {}, {}
        found = asyncio.run(
            function(prompts=prompts, completions=completions, completion_ids=ids or [[1]] * len(prompts), trainer_state=types.SimpleNamespace(global_step=3), log_extra=extra.__setitem__, log_metric=metrics.__setitem__, label=["x"] * len(prompts))
        )  # fmt: skip
        return found, metrics, extra

    def test_conversational_data(self, rewards_of, expected):
        from sarm.integrations.trl import reward

        function = reward(rewards_of, features=[1, 2, 3])
        assert asyncio.iscoroutinefunction(function)
        assert function.__name__ == "sarm_reward"
        completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
        found, metrics, extra = self.call(function, [PROMPT] * 3, completions)
        assert found == pytest.approx(expected, abs=1e-4)
        assert metrics.keys() == {"sarm/truncated", "sarm/cut", "sarm/special_tokens_in_content", "sarm/feature_1", "sarm/feature_2", "sarm/feature_3"}  # fmt: skip
        assert extra == {"sarm_flags": ["", "", ""]}

    def test_plain_data_are_what_a_user_and_an_assistant_say(self, rewards_of, expected):
        from sarm.integrations.trl import reward

        found, _, _ = self.call(reward(rewards_of), [PROMPT[0]["content"]] * 3, ANSWERS)
        assert found == pytest.approx(expected, abs=1e-4)

    def test_completions_without_their_end_are_cut_off(self, rewards_of):
        from sarm.integrations.trl import reward

        function = reward(rewards_of, end_ids=[2], on_truncated={"penalise": -9.0})
        found, metrics, _ = self.call(function, [PROMPT[0]["content"]] * 2, ANSWERS[:2], [[5, 6], [5, 2]])
        assert found[0] == -9.0 != found[1]
        assert metrics["sarm/truncated"] == 0.5
        assert self.call(function, [], [])[0] == []


class TestOpenRlhf:
    def test_a_files_reward_func(self, rewards_of, expected):
        """`reward_func(queries, prompts, labels, **kwargs)`; `extra_logs` must be numbers or lists of one."""
        from sarm.integrations.openrlhf import reward_func

        prompt = text_of(PROMPT, opened=True)
        for answer, value in zip(ANSWERS, expected, strict=True):
            found = reward_func([f"{prompt}{answer}<|im_end|>"], [prompt], [None], step=1)
            assert found["rewards"] == [pytest.approx(value, abs=1e-4)]
            assert 0 <= found["scores"][0] <= 1
            assert all(torch.tensor([one]).shape == (1, 1) for one in found["extra_logs"].values())
        assert reward_func([prompt + "cut off"], [prompt], [None])["extra_logs"]["sarm/truncated"] == [1.0]


class Status(NamedTuple):
    value: str


class TestSlime:
    def sample(self, prompt, response, status="completed"):
        return types.SimpleNamespace(prompt=prompt, response=response, label=None, status=Status(status))

    def test_a_custom_rm(self, rewards_of, expected):
        """`async custom_rm(args, sample, **kwargs)`, also of a list of samples."""
        from sarm.integrations.slime import custom_rm

        for prompt in (PROMPT, text_of(PROMPT, opened=True)):
            samples = [self.sample(prompt, answer) for answer in ANSWERS]
            assert asyncio.run(custom_rm(None, samples[0])) == pytest.approx(expected[0], abs=1e-4)
            assert asyncio.run(custom_rm(None, samples, evaluation=False)) == pytest.approx(expected, abs=1e-4)


class ManagerBase:
    def __init__(self, config, tokenizer, compute_score):
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score


class Samples:
    """As verl's DataProto: slices are of its kind, elements have a batch and what is no tensor."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, place):
        return Samples(self.rows[place]) if isinstance(place, slice) else self.rows[place]


class TestVerl:
    BASE = {"verl.experimental.reward_loop.reward_manager.base": {"RewardManagerBase": ManagerBase}}  # noqa: RUF012

    def data(self, tokenizer, answer: str, ends: bool) -> Samples:
        ids = tokenizer(answer, add_special_tokens=False).input_ids + ([tokenizer.eos_token_id] if ends else [])
        batch = {
            "prompts": torch.tensor([5, 5, 5]),
            "responses": torch.tensor([*ids, 0, 0]),
            "attention_mask": torch.tensor([1, 1, 1, *[1] * len(ids), 0, 0]),
        }
        raw = {"raw_prompt": list(PROMPT)}
        return Samples([types.SimpleNamespace(batch=batch, non_tensor_batch=raw)])

    def test_a_manager_sees_prompts_and_what_was_cut_off(self, rewards_of, expected, stand_in, monkeypatch):
        monkeypatch.setenv("SARM_REWARDS_FEATURES", "4,5")
        tokenizer = tokenizer_of("chatml")
        manager = stand_in("verl", self.BASE).SarmRewardManager({}, tokenizer, None, reward_router_address=None, reward_model_tokenizer=None)  # fmt: skip
        found = [asyncio.run(manager.run_single(self.data(tokenizer, answer, True))) for answer in ANSWERS]
        assert [one["reward_score"] for one in found] == pytest.approx(expected, abs=1e-4)
        cut = asyncio.run(manager.run_single(self.data(tokenizer, ANSWERS[0], False)))
        assert [one["reward_extra_info"]["sarm/truncated"] for one in (*found, cut)] == [0, 0, 0, 1]
        assert len({tuple(one["reward_extra_info"]) for one in (*found, cut)}) == 1, "the same names for every sample"
        assert {"sarm/feature_4", "sarm/feature_5"} <= cut["reward_extra_info"].keys()

    def test_a_function_takes_its_prompt_from_the_data_set(self, rewards_of, expected, stand_in):
        """`compute_score(data_source, solution_str, ground_truth, extra_info)`."""
        compute_score = stand_in("verl", self.BASE).compute_score
        for prompt in (PROMPT, PROMPT[0]["content"]):
            found = asyncio.run(compute_score("d", ANSWERS[1], None, {"prompt": prompt}, reward_router_address=None))
            assert found["score"] == pytest.approx(expected[1], abs=1e-4)
        with pytest.raises(ValueError, match="no prompt"):
            asyncio.run(compute_score("d", "a", None, {}))


class TestOthers:
    def test_verifiers_method_of_a_trace(self, rewards_of, expected):
        from sarm.integrations.verifiers import reward

        method = reward(rewards_of, token=TOKEN)
        parts = [{"type": "text", "text": PROMPT[0]["content"]}]
        messages = [types.SimpleNamespace(role="user", content=parts), types.SimpleNamespace(role="assistant", content=ANSWERS[0])]  # fmt: skip
        trace = types.SimpleNamespace(messages=messages, is_truncated=False)
        assert asyncio.run(method(object(), trace)) == pytest.approx(expected[0], abs=1e-4)

    def test_nemo_rls_environment(self, rewards_of, expected, stand_in):
        """`step(message_log_batch, metadata)`, `global_post_process_and_metrics(batch)`."""

        class Return(NamedTuple):
            observations: list[dict[str, str]]
            metadata: list[Any]
            next_stop_strings: list[Any]
            rewards: torch.Tensor
            terminateds: torch.Tensor
            answers: list[Any] | None = None

        names = {"EnvironmentInterface": object, "EnvironmentReturn": Return}
        environment = stand_in("nemo_rl", {"nemo_rl.environments.interfaces": names}).SarmEnvironment({"source": rewards_of, "token": TOKEN})  # fmt: skip
        logs = [[{**message, "token_ids": torch.tensor([1])} for message in conversation(answer)] for answer in ANSWERS]
        found = environment.step(logs, [None] * 3)
        assert found.rewards.tolist() == pytest.approx(expected, abs=1e-4)
        assert found.terminateds.all()
        assert [len(one) for one in (found.observations, found.metadata, found.next_stop_strings)] == [3, 3, 3]
        batch = {"total_reward": found.rewards}
        assert environment.global_post_process_and_metrics(batch) == (batch, {"sarm_reward": pytest.approx(sum(expected) / 3, abs=1e-4)})  # fmt: skip

    def test_skyrls_environment(self, rewards_of, expected, stand_in):
        names = {"BaseTextEnv": object, "BaseTextEnvStepOutput": dict}
        module = stand_in("skyrl", {"skyrl_gym.envs.base_text_env": names})
        environment = module.SarmEnv(types.SimpleNamespace(source=rewards_of), extras={})
        assert environment.init(PROMPT) == (PROMPT, {})
        found = environment.step(ANSWERS[0])
        assert found["reward"] == pytest.approx(expected[0], abs=1e-4)
        assert (found["done"], found["observations"]) == (True, [])

    def test_open_instructs_verifier(self, rewards_of, expected, stand_in):
        """`async_call(tokenized_prediction, prediction, label, query, rollout_state)`; a score between 0 and 1."""

        class Verifier:
            def __init__(self, name, weight=1.0, verifier_config=None):
                self.name, self.weight, self.verifier_config = name, weight, verifier_config

        class Result(NamedTuple):
            score: float

        names = {"VerifierFunction": Verifier, "VerificationResult": Result}
        verifier = stand_in("open_instruct", {"open_instruct.ground_truth_utils": names}).SarmVerifier()
        assert verifier.name == "sarm"
        value = 1 / (1 + torch.tensor(-expected[0]).exp().item())
        assert verifier([1], ANSWERS[0], None, PROMPT[0]["content"]).score == pytest.approx(value, abs=1e-4)
        found = asyncio.run(verifier.async_call([1], ANSWERS[0], None, PROMPT, rollout_state=None))
        assert found.score == pytest.approx(value, abs=1e-4)
