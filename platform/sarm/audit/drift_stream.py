"""The watch over one training run's rewards: step by step, what has changed since its first steps, what pays for it, and when to say so.

The baseline are the first steps. An alarm names latents, or figures beside them, whose steps are no longer exchangeable with those before
(`rank_martingales`). It never stops anything: a policy that learns what is rewarded changes too, and people judge what paid for that.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

from sarm.audit.drift import SIGNALS, Shifts, Sums, decomposed, sums_of, together
from sarm.audit.rank_martingales import FIRST_STEPS, MAX_STEPS, RankMartingales

LEVEL = 0.05
"""Chance that a run in which nothing changes ever alarms, at most."""
RECENT_STEPS = 10
"""What is compared with the baseline."""
# How the level is divided: latents that fire in the baseline, those that do not, and figures beside them.
_KNOWN, _NEW, _SIGNALS = 0.6, 0.2, 0.2
_NAMED = 3


@dataclass(frozen=True)
class Paid:
    """What a latent adds to the shift of the mean reward since the baseline, in raw reward."""

    latent: int
    baseline: float
    now: float
    """Mean contributions."""
    shift: float
    rate: float
    """Of the shift, what comes of firing more often."""
    strength: float
    """What comes of adding more where it fires."""
    evidence: float
    """Natural logarithm of the highest capital of the bets against there being no change."""


@dataclass(frozen=True)
class Alarm:
    """Latents and figures that had not alarmed before."""

    step: int
    latents: tuple[Paid, ...]
    """The most evident first."""
    signals: tuple[str, ...]
    shift: float
    """Of the mean raw reward, baseline to recent steps."""

    def as_json(self) -> dict[str, Any]:
        """For the route and the page."""
        return asdict(self)


class DriftStream:
    """One stream of steps. What it holds grows with the latents that fire, up to a bound; `seed` breaks ties between equal steps."""

    def __init__(self, num_latents: int, *, level: float = LEVEL, seed: int = 0):
        self._num, self._level, self._seed = num_latents, level, seed
        self.reset()

    def reset(self) -> None:
        """Begin anew: the next steps are the baseline."""
        self.num_steps: int = 0
        self.num_answers, self.last_step = 0, -1
        self.alarms: list[Alarm] = []
        self.history: deque[dict[str, float]] = deque(maxlen=MAX_STEPS)
        """The figures of the latest steps."""
        self._first_figures: list[dict[str, float]] = []
        self._martingales = RankMartingales(self._num + len(SIGNALS), self._seed)
        self._first: list[Sums] = []
        self._baseline = sums_of([])
        self._recent: deque[Sums] = deque(maxlen=RECENT_STEPS)
        self._is_known_H: Bool[NDArray[np.bool_], " streams"] = np.zeros(self._num + len(SIGNALS), bool)
        self._alarmed: set[int] = set()

    @property
    def is_watching(self) -> bool:
        """Whether the baseline is complete."""
        return self.num_steps >= FIRST_STEPS

    def add(self, step: int, sums: Sums, signals: Mapping[str, float]) -> Alarm | None:
        """A finished step: its sums, and those of `SIGNALS` that it could say. The alarm that it raises, if any."""
        moved = [(self._num + place, signals[name]) for place, name in enumerate(SIGNALS) if name in signals]
        streams_M = np.concatenate([sums.latents, np.array([stream for stream, _ in moved], np.int64)])
        values_M = np.concatenate([sums.means, np.array([value for _, value in moved])])
        missing = [self._num + place for place, name in enumerate(SIGNALS) if name not in signals]
        self._martingales.add(streams_M, values_M, missing)
        self.num_steps, self.num_answers, self.last_step = self.num_steps + 1, self.num_answers + sums.num, step
        figures = {"step": float(step), "answers": float(sums.num), **signals}
        self.history.append(figures)
        self._recent.append(sums)
        if self.num_steps <= FIRST_STEPS:
            self._first.append(sums)
            self._first_figures.append(figures)
            if self.num_steps == FIRST_STEPS:
                self._baseline, self._first = together(self._first), []
                self._is_known_H = self._martingales.has_moved.copy()
            return None
        return self._look(step)

    def silent(self) -> Bool[NDArray[np.bool_], " d_sae"] | None:
        """Which latents never fired in the baseline; None before it is complete."""
        return ~self._is_known_H[: self._num] if self.is_watching else None

    def shifts(self) -> Shifts | None:
        """The parts of the shift of the mean reward from the baseline to the last steps; None before there is a baseline."""
        return decomposed(self._baseline, together(self._recent)) if self.is_watching else None

    def paid(self, top: int) -> list[Paid]:
        """The latents that the shift since the baseline is mostly made of, by size."""
        found = self.shifts()
        if found is None:
            return []
        order = np.argsort(-np.abs(found.shift), kind="stable")[:top]
        return self._paid(found, found.latents[order])

    def contributions(self, latents: Int64[NDArray[np.int64], " asked"]) -> Float64[NDArray[np.float64], " asked"]:
        """Mean contributions of some latents at the last step."""
        return _at(self._recent[-1], latents) if self._recent else np.zeros(len(latents))

    def signals(self) -> dict[str, dict[str, float]]:
        """Each figure over the baseline and over the last steps, with the evidence against there being no change."""
        evidence_H = np.log(self._martingales.evidence)
        found = {}
        latest = list(self.history)[-RECENT_STEPS:]
        for place, name in enumerate(SIGNALS):
            before = [one[name] for one in self._first_figures if name in one]
            now = [one[name] for one in latest if name in one]
            if before and now:
                mean, recent = float(np.mean(before)), float(np.mean(now))
                found[name] = {"baseline": mean, "now": recent, "evidence": float(evidence_H[self._num + place])}
        return found

    def _look(self, step: int) -> Alarm | None:
        num_known = max(int(self._is_known_H[: self._num].sum()), 1)
        weight_H = np.where(self._is_known_H, _KNOWN / num_known, _NEW / max(self._num - num_known, 1))
        weight_H[self._num :] = _SIGNALS / len(SIGNALS)
        evidence_H = self._martingales.evidence
        over = np.flatnonzero(evidence_H * weight_H * self._level >= 1)
        new = np.array([stream for stream in over.tolist() if stream not in self._alarmed], np.int64)
        if not len(new):
            return None
        self._alarmed |= set(new.tolist())
        found = self.shifts()
        assert found is not None
        latents = new[new < self._num]
        latents = latents[np.argsort(-evidence_H[latents], kind="stable")]
        signals = tuple(SIGNALS[stream - self._num] for stream in new.tolist() if stream >= self._num)
        alarm = Alarm(step, tuple(self._paid(found, latents)), signals, float(found.shift.sum()))
        self.alarms.append(alarm)
        return alarm

    def _paid(self, found: Shifts, latents: Int64[NDArray[np.int64], " asked"]) -> list[Paid]:
        before, now = _at(self._baseline, latents), _at(together(self._recent), latents)
        place = {latent: place for place, latent in enumerate(found.latents.tolist())}
        evidence = np.log(self._martingales.evidence)
        return [
            Paid(
                latent=latent,
                baseline=float(before[n]),
                now=float(now[n]),
                shift=float(found.shift[place[latent]]) if latent in place else 0.0,
                rate=float(found.rate[place[latent]]) if latent in place else 0.0,
                strength=float(found.strength[place[latent]]) if latent in place else 0.0,
                evidence=float(evidence[latent]),
            )
            for n, latent in enumerate(latents.tolist())
        ]


def suspects(stream: DriftStream, num: int = _NAMED) -> list[int]:
    """The latents to look at first: those that alarmed, in order of their alarms, then those that the shift is mostly made of."""
    alarmed = [one.latent for alarm in stream.alarms for one in alarm.latents]
    return list(dict.fromkeys([*alarmed, *(one.latent for one in stream.paid(num))]))[:num]


def concentration(found: Shifts, num: int = _NAMED) -> float:
    """Share of all rises that the `num` largest ones make up; 0 where nothing rose."""
    rises = np.sort(np.maximum(found.shift, 0.0))[::-1]
    return float(rises[:num].sum() / rises.sum()) if rises.sum() > 0 else 0.0


def _at(sums: Sums, latents: Int64[NDArray[np.int64], " asked"]) -> Float64[NDArray[np.float64], " asked"]:
    found = dict(zip(sums.latents.tolist(), sums.means.tolist(), strict=True))
    return np.array([found.get(latent, 0.0) for latent in latents.tolist()])
