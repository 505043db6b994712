"""The bodies that frameworks send, field for field, and what they read of the answer."""

import math

import pytest
from tests.serve.asked import ANSWERS, PROMPT, conversation, readings, text_of
from tests.serve.conftest import MEAN, STD

TEXTS = [text_of(conversation(answer)).rstrip() for answer in ANSWERS]


@pytest.fixture(scope="module")
def expected(served):
    return [(one.reward - MEAN) / STD for one in readings(served, [conversation(answer) for answer in ANSWERS])]


def post(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


class TestOpenRlhf:
    def test_rewards_scores_and_logs_come_in_the_order_of_the_queries(self, client, expected):
        body = {"query": TEXTS, "prompts": [text_of(PROMPT, opened=True)] * 3, "labels": [None, "a", None]}
        found = post(client, "/get_reward", body)
        assert found.keys() == {"rewards", "scores", "extra_logs"}
        assert found["rewards"] == pytest.approx(expected, abs=1e-4)
        assert found["scores"] == pytest.approx([sigmoid(value) for value in expected], abs=1e-4)
        assert all(0 <= score <= 1 for score in found["scores"])

    def test_extra_logs_hold_numbers_under_the_same_names_whatever_was_sent(self, client):
        one = post(client, "/get_reward", {"query": TEXTS[:1], "prompts": ["p"], "labels": [None]})["extra_logs"]
        other = post(client, "/get_reward", {"query": [TEXTS[1][:-12]]})["extra_logs"]
        assert one.keys() == other.keys()
        assert all(isinstance(value, float) and len(values) == 1 for values in one.values() for value in values)
        assert (one["sarm_truncated"], other["sarm_truncated"]) == ([0.0], [1.0])

    def test_an_empty_query_is_answered_with_empty_lists(self, client):
        found = post(client, "/get_reward", {"query": [], "prompts": [], "labels": []})
        assert (found["rewards"], found["scores"]) == ([], [])
        assert all(values == [] for values in found["extra_logs"].values())

    def test_what_an_answer_spells_is_text_where_the_prompt_is_sent(self, client, served):
        prompt = text_of(PROMPT, opened=True)
        spelled = "no.<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\nyou are welcome"
        found = post(client, "/get_reward?scale=raw", {"query": [f"{prompt}{spelled}<|im_end|>"], "prompts": [prompt]})
        (expected,) = readings(served, [conversation(spelled)])
        assert found["rewards"] == [pytest.approx(expected.reward, abs=1e-4)]
        assert found["extra_logs"]["sarm_special_tokens_in_content"] == [1.0]

    def test_what_cannot_be_sent_in_a_header_stands_in_the_address(self, client, expected):
        body = {"query": TEXTS[:1], "prompts": ["p"], "labels": [None]}
        raw = post(client, "/get_reward?scale=raw", body)["rewards"][0]
        assert (raw - MEAN) / STD == pytest.approx(expected[0], abs=1e-4)
        assert post(client, "/get_reward?variant=even_off", body)["rewards"] != [pytest.approx(expected[0], abs=1e-4)]
        assert client.post("/get_reward?variant=nobody", json=body).status_code == 404
        assert client.post("/get_reward?scael=raw", json=body).status_code == 422
        assert client.post("/get_reward?scale=raw&scale=raw", json=body).status_code == 422


class TestInferenceServers:
    def test_vllms_classify(self, client, expected):
        """As verl sends it, and reads `data[-1].probs[-1]`."""
        found = post(client, "/classify", {"model": "sarm", "input": TEXTS[0], "use_activation": False})
        assert found.keys() >= {"id", "object", "created", "model", "data", "usage"}
        assert (found["object"], found["model"]) == ("list", "sarm")
        assert found["data"] == [{"index": 0, "label": "reward", "probs": [pytest.approx(expected[0], abs=1e-4)], "num_classes": 1}]  # fmt: skip
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
        many = post(client, "/classify", {"model": "sarm", "input": TEXTS, "use_activation": False})["data"]
        assert [(one["index"], one["probs"][0]) for one in many] == [(n, pytest.approx(value, abs=1e-4)) for n, value in enumerate(expected)]  # fmt: skip

    @pytest.mark.parametrize("route", ["/classify", "/v1/embeddings"])
    def test_a_text_may_lack_the_token_that_begins_it(self, client, expected, tiny_chat, route):
        """verl takes off the tokenizer's BOS, which is here, as in SmolLM2, the token that opens a turn."""
        assert tiny_chat.tokenizer.bos_token == "<|im_start|>"
        body = {"input": [text.removeprefix("<|im_start|>") for text in TEXTS], "use_activation": False}
        found = post(client, route, body)["data"]
        values = [one["probs" if route == "/classify" else "embedding"][0] for one in found]
        assert values == pytest.approx(expected, abs=1e-4)
        assert client.post(route, json={"input": "start|>" + TEXTS[0]}).status_code == 422

    def test_vllms_activation_is_on_unless_it_is_switched_off(self, client, expected):
        for options in ({}, {"use_activation": None}, {"use_activation": True}):
            found = post(client, "/classify", {"model": "sarm", "input": TEXTS[0], **options})
            assert found["data"][0]["probs"] == [pytest.approx(sigmoid(expected[0]), abs=1e-4)]

    def test_vllm_takes_token_ids_and_messages(self, client, expected, tiny_chat):
        ids = [one.ids for one in tiny_chat.encode([conversation(answer) for answer in ANSWERS])]
        options = {"model": "sarm", "use_activation": False}
        assert post(client, "/classify", {**options, "input": ids[0]})["data"][0]["probs"] == [pytest.approx(expected[0], abs=1e-4)]  # fmt: skip
        many = post(client, "/classify", {**options, "input": ids})["data"]
        assert [one["probs"][0] for one in many] == pytest.approx(expected, abs=1e-4)
        chat = post(client, "/classify", {**options, "messages": conversation(ANSWERS[1])})
        assert chat["data"][0]["probs"] == [pytest.approx(expected[1], abs=1e-4)]

    def test_vllms_pooling(self, client, expected):
        found = post(client, "/pooling", {"model": "m", "task": "classify", "input": TEXTS, "use_activation": False})
        assert found["object"] == "list"
        assert [(one["index"], one["object"]) for one in found["data"]] == [(n, "pooling") for n in range(3)]
        assert [one["data"] for one in found["data"]] == [[pytest.approx(value, abs=1e-4)] for value in expected]
        assert client.post("/pooling", json={"task": "embed", "input": TEXTS[0]}).status_code == 400

    def test_sglangs_embeddings_are_without_a_sigmoid(self, client, expected):
        """As verl sends it, and reads `data[-1].embedding[-1]`."""
        found = post(client, "/v1/embeddings", {"model": "sarm", "input": TEXTS[2]})
        assert found["data"] == [{"index": 0, "object": "embedding", "embedding": [pytest.approx(expected[2], abs=1e-4)]}]  # fmt: skip

    def test_sglangs_classify_answers_one_text_with_one_object(self, client, expected, tiny_chat):
        one = post(client, "/classify", {"text": TEXTS[0]})
        assert one["embedding"] == [pytest.approx(expected[0], abs=1e-4)]
        assert one["meta_info"]["prompt_tokens"] > 0
        many = post(client, "/classify", {"text": TEXTS})
        assert [entry["embedding"][0] for entry in many] == pytest.approx(expected, abs=1e-4)
        ids = tiny_chat.encode([conversation(ANSWERS[0])])[0].ids
        assert post(client, "/classify", {"input_ids": ids})["embedding"] == [pytest.approx(expected[0], abs=1e-4)]

    def test_teis_predict(self, client, expected):
        one = post(client, "/predict", {"inputs": TEXTS[0], "raw_scores": True})
        assert one == [{"score": pytest.approx(expected[0], abs=1e-4), "label": "reward"}]
        many = post(client, "/predict", {"inputs": [[text] for text in TEXTS], "raw_scores": True})
        assert [entry[0]["score"] for entry in many] == pytest.approx(expected, abs=1e-4)
        squashed = post(client, "/predict", {"inputs": TEXTS[0]})
        assert squashed[0]["score"] == pytest.approx(sigmoid(expected[0]), abs=1e-4)

    def test_teis_pair_is_a_prompt_and_its_answer(self, client, expected):
        pair = [PROMPT[0]["content"], ANSWERS[0]]
        assert post(client, "/predict", {"inputs": pair, "raw_scores": True})[0]["score"] == pytest.approx(expected[0], abs=1e-4)  # fmt: skip
        pairs = [[PROMPT[0]["content"], answer] for answer in ANSWERS]
        many = post(client, "/predict", {"inputs": pairs, "raw_scores": True})
        assert [entry[0]["score"] for entry in many] == pytest.approx(expected, abs=1e-4)

    def test_tei_cuts_only_where_it_is_asked_to_and_never_the_end(self, client, served):
        long = "it grows. " * 200 + "yes."
        pair = [PROMPT[0]["content"], long]
        refused = client.post("/predict", json={"inputs": pair})
        assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
        found = post(client, "/predict?scale=raw", {"inputs": pair, "truncate": True, "raw_scores": True})
        assert found[0]["score"] == pytest.approx(readings(served, [conversation(long)])[0].reward, abs=1e-4)
        right = client.post("/predict", json={"inputs": pair, "truncate": True, "truncation_direction": "right"})
        assert right.status_code == 422


class TestOthers:
    def test_llama_factory_reads_scores(self, client, expected):
        found = post(client, "/v1/score/evaluation", {"model": "model", "messages": TEXTS})
        assert found["scores"] == pytest.approx(expected, abs=1e-4)
        assert (found["object"], found["model"]) == ("score.evaluation", "model")

    def test_slime_reads_the_whole_answer_as_the_reward(self, client, expected):
        body = {"prompt": text_of(PROMPT, opened=True), "response": ANSWERS[0], "label": None}
        assert post(client, "/slime", body) == pytest.approx(expected[0], abs=1e-4)
        assert post(client, "/slime", {**body, "response": ANSWERS[0] + "<|im_end|>"}) == pytest.approx(expected[0], abs=1e-4)  # fmt: skip
        assert post(client, "/slime", {**body, "prompt": PROMPT}) == pytest.approx(expected[0], abs=1e-4)
        keyed = post(client, "/slime?form=object", body)
        assert keyed["reward"] == pytest.approx(expected[0], abs=1e-4)
        assert not keyed["truncated"], "a response without its end of turn is what slime sends"
