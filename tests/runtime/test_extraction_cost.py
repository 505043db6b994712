import json

from sarm.config import Extraction, Model, Run
from sarm.runtime.extraction.extraction_cost import KNOWN_SHAPES, describe_extraction


def test_the_weights_of_a_block_are_the_models():
    from transformers import AutoConfig

    from sarm.data.models import model_folder
    from sarm.nn.backbone import load_backbone

    folder = model_folder(Model(name="demo:smollm2"))
    about = AutoConfig.from_pretrained(folder)
    shape = KNOWN_SHAPES["demo:smollm2"]
    assert (shape.d_in, shape.d_ff) == (about.hidden_size, about.intermediate_size)
    block = load_backbone(folder, 1).layers[0]
    assert sum(p.numel() for p in block.parameters() if p.dim() == 2) == shape.weights_a_block


def test_the_papers_run_from_assumptions(tmp_path):
    said = describe_extraction(
        Run(out=tmp_path, num_actors=4), Model(name="meta-llama/Llama-3.2-3B-Instruct", layer=14), Extraction()
    )
    assert "1,000,000,000 tokens (assumed" in said
    assert "310.20 GB" in said
    assert "assumed: H100s at 40%" in said


def test_a_corpus_that_is_there_is_counted_and_limits_and_a_measured_rate_are_used(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps({"counts": {"rows": 100, "characters": 44_000}}))
    run, model = Run(out=tmp_path), Model(name="x/y", layer=3)
    said = describe_extraction(run, model, Extraction(), 10.0)
    assert "100 texts, 10,000 tokens" in said
    assert "0.278 hours of one actor" in said
    assert "50 texts, 5,000 tokens" in describe_extraction(run, model, Extraction(limit_tokens=5000))
    assert "hours are not known" in describe_extraction(run, model, Extraction())
