import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from sarm.data.sources.tiny import CHAT_TEMPLATE
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer, pin_template
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.settings.model import ModelSettings

START, END = "<|im_start|>", "<|im_end|>"
BOS, HEADER, EOT = "<|bos|>", "<|header|>", "<|eot|>"
LLAMA_LIKE = (
    "{{- bos_token }}"
    "{%- for m in messages %}{{- '<|header|>' + m['role'] + '\\n' + m['content'] | trim + '<|eot|>' }}{%- endfor %}"
)
DATED = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- 'Today: ' + date_string }}" + LLAMA_LIKE.removeprefix("{{- bos_token }}")
)
DATED_DIRECTLY = "{{- bos_token + strftime_now('%A %d') }}" + LLAMA_LIKE.removeprefix("{{- bos_token }}")

QUESTION = {"role": "user", "content": "Is this a question?"}
ANSWER = {"role": "assistant", "content": "It is."}


def bos_writing_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Bytes as tokens; as Llama 3's, it puts BOS before every text, and its template writes one too."""
    specials = [BOS, HEADER, EOT]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *letters])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(specials)
    bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOT, additional_special_tokens=[HEADER]
    )
    tokenizer.chat_template = template
    return tokenizer


def bos_writing_chat(template: str = LLAMA_LIKE, max_length: int = 4096, **options) -> ChatTokenizer:
    return ChatTokenizer(bos_writing_tokenizer(template), max_length=max_length, **options)


@pytest.fixture
def tiny_tokenizer(tiny_folder: Path):
    """A tokenizer of its own, to be spoilt."""
    return AutoTokenizer.from_pretrained(tiny_folder)


def test_a_template_that_writes_bos_itself_gets_none_added(tiny_chat):
    assert tiny_chat.bos_id is None
    (tokens,) = tiny_chat.encode([[QUESTION, ANSWER]])
    start = tiny_chat.tokenizer.convert_tokens_to_ids(START)
    assert tokens.ids[0] == start
    assert tokens.ids.count(start) == 2, "one for each turn"


def test_a_tokenizer_and_a_template_that_both_write_bos_give_one():
    chat = bos_writing_chat()
    assert chat.tokenizer(chat.render([QUESTION, ANSWER])).input_ids[:2] == [0, 0], "twice, if nobody looks after it"
    (tokens,) = chat.encode([[QUESTION, ANSWER]])
    assert tokens.ids.count(chat.bos_id) == 1
    assert tokens.ids[0] == chat.bos_id == 0


def test_a_tokenizer_that_writes_bos_with_a_template_that_does_not_gives_one():
    chat = bos_writing_chat(LLAMA_LIKE.removeprefix("{{- bos_token }}"))
    (tokens,) = chat.encode([[QUESTION, ANSWER]])
    assert tokens.ids.count(0) == 1
    assert tokens.ids == bos_writing_chat().encode([[QUESTION, ANSWER]])[0].ids


def test_a_plain_text_gets_no_bos(tiny_chat):
    for chat in (tiny_chat, bos_writing_chat()):
        text = "Some text. And more."
        ids, offsets = chat.encode_text(text)
        assert chat.bos_id not in ids
        assert chat.tokenizer.decode(ids) == text
        assert (offsets[0][0], offsets[-1][1]) == (0, len(text))


def test_the_rewarded_token_is_the_end_of_turn_though_the_template_adds_a_newline(tiny_chat):
    end = tiny_chat.tokenizer.convert_tokens_to_ids(END)
    assert tiny_chat.render([QUESTION, ANSWER]).endswith(END + "\n")
    (tokens,) = tiny_chat.encode([[QUESTION, ANSWER]])
    assert tokens.ids[-1] == tiny_chat.end_of_turn_id == end


def test_the_end_of_turn_without_a_newline():
    chat = bos_writing_chat()
    assert chat.encode([[QUESTION, ANSWER]])[0].ids[-1] == chat.end_of_turn_id == 2


contents = st.lists(
    st.sampled_from([START, END, BOS, EOT, "\n", " ", "word", "?", "é", "assistant"]), min_size=1, max_size=8
).map("".join)


@given(question=contents, answer=contents)
def test_special_tokens_in_the_text_do_not_move_the_rewarded_token_from_the_end(tiny_chat, question, answer):
    for chat in (tiny_chat, bos_writing_chat()):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (tokens,) = chat.encode([messages])
        assert tokens.ids[-1] == chat.end_of_turn_id
        if chat.bos_id is not None:
            assert tokens.ids[0] == chat.bos_id


