"""Named whole configurations. Any flag overrides any value: `python jobs/pipeline.py demo --sae.k 54`.

The papers' presets carry the papers' sources, layers, widths, rates and batch sizes; where a paper leaves something open,
a comment says what was chosen.
"""

from dataclasses import replace
from pathlib import Path

from sarm.settings.contexts import ContextsSettings
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.jobs import Pipeline
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import ChainSettings
from sarm.settings.sae import SaeSettings

_OPENWEBTEXT2 = "hf:segyges/OpenWebText2"
_SKYWORK = "hf:Skywork/Skywork-Reward-Preference-80K-v0.2"

tiny = Pipeline(
    run=ChainSettings(out=Path("outputs/tiny"), cpus_per_worker=1),
    model=ModelSettings(name="tiny:llama", layer=1, max_length=128),
    data=DataSettings(texts=("tiny:texts",), pairs=("tiny:pairs",)),
    extraction=ExtractionSettings(batch_tokens=1024),
    sae=SaeSettings(
        heldout_share=0.1,
        d_sae=256,
        k=8,
        batch_size=64,
        text_epochs=3,
        chat_epochs=6,
        lr=2e-3,
        chat_lr=2e-3,
        cross_entropy_texts=8,
    ),
    reward=RewardSettings(lr=1e-4, head_lr=5e-3, epochs=2, batch_pairs=16, batch_tokens=1024),
    evaluation=EvaluationSettings(top_features=5, contexts_per_feature=3),
    contexts=ContextsSettings(split="heldout", top=5, per_decile=1, span_contexts=1, batch_tokens=1024),
)

demo = Pipeline(
    run=ChainSettings(out=Path("outputs/demo")),
    model=ModelSettings(name="demo:smollm2", layer=15, max_length=512, dtype="auto"),
    data=DataSettings(
        texts=("demo:openwebtext", "demo:wikipedia"),
        pairs=("demo:harm",),
        responses=("demo:answers",),
        max_texts=300,
        heldout_share=0.25,
    ),
    # 0 and auto: as the device has it, whatever model takes the place of this one.
    extraction=ExtractionSettings(units=(TURN_END,), batch_tokens=0),
    # Four latents for each dimension, which is three rows a latent: docs/dictionaries.md compares with the papers' recipe.
    sae=SaeSettings(
        recipe="turn_ends",
        d_sae=4 * 576,
        k=27,
        batch_size=256,
        steps=1120,
        lr=1e-3,
        shares=(0.65, 0.35),
        reward_share=0.1,
    ),
    # One pass over 1,500 pairs moves a zero head too little. The rates were chosen on training prompts that were left out: 3e-5 and
    # 1e-3 undid the start. Stage 0, since one worker has nothing to shard.
    reward=RewardSettings(
        lr=5e-6,
        head_lr=1e-4,
        head_init="probe",
        epochs=1,
        batch_pairs=16,
        batch_tokens=0,
        zero_stage=0,
        precision="auto",
    ),
    # Half a minute; docs/interpretation.md has the flags that read everything and look for driving sentences.
    contexts=ContextsSettings(split="heldout", span_answers=0),
)

demo_papers = replace(
    demo,
    run=ChainSettings(out=Path("outputs/demo-papers")),
    data=replace(demo.data, responses=()),
    extraction=ExtractionSettings(batch_tokens=0),
    sae=SaeSettings(d_sae=16 * 576, k=27, batch_size=256, text_epochs=10, chat_epochs=40, lr=5e-4, chat_lr=1e-3),
)

# SARM section 4.1: Adam 5e-4 for the SAE, 16 d_in latents, k = 3/64 d_in; backbone 4e-6, 8 pairs a step, 3 epochs.
# The head's own rate is ours: at the backbone's rate a zero head is still growing when training ends.
# SARM trains its dictionaries on 50 M sentences, about a billion tokens: OpenWebText2 has fifteen times as many, at 44 sentences a text.
_sarm = Pipeline(
    model=ModelSettings(dtype="bfloat16", max_length=4096),
    data=DataSettings(
        texts=(_OPENWEBTEXT2,),
        pairs=(_SKYWORK,),
        max_texts=1_300_000,
        heldout_share=0.02,
        max_pairs_per_prompt=None,
    ),
    extraction=ExtractionSettings(batch_tokens=0, units=("sentence",), limit_sentences=50_000_000),
    sae=SaeSettings(batch_size=4096, lr=5e-4, chat_lr=3e-4),
    reward=RewardSettings(
        lr=4e-6,
        head_lr=1e-3,
        epochs=3,
        batch_pairs=8,
        batch_tokens=8192,
        # Raised to 3 where one GPU holds everything: docs/gpu.md has the memory.
        zero_stage=2,
        precision="bfloat16",
        gradient_checkpointing=True,
    ),
    contexts=ContextsSettings(),
)

