"""What actors compute to see what edits of features do: scores of completions under each of several edits, and the codes of answers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from sarm.contracts.passes import Beat, Cost, Tables
from sarm.contracts.tables import EDITED_SCORES_TABLE, STYLE_CODES_TABLE
from sarm.data.formats.feature_edit import FeatureEdit
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.parts import with_sink_columns
from sarm.nn.sae import Sae
from sarm.nn.splice import LatentEdit, Positions, Splice
from sarm.passes.models import ModelSpec
from sarm.passes.reward_gradients import slopes
from sarm.passes.row_scorer import Encoded, TorchScorer
from sarm.passes.scoring import Request
from sarm.passes.usage import device_of_worker

# Tokens that are encoded at once.
_ROWS_AT_ONCE = 512
_NOTHING: dict[str, Any] = {"latents": [], "means": [], "shares": [], "effects": [], "num_tokens": 0}


class Dictionary(NamedTuple):
    """An SAE's folder, the layer that it reads, and the number of its first latent among those of all dictionaries."""

    folder: Path
    layer: int
    first: int


class Dose(NamedTuple):
    """Latents, by their numbers over all dictionaries, of which `share` is taken away; none is the model as it is."""

    latents: tuple[int, ...] = ()
    share: float = 1.0

    def splices(self, dictionaries: Sequence[Dictionary], saes: Sequence[Sae]) -> tuple[Splice, ...]:
        """The dose as splices: one for each dictionary that it has latents of."""
        splices = []
        for dictionary, sae in zip(dictionaries, saes, strict=True):
            own = [one - dictionary.first for one in self.latents if 0 <= one - dictionary.first < sae.d_sae]
            edits = [
                LatentEdit(one) if self.share == 1 else LatentEdit(one, "scale", 1 - self.share) for one in sorted(own)
            ]
            if edits:
                splices.append(Splice(sae, dictionary.layer, edits))
        return tuple(splices)


class _Reads:
    """Requests as tokens, and what every pass over completions says of those that cannot be read."""

    def __init__(self, spec: ModelSpec, batch_tokens: int, dictionaries: Sequence[Dictionary], threads: int):
        torch.set_num_threads(threads)
        self._scorer = TorchScorer(spec, batch_tokens)
        self._dictionaries = dictionaries
        self._saes = [load_sae(one.folder)[0].eval() for one in dictionaries]

    def prepare(self, table: pa.Table) -> tuple[list[dict[str, Any]], list[Request], list[list[Encoded]]]:
        """The requests and their tokens."""
        rows: list[dict[str, Any]] = table.to_pylist()
        requests = [Request(json.loads(row["prompt"]), row["completions"], row["alone"]) for row in rows]
        return rows, requests, self._scorer.encode(requests)


