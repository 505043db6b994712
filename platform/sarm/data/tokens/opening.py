"""Where a chat template opens an answer: the token ids by which that place is known in any conversation."""

from collections.abc import Callable, Sequence

from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.tokens.control_tokens import ControlTokens, Rendered

# Beginnings and ends that merge with what the template writes beside them, each in its way.
_ANSWERS = ("Az9", "\nAz9", "\n\nAz9", " Az9", "  Az9", "1", "(", "é", "\u4e00", "-")
_QUESTIONS = ("Qz7", "Qz7?", "Qz7 ", "Qz7\n", "7")

Ids = tuple[int, ...]
Apply = Callable[[Sequence[Message], bool], str]


def opening_of(
    apply: Apply, control: ControlTokens, template: str, end_of_turn_id: int, is_blank: Callable[[int], bool]
) -> Ids:
    """The ids that every answer to a user follows, whatever it begins with, and that the user's turn does not have.

    `apply` renders turns, and with True behind them the opening of an answer. Empty if the template refuses such conversations, or marks the
    place by nothing of its own.
    """

    def rendered(question: str, answer: str | None, opened: bool = False) -> Rendered:
        turns = [{"role": "user", "content": question}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return control.render(turns, lambda turns: apply(turns, opened), template)

    def between(question: str, answer: str) -> tuple[Ids, Ids]:
        """Ids of the tokens up to the end of the question, and of those from there to the beginning of the answer."""
        one = rendered(question, answer)
        start = one.text.rfind(answer.strip())
        end = one.text.rfind(question.strip(), 0, max(start, 0)) + len(question.strip())
        if start < 0 or end < len(question.strip()):
            raise ConversationError("the template does not write what it is given")
        (found,) = control.encode([one], offsets=True)
        spans = list(zip(found.ids, found.offsets, strict=True))
        return tuple(i for i, (a, _) in spans if a < end), tuple(i for i, (a, b) in spans if end <= a < b <= start)

    def generation_prompt() -> Ids:
        closed, opened = rendered(_QUESTIONS[0], None), rendered(_QUESTIONS[0], None, True)
        if not opened.text.startswith(closed.text):
            return ()
        (found,) = control.encode([opened], offsets=True)
        return tuple(i for i, (a, _) in zip(found.ids, found.offsets, strict=True) if a >= len(closed.text))

    try:
        asked, whole = between(_QUESTIONS[0], _ANSWERS[0])
        by_answer = [between(_QUESTIONS[0], answer)[1] for answer in _ANSWERS]
        by_question = [between(question, _ANSWERS[0])[1] for question in _QUESTIONS]
        offered = generation_prompt()
    except ConversationError:
        return ()

    def tells(ids: Ids) -> bool:
        return bool(ids) and ids[-1] != end_of_turn_id and not _has(asked, ids)

    # What the template offers for an answer to be generated, as far as every answer has it.
    kept = next((n for n in range(len(offered), 0, -1) if all(_has(ids, offered[:n]) for ids in by_answer)), 0)
    if tells(found := _without_blanks(offered[:kept], is_blank)):
        return found
    # Some templates offer nothing: then what stands before every answer, from the control token on that makes it unlike a user's turn.
    head = _common_beginning(by_answer)
    behind = len(whole) - len(head)
    shared = _common_beginning([ids[: len(ids) - behind][::-1] for ids in by_question])[::-1]
    shared = _without_blanks(shared, is_blank)
    starts = [n for n in range(len(shared) - 1, -1, -1) if shared[n] in control.ids]
    return next((shared[n:] for n in starts if tells(shared[n:])), shared if tells(shared) else ())


def _without_blanks(ids: Ids, is_blank: Callable[[int], bool]) -> Ids:
    """Without white space at its ends, which merges with what a question ends and an answer begins with."""
    while ids and is_blank(ids[-1]):
        ids = ids[:-1]
    while ids and is_blank(ids[0]):
        ids = ids[1:]
    return ids


def _has(ids: Ids, part: Ids) -> bool:
    return any(ids[n : n + len(part)] == part for n in range(len(ids) - len(part) + 1))


def _common_beginning(lists: Sequence[Ids]) -> Ids:
    first = lists[0]
    length = next(
        (n for n in range(len(first)) if any(ids[n : n + 1] != first[n : n + 1] for ids in lists)), len(first)
    )
    return first[:length]
