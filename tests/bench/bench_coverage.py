"""How often intervals hold the truth, and tests cry wolf: `make bench BENCH=coverage` writes outputs/bench/coverage.json.

Worlds are drawn from the demo's safety pairs (`demo:harm`, at most 60 of a prompt): prompts with replacement, each with its number of pairs and
with the answers that its pairs share. Right and wrong are drawn in two ways:

    beta      a prompt's accuracy is beta with an intraclass correlation (ICC), its pairs are independent given that
    answers   an answer's reward is quality + noise of the prompt + noise of the answer, so that pairs that share an answer go together

and once ("uneven") with prompts of over 50 pairs 20 points harder than the others, which breaks the assumption of one correlation.
The figure is the accuracy over pairs of all prompts, not of the prompts drawn. `before` is what this project did at first: percentiles of
resampled prompts, BCa with tails moved out as t's, McNemar over pairs, and a contrast null that turned lengths with differences.
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, special, stats

from sarm.audit.codes import AuditCodes
from sarm.audit.contrast import contrast
from sarm.contracts.ids import hash_share
from sarm.data.sources.demo import demo_pairs
from sarm.data.sources.rows import Reject
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.benchmarks.rm_bench import RM_BENCH
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.influence import figure_intervals
from sarm.evaluate.intervals import difference_interval, share_interval
from sarm.evaluate.statistics import sign_flip_p_values

ROOT = Path(__file__).parent.parent.parent
PROMPTS, ACCURACIES, CAP = (19, 44, 82, 300), (0.6, 0.75, 0.85, 0.9, 0.95), 60
KINDS = (("beta", 0.0), ("beta", 0.1), ("beta", 0.3), ("answers", 0.5), ("answers", 1.5))
UNEVEN, LARGE = ("uneven", 0.2), 50
# (spread of a prompt's quality, quality of either model): three of equal models, two of unequal ones.
MODELS = ((0.0, 1.2, 1.2), (1.0, 1.2, 1.2), (0.0, 0.3, 0.3), (0.0, 1.2, 0.7), (1.0, 1.2, 0.7))
_NOISE, _RESAMPLES, _NUM_LATENTS = 0.8, 500, 300


class Prompt(NamedTuple):
    """One prompt of the demo: characters of its distinct answers, and its pairs as places among them."""

    characters: np.ndarray
    pairs: np.ndarray


def demo_prompts() -> list[Prompt]:
    """The prompts of `demo:harm` with at most 60 pairs of each, chosen by hash."""
    found: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for row in demo_pairs():
        if not isinstance(row, Reject):
            found[row["prompt"][-1]["content"]].append((row["chosen"], row["rejected"]))
    prompts = []
    for pairs in found.values():
        kept = sorted(pairs, key=lambda pair: hash_share("\x1f".join(pair)))[:CAP]
        places = {text: i for i, text in enumerate(dict.fromkeys(text for pair in kept for text in pair))}
        prompts.append(Prompt(np.array([len(text) for text in places]), np.array([[places[a], places[b]] for a, b in kept])))  # fmt: skip
    return prompts


def drawn(prompts: list[Prompt], num: int, rng: np.random.Generator) -> tuple[list[Prompt], np.ndarray]:
    """Prompts with replacement, and the prompt of each of their pairs."""
    chosen = [prompts[i] for i in rng.integers(len(prompts), size=num)]
    return chosen, np.repeat(np.arange(num), [len(one.pairs) for one in chosen])


def right(chosen: list[Prompt], cluster_N: np.ndarray, kind: str, size: float, accuracy: float, rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """1 for each pair in the right order."""
    if kind == "beta":
        total = 1 / size - 1 if size else np.inf
        share_C = rng.beta(accuracy * total, (1 - accuracy) * total, len(chosen)) if size else np.full(len(chosen), accuracy)  # fmt: skip
        return (rng.random(len(cluster_N)) < share_C[cluster_N]).astype(float)
    quality = stats.norm.ppf(accuracy) * math.sqrt(size**2 + 2 * _NOISE**2)
    return _by_answers(chosen, quality + size * rng.normal(size=len(chosen)), [_NOISE * rng.normal(size=len(one.characters)) for one in chosen])  # fmt: skip


def uneven(prompts: list[Prompt], chosen: list[Prompt], cluster_N: np.ndarray, gap: float, accuracy: float, rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """The same where large prompts are harder by `gap`, with this accuracy over the pairs of all prompts, and an ICC of 0.05."""
    size_P, size_C = (np.array([len(one.pairs) for one in group]) for group in (prompts, chosen))
    mean_C = accuracy + gap * (size_P[size_P > LARGE].sum() / size_P.sum() - (size_C > LARGE))
    return (rng.random(len(cluster_N)) < rng.beta(19 * mean_C, 19 * (1 - mean_C))[cluster_N]).astype(float)


def _by_answers(chosen: list[Prompt], quality_C: np.ndarray, rewards: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([
        (quality + own[one.pairs[:, 0]] - own[one.pairs[:, 1]] > 0).astype(float)
        for one, quality, own in zip(chosen, quality_C, rewards, strict=True)
    ])  # fmt: skip


def gains(chosen: list[Prompt], spread: float, qualities: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Credit of one model minus that of another; both see three fifths of an answer alike, and have luck of their own with each prompt."""
    shared = [0.6 * rng.normal(size=len(one.characters)) for one in chosen]
    credit = [
        _by_answers(chosen, quality + spread * rng.normal(size=len(chosen)), [own + _NOISE * rng.normal(size=len(own)) for own in shared])
        for quality in qualities
    ]  # fmt: skip
    return credit[0] - credit[1]