class EditedScores(_Reads):
    """A table of REQUESTS in, one row of EDITED_SCORES a completion out, under the one target `scores`."""

    def __init__(
        self,
        spec: ModelSpec,
        batch_tokens: int,
        dictionaries: Sequence[Dictionary],
        doses: Sequence[Dose],
        positions: Positions,
        threads: int,
    ):
        super().__init__(spec, batch_tokens, dictionaries, threads)
        self._edits = [
            FeatureEdit(dose.splices(dictionaries, self._saes), positions, spec.identity) if dose.latents else None
            for dose in doses
        ]

    def compute(self, prepared: tuple[Any, ...], beat: Beat) -> tuple[Tables, Cost]:
        """The scores of all completions under every dose."""
        rows, requests, sequences = prepared
        total = Cost()
        by_dose = []
        for edit in self._edits:
            self._scorer.edit(edit)
            scored, cost = self._scorer.score(requests, sequences)
            by_dose.append([one for own in scored for one in own])
            total.tokens += cost.tokens
            total.padded_tokens += cost.padded_tokens
            total.forward_seconds += cost.forward_seconds
            beat()
        ids = [completion_id for row in rows for completion_id in row["ids"]]
        out = [
            {
                "completion_id": completion_id,
                "scores": [one.score for one in own],
                "reason": own[0].reason,
                "truncated": own[0].truncated,
            }
            for completion_id, own in zip(ids, zip(*by_dose, strict=True), strict=True)
        ]
        return {"scores": pa.Table.from_pylist(out, schema=with_sink_columns(EDITED_SCORES_TABLE))}, total

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of requests that cannot be scored."""
        ids = [completion_id for own in table["ids"].to_pylist() for completion_id in own]
        blank = {"scores": [math.nan] * len(self._edits), "truncated": False, "reject": reason}
        rows = [{"completion_id": completion_id, **blank} for completion_id in ids]
        return {"scores": pa.Table.from_pylist(rows, schema=with_sink_columns(EDITED_SCORES_TABLE))}


class StyleCodes(_Reads):
    """A table of REQUESTS in, one row of STYLE_CODES a completion out, under the one target `codes`: means over the answer's tokens.

    With `effects_at`, and what each latent adds to the reward to first order at those positions of the answer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch_tokens: int,
        dictionaries: Sequence[Dictionary],
        effects_at: Positions | None,
        threads: int,
    ):
        super().__init__(spec, batch_tokens, dictionaries, threads)
        self._effects_at = effects_at

    def compute(self, prepared: tuple[Any, ...], beat: Beat) -> tuple[Tables, Cost]:
        """Mean codes and shares of tokens at which latents fire."""
        rows, requests, sequences = prepared
        found: dict[tuple[int, int], dict[str, Any]] = {}
        cost = Cost()
        layers = [one.layer for one in self._dictionaries]
        read = self._scorer.residuals if self._effects_at is None else self._scorer.gradients
        for r, i, residuals, *gradients in read(requests, sequences, layers):
            found[r, i] = self._means(residuals, *gradients)
            cost.tokens += len(sequences[r][i].ids)
            beat()
        out = [
            {
                "completion_id": completion_id,
                "truncated": one.truncated,
                "reject": one.reason,
                **(found.get((r, i)) or _NOTHING),
            }
            for r, row in enumerate(rows)
            for i, (completion_id, one) in enumerate(zip(row["ids"], sequences[r], strict=True))
        ]
        return {"codes": pa.Table.from_pylist(out, schema=with_sink_columns(STYLE_CODES_TABLE))}, cost

    @torch.inference_mode()
    def _means(self, residuals: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> dict[str, Any]:
        latents, means, shares, effects = [], [], [], []
        for n, (dictionary, sae, h_TD) in enumerate(zip(self._dictionaries, self._saes, residuals, strict=True)):
            sae.to(device_of_worker())
            sum_S, fires_S, effect_S = (torch.zeros(sae.d_sae, device=h_TD.device) for _ in range(3))
            # The rewarded token is the answer's last.
            begin = len(h_TD) - 1 if self._effects_at == "rewarded" else 0
            for start in range(0, len(h_TD), _ROWS_AT_ONCE):
                part = h_TD[start : start + _ROWS_AT_ONCE]
                codes = sae(sae.rows_of(part))
                if gradients is not None:
                    slope_TK = slopes(sae, codes, part, gradients[n][start : start + _ROWS_AT_ONCE])
                    term_TK = (slope_TK * codes.values)[max(0, begin - start) :]
                    effect_S.index_add_(0, codes.indices[max(0, begin - start) :].flatten(), term_TK.flatten())
                sum_S.index_add_(0, codes.indices.flatten(), codes.values.flatten())
                fires_S.index_add_(0, codes.indices.flatten(), (codes.values != 0).float().flatten())
            own = fires_S.nonzero().flatten()
            latents += (own + dictionary.first).tolist()
            means += (sum_S[own] / len(h_TD)).tolist()
            shares += (fires_S[own] / len(h_TD)).tolist()
            effects += effect_S[own].tolist() if gradients is not None else []
        return {"latents": latents, "means": means, "shares": shares, "effects": effects, "num_tokens": len(residuals[0])}  # fmt: skip

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of requests that cannot be read."""
        ids = [completion_id for own in table["ids"].to_pylist() for completion_id in own]
        blank = {**_NOTHING, "truncated": False, "reject": reason}
        rows = [{"completion_id": completion_id, **blank} for completion_id in ids]
        return {"codes": pa.Table.from_pylist(rows, schema=with_sink_columns(STYLE_CODES_TABLE))}
