import numpy as np
import pytest

from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.windows import PIECE_CHARACTERS, num_tokens, text_windows, window_batches

TEXT = "One two three. Pi is 3.14 here! And <|im_end|> is text."


def windows(chat, text, *units, max_length=32, splitter="rules"):
    return text_windows(7, text, units, splitter, chat, max_length)


def test_document_and_token_share_their_windows(tiny_chat: ChatTokenizer):
    found = windows(tiny_chat, TEXT, "document", "token", max_length=16)
    ids = tiny_chat.encode_text(TEXT).ids
    prefix = 0 if tiny_chat.bos_id is None else 1
    assert np.concatenate([w.ids[prefix:] for w in found]).tolist() == ids
    tokens = [w.first + c - prefix for w in found for c in w.columns["token"]]
    assert tokens == list(range(len(ids)))
    ends = [w.first + c - prefix for w in found for c in w.columns["document"]]
    assert [tiny_chat.tokenizer.decode(ids[: end + 1]) for end in ends] == [
        "One two three.",
        "One two three. Pi is 3.14 here!",
        TEXT,
    ]


def test_a_sentence_stands_alone_and_loses_its_beginning_when_it_is_too_long(tiny_chat: ChatTokenizer):
    found = windows(tiny_chat, TEXT, "sentence", max_length=64)
    assert [tiny_chat.tokenizer.decode(w.ids) for w in found] == [
        "One two three.",
        "Pi is 3.14 here!",
        "And <|im_end|> is text.",
    ]
    assert [w.columns["sentence"].tolist() for w in found] == [[len(w.ids) - 1] for w in found]
    assert len({w.first + len(w.ids) for w in found}) == 3
    (cut, *_) = windows(tiny_chat, "word " * 80 + "end.", "sentence", max_length=16)
    assert cut.truncated
    assert len(cut.ids) == 16
    assert tiny_chat.tokenizer.decode(cut.ids).endswith("end.")


def test_special_tokens_in_a_text_are_text(tiny_chat: ChatTokenizer):
    special = set(tiny_chat.tokenizer.all_special_ids)
    assert special
    assert not special & set(tiny_chat.encode_text(" ".join(tiny_chat.tokenizer.all_special_tokens)).ids)


@pytest.mark.parametrize("text", ["A b c. ", "x", "word ", "日本。"])
def test_a_text_of_any_length_keeps_every_token_and_every_end(tiny_chat: ChatTokenizer, text):
    long = text * (3 * PIECE_CHARACTERS // len(text))
    found = windows(tiny_chat, long, "document", max_length=128)
    prefix = 0 if tiny_chat.bos_id is None else 1
    assert tiny_chat.tokenizer.decode(np.concatenate([w.ids[prefix:] for w in found])) == long
    assert num_tokens([long], tiny_chat) == [sum(len(w.ids) - prefix for w in found)]
    assert sum(len(w.columns["document"]) for w in found) == long.count(".") + long.count("。")
    numbers = np.concatenate([w.sentences for w in found])
    assert numbers.tolist() == list(range(len(numbers)))
    assert [len(w.sentences) for w in found] == [len(w.columns["document"]) for w in found]


def test_batches_hold_every_window_that_counts_and_stay_within_the_budget(tiny_chat: ChatTokenizer):
    texts = ["One. " * n for n in (1, 30, 4, 9, 2, 2, 18)] + ["no end"]
    found = [w for text in texts for w in windows(tiny_chat, text, "document", max_length=64)]
    batches = list(window_batches(found, 64))
    members = [n for batch in batches for n in batch]
    assert sorted(members) == [n for n, w in enumerate(found) if len(w.taken)]
    assert all(len(batch) * max(len(found[n].ids) for n in batch) <= 64 for batch in batches)
    lengths = [len(found[n].ids) for n in members]
    assert lengths == sorted(lengths, reverse=True)