def _resampled(values_N: np.ndarray, cluster_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size_C, sum_C = np.bincount(cluster_N), np.bincount(cluster_N, weights=values_N)
    counts_RC = rng.multinomial(len(size_C), np.full(len(size_C), 1 / len(size_C)), size=_RESAMPLES)
    without_C = (sum_C.sum() - sum_C) / (size_C.sum() - size_C)
    return (counts_RC @ sum_C) / (counts_RC @ size_C), without_C


def percentiles(values_N: np.ndarray, cluster_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Before, of accuracies and differences everywhere but in benchmarks."""
    return np.quantile(_resampled(values_N, cluster_N, rng)[0], [0.025, 0.975])


def bca(values_N: np.ndarray, cluster_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Before, of benchmarks: BCa with tails moved out."""
    means_R, without_C = _resampled(values_N, cluster_N, rng)
    num, mean = len(without_C), values_N.mean()
    influence_C = without_C.mean() - without_C
    spread = (influence_C**2).sum() ** 1.5
    acceleration = (influence_C**3).sum() / (6 * spread) if spread > 0 else 0.0
    below = np.mean(means_R < mean - 1e-12) + 0.5 * np.mean(np.abs(means_R - mean) <= 1e-12)
    z0, z = special.ndtri(np.clip(below, 1e-3, 1 - 1e-3)), -math.sqrt(num / (num - 1)) * special.stdtrit(num - 1, 0.025)
    return np.quantile(means_R, [special.ndtr(z0 + (z0 + end) / (1 - acceleration * (z0 + end))) for end in (-z, z)])


def mcnemar(only_a: int, only_b: int) -> float:
    """Before: pairs as if independent."""
    return float(stats.binomtest(min(only_a, only_b), only_a + only_b).pvalue) if only_a + only_b else 1.0


def of_accuracies(job: tuple[list[Prompt], int, float, tuple[str, float], int]) -> dict[str, Any]:
    """Coverage of an accuracy's interval in one kind of world."""
    prompts, num, accuracy, (kind, size), worlds = job
    held: collections.Counter[str] = collections.Counter()
    tried: collections.Counter[str] = collections.Counter()
    width = 0.0
    widths: collections.Counter[str] = collections.Counter()
    for world in range(worlds):
        rng = np.random.default_rng((world, num, round(100 * accuracy)))
        chosen, cluster_N = drawn(prompts, num, rng)
        values_N = uneven(prompts, chosen, cluster_N, size, accuracy, rng) if kind == "uneven" else right(chosen, cluster_N, kind, size, accuracy, rng)  # fmt: skip
        ends = {"after": share_interval(values_N, cluster_N)}
        if world % 4 == 0 and 0 < values_N.mean() < 1:
            ends |= {"percentiles": percentiles(values_N, cluster_N, rng), "bca": bca(values_N, cluster_N, rng)}
        width += ends["after"].high - ends["after"].low
        if "percentiles" in ends:
            widths.update({name: float(np.ptp(ends[name])) for name in ("after", "percentiles")})
        for name, (low, high) in ends.items():
            tried[name] += 1
            held[name] += bool(low <= accuracy <= high)
    return {"prompts": num, "accuracy": accuracy, "kind": kind, "size": size, "width": width / worlds, "ratio": widths["after"] / widths["percentiles"], **{name: held[name] / tried[name] for name in tried}}  # fmt: skip


def of_differences(job: tuple[list[Prompt], int, tuple[float, float, float], int]) -> dict[str, Any]:
    """Coverage of a difference's interval, and how often equal models are called different by it and by the tests."""
    prompts, num, (spread, a, b), worlds = job
    truth = 0.0
    if a != b:
        # From many prompts, each weighed by its pairs.
        many, _ = drawn(prompts, 15_000, np.random.default_rng(1))
        truth = float(gains(many, spread, (a, b), np.random.default_rng(2)).mean())
    held: collections.Counter[str] = collections.Counter()
    widths: collections.Counter[str] = collections.Counter()
    for world in range(worlds):
        rng = np.random.default_rng((world, num, 7))
        chosen, cluster_N = drawn(prompts, num, rng)
        gain_N = gains(chosen, spread, (a, b), rng)
        for name, (low, high) in (("after", difference_interval(gain_N, cluster_N)), ("percentiles", percentiles(gain_N, cluster_N, rng))):  # fmt: skip
            held[name] += bool(low <= truth <= high)
            widths[name] += high - low
        by_prompt = np.bincount(cluster_N, weights=gain_N)[:, None]
        held["p_swap"] += bool(sign_flip_p_values(by_prompt, 500, world)[0] <= 0.05)
        held["p_mcnemar"] += mcnemar(int((gain_N > 0).sum()), int((gain_N < 0).sum())) <= 0.05
    return {"prompts": num, "equal": a == b, "spread": spread, "models": [a, b], "ratio": widths["after"] / widths["percentiles"], **{name: count / worlds for name, count in held.items()}}  # fmt: skip


def of_contrast(prompts: list[Prompt], name: str, seeds: int) -> dict[str, Any]:
    """p-values, discoveries and intervals of latents that depend on the answer's length and on chance."""
    first = np.cumsum([0, *(len(one.characters) for one in prompts)])
    pairs_N2 = np.concatenate([one.pairs + start for one, start in zip(prompts, first, strict=False)])
    characters_R = np.concatenate([one.characters for one in prompts]).astype(float)
    cluster_N = np.repeat(np.arange(len(prompts)), [len(one.pairs) for one in prompts])
    scaled_R = (np.log(characters_R) - np.log(characters_R).mean()) / np.log(characters_R).std()
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    ids = cluster_N.astype(str)
    for seed in range(seeds):
        z = sparse.csr_array(10 + scaled_R[:, None] + np.random.default_rng(seed).normal(size=(len(characters_R), _NUM_LATENTS)))  # fmt: skip
        codes = AuditCodes(
            weight=np.ones(_NUM_LATENTS), reward=np.zeros(len(characters_R)), tokens=characters_R, z=z, sentence=z,
            ends=np.ones(len(characters_R), dtype=int), residual=np.zeros((len(characters_R), 1), dtype=np.float32),
            pair_ids=ids, prompts=ids, roles=np.full(len(ids), "select"), subsets=np.full(len(ids), ""),
            chosen=pairs_N2[:, 0], rejected=pairs_N2[:, 1], required=np.zeros(len(ids)),
        )  # fmt: skip
        after = contrast(codes, "reward", 4000, seed)
        p_before, holds_before = _contrast_before(z.toarray()[pairs_N2[:, 0]] - z.toarray()[pairs_N2[:, 1]], codes.log_length, cluster_N, seed)  # fmt: skip
        for when, p in (("before", p_before), ("after", after.p)):
            found[f"p_{when}"].append(p)
            found[f"discoveries_{when}"].append(np.array([(stats.false_discovery_control(p) <= 0.05).sum()]))
        found["holds_before"].append(holds_before)
        found["holds_after"].append((after.low <= 0) & (after.high >= 0))
    mean = {key: np.concatenate(parts) for key, parts in found.items()}
    out: dict[str, Any] = {"structure": name, "pairs": len(ids), "prompts": len(prompts), "latents": _NUM_LATENTS}
    for when in ("before", "after"):
        out[when] = {f"p <= {level}": float((mean[f"p_{when}"] <= level).mean()) for level in (0.05, 0.01, 0.001)}
        out[when] |= {"discoveries": float(mean[f"discoveries_{when}"].mean()), "interval holds 0": float(mean[f"holds_{when}"].mean())}  # fmt: skip
    return out


def _contrast_before(d_NF: np.ndarray, x_N: np.ndarray, cluster_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Before: signs of d and x turned together, and percentiles of resampled prompts."""
    rng = np.random.default_rng(seed)
    num = cluster_N.max() + 1
    member_CN = sparse.csr_array((np.ones(len(cluster_N)), (cluster_N, np.arange(len(cluster_N)))))
    d_CF, xd_CF = member_CN @ d_NF, member_CN @ (d_NF * x_N[:, None])
    x_C, xx_C, n_C = (member_CN @ column for column in (x_N, x_N**2, np.ones_like(x_N)))

    def intercepts(weight_PC: np.ndarray, sign_PC: np.ndarray) -> np.ndarray:
        turned_PC = weight_PC * sign_PC
        d, x, xd, xx, n = turned_PC @ d_CF, turned_PC @ x_C, weight_PC @ xd_CF, weight_PC @ xx_C, weight_PC @ n_C
        slope = (xd - x[:, None] * d / n[:, None]) / (xx - x**2 / n)[:, None]
        return (d - slope * x[:, None]) / n[:, None]

    ones = np.ones((1, num))
    observed_F = np.abs(intercepts(ones, ones)[0])
    signs = rng.choice([-1.0, 1.0], size=(4000, num))
    p_F = ((np.abs(intercepts(ones, signs)) >= observed_F * (1 - 1e-9)).sum(axis=0) + 1) / 4001
    counts = rng.multinomial(num, np.full(num, 1 / num), size=_RESAMPLES).astype(float)
    low_F, high_F = np.quantile(intercepts(counts, np.ones_like(counts)), [0.025, 0.975], axis=0)
    return p_F, (low_F <= 0) & (high_F >= 0)


def one_pair_prompts(num: int, mean_of_sd: float) -> list[Prompt]:
    """Prompts of one pair, whose chosen answer is shorter by so many standard deviations of the log ratio."""
    rng = np.random.default_rng(0)
    rejected = np.exp(rng.normal(5, 0.5, num))
    chosen = rejected * np.exp(rng.normal(0.5 * mean_of_sd, 0.5, num))
    return [Prompt(np.array(both), np.array([[0, 1]])) for both in zip(chosen, rejected, strict=True)]


def of_composites(worlds: int) -> dict[str, float]:
    """Coverage of figures of several means: Ties of 51 prompts, RM-Bench's overall of two domains, and an overall whose small subset is often all right."""

    def ties(rng: np.random.Generator, num: int) -> list[ScoredRow]:
        return [
            row for i in range(num)
            for row in (_row("Ties", f"ref:{i}", rng.normal([1.5, 0, 0, 0]), 1), _row("Ties", f"tied:{i}", rng.normal([1.5] * 3 + [0] * 4), 3))
        ]  # fmt: skip

    def styles(rng: np.random.Generator, num: int) -> list[ScoredRow]:
        return [_row(s, str(i), rng.normal([1] * 3 + [0] * 3) + 0.5 * rng.normal(), 3) for s in ("chat", "safety-refuse") for i in range(num)]  # fmt: skip

    def with_a_small_subset(accuracy: float) -> Callable[[np.random.Generator, int], list[ScoredRow]]:
        def draw(rng: np.random.Generator, num: int) -> list[ScoredRow]:
            sizes = {"Math": (200 * num, 0.7), "Safety": (num, accuracy)}
            return [_row(s, str(i), np.array([rng.random() < p, 0.5]), 1) for s, (size, p) in sizes.items() for i in range(size)]  # fmt: skip

        return draw

    many = np.random.default_rng(99)
    figures = [
        (
            f"overall, 1,000 rows at 70 % and 5 at {100 * p:.0f} %",
            REWARD_BENCH_2,
            with_a_small_subset(p),
            5,
            "overall",
            (0.7 + p) / 2,
        )
        for p in (0.7, 0.9, 0.97)
    ]
    figures += [
        (name, benchmark, draw, num, figure, benchmark.figures(draw(many, 30_000))[figure])
        for name, benchmark, draw, num, figure in (("Ties, 51 prompts", REWARD_BENCH_2, ties, 51, "Ties"), ("RM-Bench overall, 2 x 24 rows", RM_BENCH, styles, 24, "overall"))
    ]  # fmt: skip
    found = {}
    for name, benchmark, draw, num, figure, truth in figures:
        held = 0
        for world in range(worlds):
            low, high = figure_intervals(benchmark, draw(np.random.default_rng(world), num))[figure]
            held += low <= truth <= high
        found[name] = held / worlds
    return found


def _row(subset: str, row_id: str, scores: np.ndarray, num_correct: int) -> ScoredRow:
    return ScoredRow(subset, row_id, f"{subset}{row_id}", num_correct, scores, np.ones(len(scores)), np.zeros(len(scores)))  # fmt: skip


def _from_to(rows: list[dict[str, Any]], name: str, by: str | None = None) -> str:
    """Lowest and highest of the rows, or of their means by a field."""
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[row[by] if by else i].append(row[name])
    values = [float(np.mean(own)) for own in groups.values()]
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}"


def as_markdown(found: dict[str, Any]) -> str:
    """The tables of docs/evaluation.md."""
    lines = ["| prompts | accuracy, by accuracy: percentiles (before) | BCa-t (before) | now | now, by kind of world | now, large prompts harder | width now | by widths of percentiles |", "|--:|---|---|---|---|--:|--:|--:|"]  # fmt: skip
    for num in PROMPTS:
        own = [{**row, "world": f"{row['kind']} {row['size']}"} for row in found["accuracies"] if row["prompts"] == num]
        (harder,), own = [row for row in own if row["kind"] == UNEVEN[0]], [row for row in own if row["kind"] != UNEVEN[0]]  # fmt: skip
        cells = [*(_from_to(own, name, "accuracy") for name in ("percentiles", "bca", "after")), _from_to(own, "after", "world"), f"{100 * harder['after']:.1f}"]  # fmt: skip
        lines.append(
            f"| {num} | {' | '.join(cells)} | {100 * np.mean([row['width'] for row in own]):.1f} | {np.mean([row['ratio'] for row in own]):.2f} |"
        )
    lines += ["", "| prompts | difference: percentiles (before) | now | equal models: 0 left out before | now | McNemar, 5 % (before) | swaps of prompts, 5 % | width by that of percentiles |", "|--:|---|---|---|---|---|---|--:|"]  # fmt: skip
    for num in PROMPTS:
        own = [row for row in found["differences"] if row["prompts"] == num]
        equal = [{**row, **{f"out_{name}": 1 - row[name] for name in ("percentiles", "after")}} for row in own if row["equal"]]  # fmt: skip
        cells = [_from_to(own, "percentiles"), _from_to(own, "after"), *(_from_to(equal, name) for name in ("out_percentiles", "out_after", "p_mcnemar", "p_swap"))]  # fmt: skip
        lines.append(f"| {num} | {' | '.join(cells)} | {np.mean([row['ratio'] for row in own]):.2f} |")
    lines += ["", "| latents of length alone | | p <= .05 | p <= .01 | p <= .001 | of 300 called significant at FDR 5 % | interval holds 0 |", "|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for one in found["contrast"]:
        for when, name in (("before", "before"), ("after", "now")):
            v = one[when]
            lines.append(f"| {one['structure']} | {name} | {v['p <= 0.05']:.3f} | {v['p <= 0.01']:.4f} | {v['p <= 0.001']:.4f} | {v['discoveries']:.1f} | {100 * v['interval holds 0']:.1f} |")  # fmt: skip
    lines += ["", "| composite figure | holds the truth |", "|---|--:|"]
    lines += [f"| {name} | {100 * value:.1f} |" for name, value in found["composites"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench" / "coverage.json")
    options = parser.parse_args()
    prompts = demo_prompts()
    # Large worlds take longer, and their coverage varies less from one kind to another.
    worlds = {num: options.worlds if num < 100 else options.worlds // 2 for num in PROMPTS}
    of_demo = [prompts[i] for i in np.sort(np.random.default_rng(1).choice(len(prompts), 82, replace=False))]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        accuracies = [(prompts, num, accuracy, kind, worlds[num]) for num in PROMPTS for accuracy in ACCURACIES for kind in KINDS]  # fmt: skip
        accuracies += [(prompts, num, 0.85, UNEVEN, worlds[num]) for num in PROMPTS]
        differences = [(prompts, num, models, worlds[num] // 2) for num in PROMPTS for models in MODELS]
        contrasts = [(of_demo, "demo, 82 prompts", 8), *((one_pair_prompts(200, m), f"200 prompts of one pair, mean / sd of x {m}", 4) for m in (-1, -2, -3))]  # fmt: skip
        found = {
            "sizes": sorted(len(one.pairs) for one in prompts),
            "worlds": worlds,
            "accuracies": pool.map(of_accuracies, accuracies, chunksize=1),
            "differences": pool.map(of_differences, differences, chunksize=1),
            "contrast": pool.starmap(of_contrast, contrasts, chunksize=1),
            "composites": of_composites(options.worlds // 2),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
