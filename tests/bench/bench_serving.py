"""How fast the reward server is beside its own engine, and what requests, explanations and variants cost.

make bench BENCH=serving              MODEL=outputs/demo/sarm for a trained model and real conversations; without it, a tiny random one
python tests/bench/bench_serving.py --model outputs/demo/sarm --rounds 5

All ways take turns, `--rounds` times. A ratio is that of each round's two rates; given are its mean over rounds with a 95 % interval
(Student's t). Below 2 rounds there is none. On a machine that does anything beside, ratios say little: the load before and after is written down.

Conversations are 24 prompts with 4 answers each, scored by a server in a process of its own and by the engine in this one, in turn.
`http_vs_in_process`: one conversation a request, 64 clients at once, against the engine with all conversations in its queue.
`separate_vs_together`: the answers of a prompt in requests of their own, against one request. `vs_serve_rm`: the server, against padded
batches of 16 in the order of arrival, as OpenRLHF's own server reads them, without any HTTP. Idle latency: one request at a time, against
the forward pass alone.

vLLM's own server runs the same model, converted, where `make test-vllm` has set up its environment (or `SARM_VLLM` names its Python), and is
sent the same token ids, one conversation a request, 64 clients at once. `vs_vllm`: conversations of which no two share a prompt.
`vs_vllm_shared`: four answers to each prompt. Without that environment, or where vLLM cannot run the model, `vllm` says so.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.integrations.vllm.server import vllm_server  # noqa: E402
from tests.stages.random_sarm import random_sarm  # noqa: E402

from sarm.data.sources.layouts.layout import RawPair  # noqa: E402
from sarm.data.sources.pairs import open_pairs  # noqa: E402
from sarm.data.sources.tiny import tiny_model  # noqa: E402
from sarm.data.tokens.chat import load_chat_tokenizer  # noqa: E402
from sarm.data.tokens.packing import answer_row  # noqa: E402
from sarm.evaluate.intervals import student  # noqa: E402
from sarm.passes.models import sarm_settings  # noqa: E402
from sarm.passes.reader import Reader  # noqa: E402
from sarm.serve.engine import Engine, Tokenised  # noqa: E402
from sarm.settings.conversion import ConvertSarm  # noqa: E402
from sarm.settings.model import ModelSettings  # noqa: E402
from sarm.stages.convert_sarm import convert_sarm  # noqa: E402

OUT = Path("outputs/bench/serving.json")
NUM_PROMPTS, NUM_ANSWERS, CLIENTS, SERVE_RM_BATCH = 24, 4, 64, 16
BUDGETS = (512, 1024, 2048, 4096)
RATIOS = {
    "http_vs_in_process": ("http_64_clients", "in_process"),
    "separate_vs_together": ("http_64_clients", "together"),
    "explained_vs_plain": ("explained", "together"),
    "three_variants_vs_one": ("three_variants", "together"),
    "vs_serve_rm": ("http_64_clients", "padded_batches"),
    "vs_vllm": ("unshared", "vllm_unshared"),
    "vs_vllm_shared": ("http_64_clients", "vllm"),
}
VLLM = Path(os.environ.get("SARM_VLLM") or ROOT / ".venv-vllm" / "bin" / "python")
Message = dict[str, str]
Asked = list[tuple[list[Message], list[str]]]


def conversations(source: str) -> Asked:
    """Prompts with four answers each; where a prompt has fewer, answers of others fill up."""
    found: dict[str, tuple[list[Message], dict[str, None]]] = {}
    for pair in open_pairs(source):
        if isinstance(pair, RawPair):
            own = found.setdefault(json.dumps(pair.prompt), (pair.prompt, {}))[1]
            own |= dict.fromkeys((pair.chosen, pair.rejected))
    chosen = sorted(found.values(), key=lambda one: -len(one[1]))[:NUM_PROMPTS]
    others = [text for _, texts in found.values() for text in texts]
    return [
        (prompt, (list(texts) + others[NUM_ANSWERS * n : NUM_ANSWERS * (n + 1)])[:NUM_ANSWERS])
        for n, (prompt, texts) in enumerate(chosen)
    ]


def without_sharing(source: str) -> Asked:
    """As many prompts as there are conversations otherwise, if there are, with an answer each."""
    found: dict[str, tuple[list[Message], list[str]]] = {}
    for pair in open_pairs(source):
        if isinstance(pair, RawPair):
            found.setdefault(json.dumps(pair.prompt), (pair.prompt, [pair.chosen]))
    return list(found.values())[: NUM_PROMPTS * NUM_ANSWERS]


@contextlib.contextmanager
def serving(model: Path, budget: int, variants: list[str]) -> Iterator[tuple[str, float]]:
    """A server in a process of its own: its address, and seconds until it was ready."""
    command = [sys.executable, "jobs/serve.py", "--model", str(model), "--port", "0", "--cached", "0", "--batch-tokens", str(budget)]  # fmt: skip
    if variants:
        command += ["--variants", *variants]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit("serving: the server did not start")
        yield line.split()[-1], time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


async def _asked(address: str, bodies: list[dict[str, Any]], clients: int, path: str = "/v1/rewards") -> list[float]:
    """Seconds of each request, `clients` of them under way at a time."""
    waiting = asyncio.Semaphore(clients)
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False) as client:

        async def one(body: dict[str, Any]) -> float:
            async with waiting:
                began = time.perf_counter()
                found = await client.post(path, json=body)
                assert found.status_code == 200, found.text
                return time.perf_counter() - began

        return list(await asyncio.gather(*map(one, bodies)))


def over_http(address: str, bodies: list[dict[str, Any]], num: int, path: str = "/v1/rewards") -> float:
    """Conversations a second."""
    began = time.perf_counter()
    asyncio.run(_asked(address, bodies, CLIENTS, path))
    return num / (time.perf_counter() - began)


@contextlib.contextmanager
def vllm_running(model: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """The address of vLLM's server on the converted model, or none and why."""
    if not VLLM.exists():
        yield "", "absent: its environment is not set up here (make test-vllm)"
        return
    with contextlib.ExitStack() as stack:
        try:
            convert_sarm(ConvertSarm(source=model, target=scratch / "vllm", format="vllm", on_cut_off="refuse"))
            place = stack.enter_context(vllm_server(str(VLLM), scratch / "vllm", scratch / "vllm.log"))
        except (RuntimeError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if "Error" in line]
            place, reason = "", f"absent: it cannot run this model: {(lines or [str(error)])[-1][-300:]}"
        yield place, "" if place else reason