sarm_1b = replace(
    _sarm,
    run=ChainSettings(out=Path("outputs/sarm-1b")),
    model=replace(_sarm.model, name="meta-llama/Llama-3.2-3B-Instruct", layer=14),
    sae=replace(_sarm.sae, d_sae=49152, k=144),
)

sarm_2b = replace(sarm_1b, run=ChainSettings(out=Path("outputs/sarm-2b")), model=replace(sarm_1b.model, layer=21))

sarm_4b = replace(
    _sarm,
    run=ChainSettings(out=Path("outputs/sarm-4b")),
    model=replace(_sarm.model, name="meta-llama/Llama-3.1-8B-Instruct", layer=16),
    sae=replace(_sarm.sae, d_sae=65536, k=192),
)

# SAFER's code: 8 d_in latents, k 64, layer 12 of 16; SAE 5e-4 on web text, then 3e-4 on preference text; reward model 2e-5,
# 2 epochs, 128 pairs a device. It scripts the 1B model only: the 3B preset keeps its ratios (layer 21 of 28). Its web text is named
# 100M, which is taken for tokens.
_safer = replace(
    _sarm,
    extraction=replace(_sarm.extraction, units=("document",), limit_tokens=100_000_000),
    data=DataSettings(
        texts=(_OPENWEBTEXT2,),
        pairs=("hf:PKU-Alignment/PKU-SafeRLHF",),
        max_texts=130_000,
        heldout_share=0.05,
        max_pairs_per_prompt=None,
    ),
    reward=replace(_sarm.reward, lr=2e-5, epochs=2, batch_pairs=128, weight_decay=1e-3, warmup_share=0.03),
)

safer_1b = replace(
    _safer,
    run=ChainSettings(out=Path("outputs/safer-1b")),
    model=replace(_safer.model, name="meta-llama/Llama-3.2-1B-Instruct", layer=12),
    sae=replace(_safer.sae, d_sae=16384, k=64),
)

safer_3b = replace(
    _safer,
    run=ChainSettings(out=Path("outputs/safer-3b")),
    model=replace(_safer.model, name="meta-llama/Llama-3.2-3B-Instruct", layer=21),
    sae=replace(_safer.sae, d_sae=24576, k=96),
)


def _with_turn_ends(papers: Pipeline) -> Pipeline:
    """A paper's model and sizes, with a dictionary that learns where the reward is read.

    Untested at these sizes. 25 million rows: six or so passes over the sentences of 160,000 responses, one over those of 250,000 texts.
    """
    return replace(
        papers,
        run=ChainSettings(out=papers.run.out.with_name(f"{papers.run.out.name}-turn-ends")),
        data=replace(papers.data, max_texts=300_000),
        extraction=replace(papers.extraction, units=(TURN_END,), limit_tokens=250_000_000),
        sae=replace(papers.sae, recipe="turn_ends", steps=6_000, reward_share=0.1),
    )


PRESETS: dict[str, tuple[str, Pipeline]] = {
    "tiny": ("random 2-layer Llama and made-up data: seconds, offline, for tests", tiny),
    "demo": ("SmolLM2-135M-Instruct at half depth on human-labelled safety pairs: minutes on 2 cores", demo),
    "demo-papers": (
        "the same with the papers' recipe for the dictionary: 9,216 latents from sentence ends, then chat ends",
        demo_papers,
    ),
    "sarm-1b": ("SARM-1B: Llama-3.2-3B-Instruct, layer 14, 49,152 latents, k 144", sarm_1b),
    "sarm-2b": ("SARM-2B: Llama-3.2-3B-Instruct, layer 21, 49,152 latents, k 144", sarm_2b),
    "sarm-4b": ("SARM-4B: Llama-3.1-8B-Instruct, layer 16, 65,536 latents, k 192", sarm_4b),
    "safer-1b": ("SAFER on Llama-3.2-1B-Instruct: layer 12, 16,384 latents, k 64", safer_1b),
    "safer-3b": ("SAFER on Llama-3.2-3B-Instruct: layer 21, 24,576 latents, k 96", safer_3b),
    **{
        f"{name}-turn-ends": (
            f"{name} with a dictionary that learns at turn ends, aware of the reward (untested at this size)",
            _with_turn_ends(papers),
        )
        for name, papers in (
            ("sarm-1b", sarm_1b),
            ("sarm-2b", sarm_2b),
            ("sarm-4b", sarm_4b),
            ("safer-1b", safer_1b),
            ("safer-3b", safer_3b),
        )
    },
}