def test_responses_of_one_prompt_are_the_conversations_with_them(tiny_chat):
    found = tiny_chat.encode_responses([QUESTION], ["One.", "Two."])
    assert found == tiny_chat.encode([[QUESTION, {"role": "assistant", "content": text}] for text in ("One.", "Two.")])
    assert found[0] != found[1]


def test_truncation_takes_the_beginning_and_keeps_the_rewarded_token(tiny_folder, tiny_chat):
    (whole,) = tiny_chat.encode([[QUESTION, ANSWER]])
    short = load_chat_tokenizer(ModelSettings(name="tiny:llama", max_length=8), tiny_folder)
    (cut,) = short.encode([[QUESTION, ANSWER]])
    assert cut.ids == whole.ids[-8:]
    assert cut.num_truncated == len(whole.ids) - 8
    assert whole.num_truncated == 0


def test_truncation_keeps_bos_where_there_is_one():
    (whole,) = bos_writing_chat().encode([[QUESTION, ANSWER]])
    (cut,) = bos_writing_chat(max_length=10).encode([[QUESTION, ANSWER]])
    assert cut.ids == [0, *whole.ids[-9:]]
    assert cut.num_truncated == len(whole.ids) - 10
    (exact,) = bos_writing_chat(max_length=len(whole.ids)).encode([[QUESTION, ANSWER]])
    assert exact == whole


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA_LIKE])
def test_a_template_without_a_date_is_left_as_it_is(template):
    assert pin_template(template) == template


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch):
    """Sets the clock of the template engine."""

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 5, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


@pytest.mark.parametrize("template", [DATED, DATED_DIRECTLY])
def test_a_template_with_a_date_renders_the_same_on_two_days(template, on_day):
    rendered, raw = [], []
    for day in (6, 17):
        on_day(day)
        chat = bos_writing_chat(template)
        rendered.append(chat.render([QUESTION, ANSWER]))
        raw.append(chat.tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False))
    assert rendered[0] == rendered[1]
    assert "26 Jul 2024" in rendered[0]
    assert raw[0] != raw[1], "left alone, it does not"


def test_pinning_twice_changes_nothing():
    assert pin_template(pin_template(DATED)) == pin_template(DATED) != DATED


def test_the_template_hash_is_that_of_the_template_and_of_nothing_else(on_day):
    on_day(6)
    first = bos_writing_chat(DATED)
    on_day(17)
    second = bos_writing_chat(DATED, max_length=9, system_prompt="Be kind.")
    assert first.template_hash == second.template_hash
    assert first.template_hash != bos_writing_chat(LLAMA_LIKE).template_hash
    assert bos_writing_chat(pin_template(DATED)).template_hash == first.template_hash, (
        "as read back from a model folder"
    )
    assert len(first.template_hash) == 16


def test_the_tokenizer_hash_tells_vocabularies_apart(tiny_chat):
    assert bos_writing_chat().tokenizer_hash == bos_writing_chat(DATED).tokenizer_hash != tiny_chat.tokenizer_hash


def test_a_system_prompt_goes_before_conversations_that_have_none(tiny_tokenizer, tiny_chat):
    chat = ChatTokenizer(tiny_tokenizer, max_length=128, system_prompt="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    assert chat.render([QUESTION, ANSWER]) == tiny_chat.render([system, QUESTION, ANSWER])
    own = {"role": "system", "content": "Be brief."}
    assert chat.render([own, QUESTION, ANSWER]) == tiny_chat.render([own, QUESTION, ANSWER])
    assert "system" not in tiny_chat.render([QUESTION, ANSWER])


def test_rendering_does_not_change_the_messages(tiny_tokenizer):
    messages = [QUESTION, ANSWER]
    ChatTokenizer(tiny_tokenizer, max_length=128, system_prompt="Be kind.").render(messages)
    assert messages == [QUESTION, ANSWER]


def test_a_tokenizer_without_a_template_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*--model\.chat-template"):
        ChatTokenizer(tiny_tokenizer, max_length=128)


@pytest.mark.parametrize("ending", ["", "\\n", " -- "])
def test_a_template_that_does_not_close_the_assistants_turn_is_refused(tiny_tokenizer, ending):
    tiny_tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ '<|im_start|>' + m['content'] + '{ending}' }}}}{{% endfor %}}"
    )
    with pytest.raises(UserError, match="does not close the assistant's turn"):
        ChatTokenizer(tiny_tokenizer, max_length=128)


