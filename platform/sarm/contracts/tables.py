"""The Parquet schemas that stages hand to each other. Joins are by id, never by row order."""

import json
from typing import Any

import pyarrow as pa

# `more`: what a message has beside its content, as JSON (`data.sources.tool_turns`); null for most, and folders of before lack it.
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())])

CORPUS_TABLE = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

# A corpus of conversations: `text` is what is said in them, for all that reads plain texts.
CONVERSATIONS_TABLE = CORPUS_TABLE.append(pa.field("messages", pa.list_(MESSAGE)))

# Answers in no pair: the last turn of each conversation.
RESPONSES_TABLE = CONVERSATIONS_TABLE.append(pa.field("prompt_id", pa.string(), nullable=False))

PAIRS_TABLE = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.list_(MESSAGE), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("subset", pa.string()),
        pa.field("margin", pa.float32()),
    ]
)

PAIR_SCORES_TABLE = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("subset", pa.string()),
        pa.field("chosen_reward", pa.float32(), nullable=False),
        pa.field("rejected_reward", pa.float32(), nullable=False),
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("chosen_latents", pa.list_(pa.int32())),
        pa.field("chosen_values", pa.list_(pa.float32())),
        pa.field("rejected_latents", pa.list_(pa.int32())),
        pa.field("rejected_values", pa.list_(pa.float32())),
    ]
)

COMPLETION_SCORES_TABLE = pa.schema(
    [
        pa.field("completion_id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("num_tokens", pa.int32()),
        pa.field("was_truncated", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("started", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("forward_tokens", pa.float64(), nullable=False),
    ]
)

EDITED_SCORES_TABLE = pa.schema(
    [
        pa.field("completion_id", pa.string(), nullable=False),
        # One a tried edit, in their order; NaN where the conversation cannot be encoded.
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
        pa.field("reason", pa.string()),
    ]
)

STYLE_CODES_TABLE = pa.schema(
    [
        pa.field("completion_id", pa.string(), nullable=False),
        # Latents that fire in the answer, over all dictionaries: those of the second are numbered behind the first's.
        pa.field("latents", pa.list_(pa.int32()), nullable=False),
        pa.field("means", pa.list_(pa.float32()), nullable=False),
        pa.field("shares", pa.list_(pa.float32()), nullable=False),
        # What each adds to the reward to first order, over the tokens that are edited; empty where nobody asked.
        pa.field("effects", pa.list_(pa.float32()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)

ITEMS_TABLE = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("variant", pa.string(), nullable=False),
        pa.field("completion", pa.int32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
        pa.field("completion_id", pa.string(), nullable=False),
        pa.field("num_chars", pa.int32(), nullable=False),
        pa.field("markup", pa.int32(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("num_tokens", pa.int32()),
        pa.field("truncated", pa.bool_()),
        pa.field("score_alone", pa.float64()),
    ]
)

FEATURES_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("frequency_chosen", pa.float32(), nullable=False),
        pa.field("frequency_rejected", pa.float32(), nullable=False),
        pa.field("mean_contribution_chosen", pa.float32(), nullable=False),
        pa.field("mean_contribution_rejected", pa.float32(), nullable=False),
        pa.field("mean_margin_contribution", pa.float32(), nullable=False),
    ]
)

CONTEXTS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("side", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)

LATENT_CONTEXTS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("decile", pa.int8(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("text_id", pa.string(), nullable=False),
        pa.field("pair_id", pa.string()),
        pa.field("side", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("span_start", pa.int32(), nullable=False),
        pa.field("span_end", pa.int32(), nullable=False),
    ]
)

# Bins of positive activations: what lies below the first edge or above the last counts in the outer bins.
ACTIVATION_EDGES = tuple(2.0 ** (step / 2) for step in range(-20, 21))

LATENT_SUMMARIES_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("total", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("max", pa.float32(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("quantiles", pa.list_(pa.float32()), nullable=False),
        pa.field("chosen_mean", pa.float64()),
        pa.field("rejected_mean", pa.float64()),
        pa.field("weight", pa.float64()),
        pa.field("histogram", pa.list_(pa.int64()), nullable=False),
        pa.field("chosen_histogram", pa.list_(pa.int64())),
        pa.field("rejected_histogram", pa.list_(pa.int64())),
    ],
    metadata={b"edges": json.dumps(ACTIVATION_EDGES).encode()},
)

LATENT_STATS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("frequency_text", pa.float32(), nullable=False),
        pa.field("frequency_chat", pa.float32(), nullable=False),
        pa.field("mean_value", pa.float32(), nullable=False),
        pa.field("max_value", pa.float32(), nullable=False),
    ]
)


# What an interpreter says of a latent, and how that was tested. Only rows of status `ok` enter a statistic; what could not be
# measured is null, never 0.
EXPLANATIONS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("explanation", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("detection", pa.float64()),
        pa.field("detection_low", pa.float64()),
        pa.field("detection_high", pa.float64()),
        pa.field("simulation", pa.float64()),
        pa.field("intruder", pa.float64()),
        pa.field("baseline_other", pa.float64()),
        pa.field("baseline_none", pa.float64()),
        pa.field("monosemanticity", pa.float64()),
        pa.field("safety", pa.float64()),
        pa.field("num_scored", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

RATINGS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("rubric", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("repeat", pa.int32(), nullable=False),
        pa.field("rating", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

# One row for each text that an explanation was tested on: what the judge said of it, null where no answer could be used.
JUDGED_TEXTS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("score", pa.string(), nullable=False),
        pa.field("text_id", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("decile", pa.int32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("said", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
    ]
)

# The texts that an explanation was written from (the first candidate's) and ratings were given for.
SHOWN_TEXTS_TABLE = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
    ]
)

# Optional `pool.parquet` of contexts/v1: whole texts with every latent that fires there, so that silence is known, not presumed.
CONTEXT_POOL_TABLE = pa.schema(
    [
        pa.field("place", pa.string(), nullable=False),
        pa.field("text_id", pa.string(), nullable=False),
        pa.field("pair_id", pa.string()),
        pa.field("side", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("latents", pa.list_(pa.int32()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)

REJECTED_TABLE = pa.schema(
    [
        pa.field("row_id", pa.int64()),
        pa.field("pair_id", pa.string()),
        pa.field("side", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


TRUE_END, SENTENCE, WORD = "true_end", "sentence", "word"
KINDS = (TRUE_END, SENTENCE, WORD)
"""Kinds of ends of turn: of the answer itself, and of what it was after one of its sentences, or after some word."""


def activations_table(d_in: int, metadata: dict[str, Any], *, kinds: bool = False) -> pa.Schema:
    """activations/v1 for vectors of width `d_in`: one fixed-size binary of raw 16-bit values a row.

    `metadata` (dtype, d_in, layer, model, tokenizer and template hash) travels in the schema as JSON under `sarm`. With `kinds`, a column
    `kind` says what each row is the end of; readers that do not ask for it need not know it.
    """
    return pa.schema(
        [
            pa.field("row_id", pa.int64(), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("side", pa.string(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("num_tokens", pa.int32(), nullable=False),
            *([pa.field("kind", pa.string(), nullable=False)] if kinds else []),
            pa.field("activation", pa.binary(2 * d_in), nullable=False),
        ],
        metadata={b"sarm": json.dumps({**metadata, "d_in": d_in}, sort_keys=True).encode()},
    )
