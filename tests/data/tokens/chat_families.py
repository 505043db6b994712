"""Small tokenizers with the rules and the chat templates of the families that people use, trained on the tiny texts."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sarm.data.sources.tiny import tiny_texts
from sarm.data.tokens.chat import ChatTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
# The same with brackets that are no tokens.
LLAMA2 = MISTRAL.replace("[/INST]", " [/INST]")
QWEN3 = (
    "{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% else %}{{ content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)  # fmt: skip

# It leaves out what switches thinking on and off, wherever it stands.
NEMOTRON = CHATML.replace("m['content']", "m['content'].replace('/think', '').replace('/no_think', '')")
# It reads reasoning between texts that are no tokens.
READS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")

# Template, how the tokenizer splits, special tokens (BOS first where there is one, the end of turn last), added ones that are not special.
_FAMILIES: dict[str, tuple[str, str, list[Any], list[Any]]] = {
    "chatml": (CHATML, "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "<|fim|>"]),
    "llama3": (LLAMA3, "bytes", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(12)), "<|eot_id|>"], []),
    "gemma": (GEMMA, "replaced", ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n", "▁▁", "<table>", "</table>", "<unused7>"]),
    "mistral": (MISTRAL, "first", ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"], []),
    "llama2": (LLAMA2, "prepended", ["<s>", "<unk>", "</s>"], []),
    "qwen3": (QWEN3, "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_response>"]),
    "phi3": (PHI, "prepended", ["<s>", *(AddedToken(text, rstrip=True) for text in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"))], []),
    "nemotron": (NEMOTRON, "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
    "reads": (READS, "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
    "deepseek": (DEEPSEEK, "bytes", ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], ["<think>", "</think>"]),
}  # fmt: skip
# Whose models write `</s>` by themselves: a Unigram one that has it in its vocabulary, one whose merges reach it.
FAMILIES = (*_FAMILIES, "unigram", "merged")
# They write a BOS before every text, which templates write too.
_WRITES_BOS = ("llama3", "gemma", "mistral", "llama2", "deepseek")


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer, made once; do not change it."""
    if family in ("unigram", "merged"):
        return writing_the_end(family)
    template, kind, specials, others = _FAMILIES[family]
    backend = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
    elif kind == "replaced":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    elif kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else [chr(n) for n in range(9, 127)]
    names = [text if isinstance(text, str) else text.content for text in specials]
    fallback = [] if kind == "bytes" else [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*names, *fallback], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*tiny_texts(), "\n\n\n\n", ".\n\n", '>"', "assistant model user"] * 2, trainer)
    if kind != "bytes":
        backend = _without_added(backend)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken(text, normalized=False) for text in others])
    if family in _WRITES_BOS:
        backend.post_processor = TemplateProcessing(
            single=f"{names[0]} $A", special_tokens=[(names[0], backend.token_to_id(names[0]))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[-1])
    tokenizer.chat_template = template
    return tokenizer


def writing_the_end(family: str, with_bytes: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer whose model writes `</s>` by itself; `with_bytes`, and bytes for characters that it lacks."""
    names = ["<unk>", "<s>", "</s>"]
    letters = [chr(n) for n in range(33, 127)]
    of_bytes = [f"<0x{n:02X}>" for n in range(256)] * with_bytes
    if family == "unigram":
        words = [
            ("▁", -2.0),
            ("▁so", -4.0),
            ("ing", -4.0),
            *((letter, -6.0) for letter in letters),
            *((text, -9.0) for text in of_bytes),
        ]
        backend = Tokenizer(models.Unigram([(name, 0.0) for name in names] + words, 0, with_bytes))
    else:
        pieces = ["</", "s>"]
        vocabulary = {text: n for n, text in enumerate([*names, "▁", *letters, *pieces, *of_bytes])}
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=with_bytes))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(names)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = LLAMA2
    return tokenizer


def chat_of(family: str, **options: Any) -> ChatTokenizer:
    """The family's `ChatTokenizer`."""
    return ChatTokenizer(tokenizer_of(family), **{"max_length": 4096, **options})


def _without_added(backend: Tokenizer) -> Tokenizer:
    """The same without added tokens: bytes are vocabulary in these families, which the trainer takes for special tokens."""
    fresh = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if (own := getattr(backend, part)) is not None:
            setattr(fresh, part, own)
    return fresh