def of_vllm(tokens: list[list[int]]) -> list[dict[str, Any]]:
    """Requests of one conversation each."""
    return [{"model": "sarm", "input": ids, "use_activation": False} for ids in tokens]


def vllm_difference(address: str, model: Reader, tokens: list[list[int]]) -> float:
    """The largest difference of standardised rewards: what is timed does the same."""
    found = httpx2.post(f"{address}/classify", json={"model": "sarm", "input": tokens}, timeout=600, trust_env=False).json()["data"]  # fmt: skip
    own = model.read([answer_row(place, ids) for place, ids in enumerate(tokens)])
    mean, std = model.model.config.reward_mean, model.model.config.reward_std
    return max(abs(one["probs"][0] - (own[place].reward - mean) / std) for place, one in enumerate(found))


def in_process(reader: Reader, answers: list[Tokenised], threads: int) -> float:
    """Conversations a second of the engine, with all of them in its queue."""
    engine = Engine(reader, threads=threads, max_wait=86_000.0, cached=0)
    began = time.perf_counter()
    futures = engine.submit(answers)
    engine.start()
    for future in futures:
        future.result()
    seconds = time.perf_counter() - began
    engine.stop()
    return len(answers) / seconds


@torch.inference_mode()
def padded_batches(reader: Reader, answers: list[Tokenised]) -> float:
    """Conversations a second of forward passes on batches of 16, padded, in the order of arrival."""
    began = time.perf_counter()
    for first in range(0, len(answers), SERVE_RM_BATCH):
        batch = [list(one.ids) for one in answers[first : first + SERVE_RM_BATCH]]
        length = max(map(len, batch))
        ids = torch.tensor([own + [reader.chat.pad_id] * (length - len(own)) for own in batch])
        mask = torch.tensor([[1] * len(own) + [0] * (length - len(own)) for own in batch])
        reader.model(input_ids=ids, attention_mask=mask)
    return len(answers) / (time.perf_counter() - began)


