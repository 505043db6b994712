"""Codes made by hand: few prompts, few latents, and a head whose effects can be worked out on paper."""

import numpy as np
import pyarrow as pa
import pytest

from sarm.audit.codes import CODE_PAIRS, RESPONSES, AuditCodes, codes_of

# Latent 1 fires for chosen, 2 for rejected responses, 3 for longer ones, 4 at random, 0 always; 5 never.
WEIGHT = np.array([0.5, 1.0, -2.0, 0.25, 0.125, 3.0], dtype=np.float32)
D_IN = 4


def response(name: str, prompt: str, values: dict[int, float], tokens: int, sentences: list[dict[int, float]]) -> dict:
    on = {latent: np.float32(value) for latent, value in values.items() if value}
    return {
        "response_id": name,
        "prompt_id": prompt,
        "answer_tokens": tokens,
        "reward": sum(float(WEIGHT[i]) * float(v) for i, v in on.items()),
        "latents": list(on),
        "values": list(on.values()),
        "sentence_latents": [i for end in sentences for i in end],
        "sentence_values": [v for end in sentences for v in end.values()],
        "sentence_sizes": [len(end) for end in sentences],
        "residual": np.arange(D_IN, dtype=np.float32).tobytes(),
    }


def tables(num_prompts: int = 40, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Two pairs a prompt; prompts take turns to be selecting, target and off-target, where only latents 0 and 4 fire."""
    rng = np.random.default_rng(seed)
    responses, pairs = [], []
    for p in range(num_prompts):
        prompt, role = f"p{p}", ("select", "target", "off_target")[p % 3]
        is_off = role == "off_target"
        for side, count in (("c", 2), ("r", 1)):
            for i in range(count):
                safe, unsafe = (0.0, 0.0) if is_off else (rng.uniform(0.5, 1), 0.0) if side == "c" else (0.0, rng.uniform(0.5, 1))  # fmt: skip
                tokens = int(rng.integers(10, 40))
                values = {0: 1.0, 1: safe, 2: unsafe, 3: tokens / 40, 4: rng.uniform(0.1, 1) * (rng.random() < 0.5)}
                ends = [{1: safe, 2: unsafe} if not is_off else {}, {4: 1.0}] * (2 if side == "c" else 1)
                responses.append(response(f"{prompt}{side}{i}", prompt, values, tokens, [{k: v for k, v in e.items() if v} for e in ends]))  # fmt: skip
        for i in range(2):
            pairs.append(
                {
                    "pair_id": f"{prompt}-{i}",
                    "prompt_id": prompt,
                    "role": role,
                    "subset": "other" if is_off else f"harm{p % 2}",
                    "source": "made",
                    "chosen_id": f"{prompt}c{i}",
                    "rejected_id": f"{prompt}r0",
                    "margin": None if is_off else 0.25 + i,
                }
            )
    return pa.Table.from_pylist(responses, schema=RESPONSES), pa.Table.from_pylist(pairs, schema=CODE_PAIRS)


@pytest.fixture(scope="session")
def codes() -> AuditCodes:
    return codes_of(*tables(), WEIGHT)
