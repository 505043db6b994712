"""Prompts that are tokenised once: what is read is what was written, of nothing else, and damage is seen."""

import pytest

from sarm.data.ahead import ahead
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PairOfGroup, PromptGroup
from sarm.data.tokens.stored_groups import pair_counts, read_groups, write_groups

IDENTITY = {"pairs": ["a"], "max_length": 8}


def group(number: int) -> PromptGroup:
    responses = [f"r{i}" for i in range(2 + number % 3)]
    tokens = [Tokens([*range(number % 5 + 1), 7 + i], number % 2) for i in range(len(responses))]
    pairs = [PairOfGroup(f"{number}-{i}", i, 0, 0.5 if i % 2 else None, None if i % 2 else "s") for i in range(1, len(responses))]  # fmt: skip
    return PromptGroup(f"p{number}", responses, tokens, pairs)


@pytest.fixture(scope="module")
def groups():
    """More than two batches of rows of the file."""
    return [group(number) for number in range(600)]


def test_what_is_read_is_what_was_written_whichever_way_it_is_asked_for(tmp_path, groups):
    about: dict[str, int] = {}

    def counted():
        for each in groups[:590]:
            about["groups"] = about.get("groups", 0) + 1
            yield each

    write_groups(tmp_path, IDENTITY, {"train": counted(), "validation": groups[590:]}, about)
    stored = read_groups(tmp_path, IDENTITY)
    assert stored is not None
    assert stored.about == {"groups": 590}
    train, validation = stored.groups["train"], stored.groups["validation"]
    assert list(train) == groups[:590]
    assert [train[i] for i in (0, 255, 256, 589, -1)] == [groups[i] for i in (0, 255, 256, 589, 589)]
    assert train[::100] == groups[:590:100]
    assert list(validation) == groups[590:]
    assert pair_counts(train) == [len(each.pairs) for each in groups[:590]] == pair_counts(groups[:590])


@pytest.mark.parametrize("kind", ["other identity", "flipped byte", "cut", "unfinished", "no file", "not json"])
def test_what_is_of_another_training_or_damaged_is_not_read(tmp_path, groups, kind):
    write_groups(tmp_path, IDENTITY, {"train": groups}, {})
    rows, about = tmp_path / "tokens.arrow", tmp_path / "tokens.json"
    content = bytearray(rows.read_bytes())
    if kind == "flipped byte":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif kind == "cut":
        rows.write_bytes(content[:-100])
    elif kind == "unfinished":
        about.unlink()
    elif kind == "no file":
        rows.unlink()
    elif kind == "not json":
        about.write_text("[")
    identity = {**IDENTITY, "max_length": 9} if kind == "other identity" else IDENTITY
    assert read_groups(tmp_path, identity) is None
    write_groups(tmp_path, identity, {"train": groups[:3]}, {})
    again = read_groups(tmp_path, identity)
    assert again is not None
    assert list(again.groups["train"]) == groups[:3]


def test_items_come_in_order_one_ahead_and_a_fault_where_it_is_met():
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number
        raise ValueError("at the fifth")

    given = ahead(items())
    assert next(given) == 0
    assert [next(given) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="at the fifth"):
        next(given)
    assert made == [0, 1, 2, 3]
    assert list(ahead([])) == []


def test_a_caller_that_leaves_early_ends_the_thread():
    given = ahead(iter(range(100)))
    assert next(given) == 0
    given.close()