def latency(reader: Reader, address: str, answers: list[Tokenised], bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of requests that come one at a time, and of the forward pass on the same conversations; medians."""
    asked = asyncio.run(_asked(address, bodies[:32], 1))
    passes = []
    for one in answers[:32]:
        began = time.perf_counter()
        reader.read([answer_row("one", one.ids)])
        passes.append(time.perf_counter() - began)
    request, forward = 1000 * statistics.median(asked), 1000 * statistics.median(passes)
    return {"request_ms": request, "forward_ms": forward, "added_ms": request - forward}


def write_edits(model: Path, folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        weight_S = file.get_tensor("score.weight").squeeze(0)
    for n, name in enumerate(("one", "two")):
        edit = [{"latent": latent, "before": float(weight_S[latent]), "after": 0.0} for latent in range(n, 40, 2)]
        (folder / f"{name}.json").write_text(json.dumps({"weights": edit}))
    return [f"{name}={folder / name}.json" for name in ("one", "two")]


def measure(
    model: Path, asked: Asked, apart: Asked, rounds: int, scratch: Path, vllm: str, missing: str
) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    chat = Reader(model, sarm_settings(model)).chat
    tokens = [chat.encode_responses(prompt, answers) for prompt, answers in asked]
    answers = [
        Tokenised(one.ids, min(len(own[0].ids), _shared([list(other.ids) for other in own])))
        for own in tokens
        for one in own
    ]
    readers = {budget: Reader(model, sarm_settings(model), batch_tokens=budget).ready(threads) for budget in BUDGETS}
    by_budget = {
        budget: max(in_process(reader, answers, threads) for _ in range(2)) for budget, reader in readers.items()
    }
    budget = max(by_budget, key=lambda one: by_budget[one])
    reader, num = readers[budget], len(answers)
    one = [{"items": [{"messages": [*prompt, {"role": "assistant", "content": text}]}]} for prompt, own in asked for text in own]  # fmt: skip
    together = [{"items": [{"prompt": prompt, "completions": own}]} for prompt, own in asked]
    explained = [{**body, "explain": {"top": 8}} for body in together]
    three = [{**body, "variants": ["base", "one", "two"]} for body in together]
    unshared = [{"items": [{"prompt": prompt, "completions": own}]} for prompt, own in apart]
    theirs = [[list(one.ids) for own in tokens for one in own], [list(chat.encode_responses(*own)[0].ids) for own in apart]]  # fmt: skip
    with serving(model, budget, write_edits(model, scratch)) as (address, seconds):
        ways: dict[str, Callable[[], float]] = {
            "in_process": lambda: in_process(reader, answers, threads),
            "http_64_clients": lambda: over_http(address, one, num),
            "together": lambda: over_http(address, together, num),
            "explained": lambda: over_http(address, explained, num),
            "three_variants": lambda: over_http(address, three, num),
            "padded_batches": lambda: padded_batches(reader, answers),
        }
        if vllm:
            ways["unshared"] = lambda: over_http(address, unshared, len(unshared))
            ways["vllm_unshared"] = lambda: over_http(vllm, of_vllm(theirs[1]), len(unshared), "/classify")
            ways["vllm"] = lambda: over_http(vllm, of_vllm(theirs[0]), num, "/classify")
        rates: dict[str, list[float]] = {name: [] for name in ways}
        before = os.getloadavg()[0]
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(way())
        idle = latency(reader, address, answers, one)
        after = os.getloadavg()[0]
    middle = {name: statistics.median(own) for name, own in rates.items()}
    return {
        "model": model.name,
        "conversations": num,
        "tokens": sum(len(a.ids) for a in answers),
        "threads": threads,
        "rounds": rounds,
        "batch_tokens": budget,
        "per_second_by_budget": by_budget,
        "per_second": {name: {"median": middle[name], "all": own} for name, own in rates.items()},
        "load": {"before": before, "after": after},
        "vllm": missing
        or {
            "version": httpx2.get(f"{vllm}/version", trust_env=False).json()["version"],
            "largest_difference": vllm_difference(vllm, reader, theirs[0]),
        },
        **{name: ratio(rates[own], rates[other]) for name, (own, other) in RATIOS.items() if other in rates},
        "idle": idle,
        "seconds_until_ready": seconds,
    }


def ratio(own: list[float], other: list[float]) -> dict[str, Any]:
    """The mean over rounds of the ratio of two rates, with its 95 % interval."""
    each = [a / b for a, b in zip(own, other, strict=True)]
    mean = statistics.mean(each)
    half = student(len(each) - 1) * statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return {"mean": mean, "ci95": None if half is None else [mean - half, mean + half], "all": each}


def _shared(lists: list[list[int]]) -> int:
    """How many first tokens all of them have in common, short of their ends."""
    limit = min(map(len, lists)) - 1
    return next((n for n in range(limit) if len({own[n] for own in lists}) > 1), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description="the reward server beside its engine")
    parser.add_argument("--model", default=os.environ.get("MODEL", "tiny"), help="a SARM's folder, or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if settings.model == "tiny":
            chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), tiny_model())
            model, source = random_sarm(Path(scratch) / "sarm", tiny_model(), chat), "tiny:pairs"
        else:
            model, source = Path(settings.model).absolute(), "demo:harm"
        asked, apart = conversations(source), without_sharing(source)
        with vllm_running(model, Path(scratch)) as (vllm, missing):
            figures = measure(
                model=model,
                asked=asked,
                apart=apart,
                rounds=settings.rounds,
                scratch=Path(scratch),
                vllm=vllm,
                missing=missing,
            )
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{name.replace('_', ' '):28s}{value:12.3f}")
    print(f"{'vllm':28s}{figures['vllm'] if missing else json.dumps(figures['vllm'])}")
    for name in [name for name in RATIOS if name in figures]:
        ends = figures[name]["ci95"]
        print(f"{name.replace('_', ' '):28s}{figures[name]['mean']:12.3f}" + (f"  [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""))  # fmt: skip
    for name, value in figures["idle"].items():
        print(f"idle {name.replace('_', ' '):23s}{value:12.3f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
