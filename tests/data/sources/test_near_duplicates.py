"""Prompts that are nearly each other, against a comparison of everything with everything."""

import random

import pytest

from sarm.data.sources.near_duplicates import SIMILARITY, Near, near_duplicates, similarity, text_of


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=rng.randint(4, 20))) for _ in range(count)]


def test_similarity_is_the_share_of_runs_of_five_characters_in_common():
    assert similarity("abcdef", "abcdef") == 1.0
    assert similarity("abcdef", "bcdefg") == pytest.approx(1 / 3), "abcde bcdef, bcdef cdefg"
    assert similarity("abc", "abc") == 1.0
    assert similarity("abc", "abd") == 0.0
    assert similarity("", "") == 1.0


def test_what_is_found_is_what_a_comparison_of_all_with_all_finds():
    rng = random.Random(1)
    others = dict(enumerate(sentences(0, 200)))
    prompts = {}
    for number in range(60):
        words = others[number].split()
        for place in rng.sample(range(len(words)), max(1, len(words) * (number % 5) // 8)):
            words[place] = words[place][::-1] + "q"
        prompts[f"q{number:02d}"] = " ".join(words)
    wanted = {}
    for name, text in prompts.items():
        best = max((similarity(text, other), -number) for number, other in others.items())
        if best[0] >= SIMILARITY:
            wanted[name] = best[0]
    found = near_duplicates(prompts, ((f"t{number:03d}", text) for number, text in others.items()))
    assert {name: near.similarity for name, near in found.items()} == wanted
    assert 10 < len(wanted) < 60, "there are some of both kinds"
    assert all(near.prompt_id == f"t{int(name[1:]):03d}" for name, near in found.items())


def test_of_equally_similar_prompts_the_smallest_id_is_named_whatever_the_order():
    others = [("b", "how to start a fire"), ("a", "how to start a fire")]
    for order in (others, others[::-1]):
        assert near_duplicates({"q": "how to start a fire"}, order) == {"q": Near("a", 1.0)}
    assert near_duplicates({}, others) == near_duplicates({"q": "something else"}, others) == {}


def test_case_white_space_unicode_form_and_the_system_prompt_do_not_count():
    plain = text_of(user("How do I start a fire?"))
    spelt = text_of(user("how  do i\u00a0START a \uff46ire?\n"))
    assert plain == spelt
    with_system = [{"role": "system", "content": "You are a helpful assistant. " * 20}, *user("How do I start a fire?")]
    assert text_of(with_system) == plain


def test_a_prompt_of_ten_megabytes_is_compared_by_its_ends():
    long = "".join(random.Random(0).choices("abcdefgh ", k=10_000_000))
    text = text_of(user(long))
    assert len(text) == 20_000
    assert near_duplicates({"q": text}, [("t", text_of(user(long + "x")))])["q"].similarity > 0.99