@pytest.mark.parametrize(
    ("template", "lacking"),
    [
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "question and the answer"),
        ("{{ messages[0].content }}<|im_end|>", "answer"),
        ("{{ messages[-1].content }}<|im_end|>", "question"),
    ],
)
def test_a_template_that_leaves_out_what_was_said_is_refused(tiny_tokenizer, template, lacking):
    tiny_tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"leaves out the {lacking} of a conversation.*--model.chat-template"):
        ChatTokenizer(tiny_tokenizer, max_length=64)


def test_roles_that_the_template_refuses_are_a_users_mistake(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHAT_TEMPLATE  # fmt: skip
    chat = ChatTokenizer(tiny_tokenizer, max_length=128)
    with pytest.raises(UserError, match=r"refuses these roles \['tool', 'assistant'\]: no tools"):
        chat.encode([[{"role": "tool", "content": "x"}, ANSWER]])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read a tokenizer"):
        load_chat_tokenizer(ModelSettings(name=str(tmp_path)), tmp_path)


def test_padding_uses_a_token_that_exists(tiny_chat):
    assert tiny_chat.pad_id == tiny_chat.end_of_turn_id
    assert bos_writing_chat().pad_id == 2


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_of_turn(tiny_folder):
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=40), tiny_folder)
    chat.tokenizer.pad_token = None
    assert chat.pad_id == chat.end_of_turn_id


def saved_tokenizer(folder: Path, template: object) -> Path:
    tokenizer = bos_writing_tokenizer(None)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, **fields: object) -> ChatTokenizer:
    return load_chat_tokenizer(ModelSettings(name=str(folder), max_length=64, **fields), folder)


def test_of_several_templates_the_default_is_taken_and_others_by_their_name(tmp_path):
    other = LLAMA_LIKE.replace("'\\n'", "'\\n\\n'")
    folder = saved_tokenizer(tmp_path, {"default": LLAMA_LIKE, "rag": other})
    assert loaded(folder).template == LLAMA_LIKE
    assert loaded(folder, chat_template="rag").template == other
    with pytest.raises(
        UserError, match=r"the chat templates default, rag, and none of the name tool_use\. .*--model\.chat-template"
    ):
        loaded(folder, chat_template="tool_use")
    with pytest.raises(UserError, match=r"the chat templates rag, and none of the name default"):
        loaded(saved_tokenizer(tmp_path / "other", {"rag": other}))


def test_a_tokenizer_without_a_template_takes_one_that_is_given(tmp_path):
    folder = saved_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "own.jinja").write_text(LLAMA_LIKE)
    given = loaded(folder, chat_template=str(tmp_path / "own.jinja"))
    own = loaded(saved_tokenizer(tmp_path / "own", LLAMA_LIKE))
    assert given.encode([[QUESTION, ANSWER]]) == own.encode([[QUESTION, ANSWER]])
    assert given.template_hash == own.template_hash
    with pytest.raises(UserError, match=r"has no chat template.* --model\.chat-template"):
        loaded(folder, chat_template="rag")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("none.jinja", None, "there is no file"), ("plain.jinja", b"hello", "has no jinja in it"), ("bytes.jinja", b"\xff\xfe{{", "is no chat template")],
)  # fmt: skip
def test_a_file_that_is_no_template_is_refused_in_one_line(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        ModelSettings(chat_template=str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_template_that_is_given_is_part_of_what_identifies_a_run_and_none_is_not(tmp_path):
    assert "chat_template" not in identity(ModelSettings())
    for text in ("{{ messages }}", "{{ bos_token }}"):
        (tmp_path / "own.jinja").write_text(text)
        assert identity(ModelSettings(chat_template=str(tmp_path / "own.jinja")))["chat_template"] == text


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_embeddings_if_no_text_holds_them(tmp_path):
    """As Gemma 3's does: an id for images, which no text and no template of turns holds."""
    tokenizer = bos_writing_tokenizer(LLAMA_LIKE)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert ChatTokenizer(tokenizer, max_length=64).beyond(size) == ""
    assert ChatTokenizer(tokenizer, max_length=64).beyond(size - 1) != ""
    tokenizer.chat_template = LLAMA_LIKE.replace("m['role']", "'<image_soft_token>'")
    assert ChatTokenizer(tokenizer, max_length=64).beyond(size) == "<image_soft_token>"
    tokenizer.chat_template = LLAMA_LIKE
    tokenizer.add_tokens(["word"])
    assert ChatTokenizer(tokenizer, max_length=64).beyond(size) == "word"
