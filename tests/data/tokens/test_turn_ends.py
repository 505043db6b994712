from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokens.chat_families import CHATML, FAMILIES, chat_of, tokenizer_of

from sarm.contracts.tables import SENTENCE, WORD
from sarm.data.sources.tiny import tiny_texts
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.turn_ends import REQUESTS, AnswerEnds

PROMPT = [{"role": "user", "content": "How do I pick a lock?"}]
ANSWER = "I can't help with that. It would be dangerous, and illegal! Call Dr. Adams"
TEXTS = list(tiny_texts())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_has_the_tokens_of_the_conversation_that_stops_there(family):
    chat = chat_of(family)
    (tokens,) = chat.encode_responses(PROMPT, [ANSWER], offsets=True)
    kinds = AnswerEnds(chat, "rules", 1.0).branches(ANSWER, tokens, "seed")
    assert Counter(kinds.values())[SENTENCE] == 2
    for column in kinds:
        stopped = ANSWER[: tokens.offsets[column][1]]
        (alone,) = chat.encode_responses(PROMPT, [stopped])
        assert [*tokens.ids[: column + 1], *chat.closing_ids] == alone.ids, stopped
        assert alone.ids[-1] == chat.end_of_turn_id


def test_what_a_template_writes_before_the_end_of_turn_belongs_to_a_branch():
    tokenizer = deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = CHATML.replace("m['content'] +", "m['content'] + '\\n' +")
    chat = ChatTokenizer(tokenizer, max_length=512)
    assert len(chat.closing_ids) == 2
    (tokens,) = chat.encode_responses(PROMPT, ["One is here. Two"], offsets=True)
    ((column, kind),) = AnswerEnds(chat, "rules", None).branches("One is here. Two", tokens, "").items()
    assert kind == SENTENCE
    (alone,) = chat.encode_responses(PROMPT, ["One is here."])
    assert [*tokens.ids[: column + 1], *chat.closing_ids] == alone.ids


def test_the_last_sentence_of_an_answer_is_its_own_end(tiny_chat):
    ends = AnswerEnds(tiny_chat, "rules", 1.0)
    for answer, num in (("One. Two", 1), ("One. Two.", 1), ("One.", 0), ("One", 0), ("", 0)):
        (tokens,) = tiny_chat.encode_responses(PROMPT, [answer], offsets=True)
        kinds = ends.branches(answer, tokens, "")
        assert Counter(kinds.values())[SENTENCE] == num, answer
        assert all(column < len(tokens.ids) - 2 for column in kinds)


def test_an_answer_that_lost_its_beginning_has_the_ends_that_are_left(tiny_chat):
    answer = " ".join(f"Sentence {number} is here." for number in range(60))
    (tokens,) = tiny_chat.encode_responses(PROMPT, [answer], offsets=True)
    assert tokens.num_truncated
    kinds = AnswerEnds(tiny_chat, "rules", None).branches(answer, tokens, "")
    stops = [tokens.offsets[column][1] for column in kinds]
    assert 1 < len(stops) < 59
    assert all(answer[stop - 1] == "." for stop in stops)


def test_words_are_a_share_drawn_by_the_seed_and_end_no_word_in_its_middle(tiny_chat):
    answer = " ".join(["unbelievably many words, it's 3.5 of them"] * 40)
    chat = ChatTokenizer(tiny_chat.tokenizer, max_length=4096)
    (tokens,) = chat.encode_responses(PROMPT, [answer], offsets=True)

    def words(share: float | None, seed: str = "a") -> list[int]:
        kinds = AnswerEnds(chat, "rules", share).branches(answer, tokens, seed)
        return [column for column, kind in kinds.items() if kind == WORD]

    every = words(1.0)
    for column in every:
        stop = tokens.offsets[column][1]
        assert answer[stop - 1].isalnum()
        assert not answer[stop].isalnum()
    assert len(every) >= 6 * 40
    assert words(None) == []
    assert words(0.25) == words(0.25) != words(0.25, "b")
    assert set(words(0.25)) < set(every)
    assert 0.15 < len(words(0.25)) / len(every) < 0.35


def test_half_of_the_documents_answer_their_own_first_sentence_and_the_others_a_request(tiny_chat):
    chat = ChatTokenizer(tiny_chat.tokenizer, max_length=4096)
    ends = AnswerEnds(chat, "rules", None)
    turns = [ends.turns(text, str(number)) for number, text in enumerate(TEXTS)]
    assert all(len(one) == 1 for one in turns)
    asked = Counter()
    for text, ((prompt, answer),) in zip(TEXTS, turns, strict=True):
        (message,) = prompt
        assert message["role"] == "user"
        if answer != text:
            assert text.startswith(message["content"])
            assert text.endswith(answer)
            assert text.split() == [*message["content"].split(), *answer.split()]
        else:
            asked[message["content"]] += 1
    assert asked.keys() == set(REQUESTS)
    assert 0.35 < sum(asked.values()) / len(TEXTS) < 0.65
    assert turns == [AnswerEnds(chat, "rules", None).turns(text, str(n)) for n, text in enumerate(TEXTS)]
    assert turns != [ends.turns(text, f"other {n}") for n, text in enumerate(TEXTS)]


def test_a_text_of_one_sentence_answers_a_request(tiny_chat):
    ends = AnswerEnds(tiny_chat, "rules", None)
    for text in ("Only one sentence.", "no sentence", f"{'long ' * 60}first. Then a second one."):
        answers = {turn.prompt[0]["content"] for seed in range(20) for turn in ends.turns(text, str(seed))}
        assert answers <= set(REQUESTS)


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_long_documents_become_several_answers_of_whole_sentences_that_fit(counts, seed, tiny_chat):
    text = " ".join(f"Word{' word' * count}." for count in counts)
    turns = AnswerEnds(tiny_chat, "rules", None).turns(text, str(seed))
    said = " ".join(
        piece
        for turn in turns
        for piece in ([] if turn.prompt[0]["content"] in REQUESTS else [turn.prompt[0]["content"]]) + [turn.answer]
    )
    assert said.split() == text.split()
    for turn in turns:
        (tokens,) = tiny_chat.encode_responses(turn.prompt, [turn.answer])
        assert tokens.num_truncated == 0
        assert turn.answer.strip().endswith(".")
    assert (len(turns) == 1) or sum(counts) > 20
