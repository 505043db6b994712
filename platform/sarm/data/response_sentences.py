"""Where the sentences of a response end, as columns of the tokens that the model sees of the whole conversation."""

from collections.abc import Mapping, Sequence

from sarm.data.chat import ChatTokenizer, Message, Tokens
from sarm.data.packing import Row
from sarm.data.sentences import sentence_end_tokens, sentence_ends


def response_sentence_columns(
    chat: ChatTokenizer, prompt: Sequence[Message], response: str, tokens: Tokens
) -> list[int]:
    """Index in `tokens.ids` of the token that ends each sentence of the response; those that were cut off are left out.

    Empty where the template changes the response's text (one that strips its ends is understood) or no sentence ends.
    """
    text = chat.render([*prompt, {"role": "assistant", "content": response}])
    body = response if response in text else response.strip()
    start = text.rfind(body)
    if start < 0 or not body:
        return []
    encoded = chat.encode_text(text)
    found = sentence_end_tokens([start + end for end in sentence_ends(body)], encoded.offsets)
    # `ids` begin with exactly one BOS where the tokenizer has one, whatever the template wrote.
    num_bos = 0
    while chat.bos_id is not None and encoded.ids[num_bos : num_bos + 1] == [chat.bos_id]:
        num_bos += 1
    has_bos = chat.bos_id is not None
    columns = [token - num_bos + has_bos - tokens.num_truncated for token in found]
    return [column for column in columns if has_bos <= column < len(tokens.ids)]


def take_also(row: Row, columns: Mapping[object, Sequence[int]], lengths: Mapping[object, int]) -> Row:
    """The row with further columns taken of each answer, keyed (key, place): `columns[key]` count in the answer's own tokens.

    An answer's beginning may be shared with others and then stands at the beginning of the row.
    """
    shared = sum(segment == 0 for segment in row.segments) if len(row.taken) > 1 else 0
    taken = list(row.taken)
    for key, last in row.taken:
        start = last - (lengths[key] - 1)
        taken += [((key, i), c if c < shared else start + c) for i, c in enumerate(columns[key])]
    return row._replace(taken=taken)
