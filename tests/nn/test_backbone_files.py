"""Checkpoints of a language model in every state: read as what is in them, or refused in one line."""

import json
import shutil

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.nn.family_options import D_IN, NUM_LAYERS, VOCABULARY
from tests.nn.test_backbone import random_ids, residual_alone
from tests.passes.foreign_checkpoints import save
from transformers import LlamaConfig, LlamaModel

from sarm.data.formats.model_files import check_model_files
from sarm.nn.pretrained import load_backbone
from sarm.settings.checks import UserError

LAYER = 2
IDS = random_ids(1, 1, 9)


@st.composite
def checkpoints(draw: st.DrawFn) -> dict:
    return {
        "prefix": draw(st.sampled_from(["model.", "model.", "", "language_model.model.", "module.", "transformer."])),
        "dropped": draw(st.sampled_from(["", "", "", "embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.2.mlp.up_proj.weight", "norm.weight"])),
        "renamed": draw(st.sampled_from(["", "", "", "layers.1.mlp.up_proj.weight", "norm.weight"])),
        "widened": draw(st.sampled_from(["", "", "", "layers.1.self_attn.k_proj.weight", "layers.2.self_attn.k_proj.weight"])),
        "surplus": draw(st.sampled_from(["", "", "", "layers.0.extra.weight", "layers.2.extra.weight", "lm_head.weight"])),
        "rows": draw(st.sampled_from([VOCABULARY, VOCABULARY, VOCABULARY, VOCABULARY - 1, VOCABULARY + 7])),
        "tied": draw(st.booleans()),
        "pad": draw(st.sampled_from([None, 0, 0, VOCABULARY + 3])),
        "depth": draw(st.sampled_from([NUM_LAYERS, NUM_LAYERS, LAYER, LAYER - 1])),
        "shards": draw(st.integers(1, 3)),
        "lost_shard": draw(st.sampled_from([False, False, False, True])),
    }  # fmt: skip


@given(checkpoints())
@settings(max_examples=max(80, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_backbone_ends_in_a_traceback_or_with_a_weight_that_is_in_no_file(family_folder, tmp_path, how):
    source = family_folder("llama")
    shutil.rmtree(tmp_path)
    body = {k.removeprefix("model."): t for k, t in load_file(source / "model.safetensors").items() if "lm_head" not in k}  # fmt: skip
    body["embed_tokens.weight"] = torch.cat([body["embed_tokens.weight"], torch.zeros(100, D_IN)])[: how["rows"]]
    body.pop(how["dropped"], None)
    if how["renamed"] in body:
        body[how["renamed"].replace("weight", "weights")] = body.pop(how["renamed"])
    if how["widened"] in body:
        body[how["widened"]] = torch.cat([body[how["widened"]]] * 2)
    if how["surplus"]:
        body[how["surplus"]] = torch.zeros(3)
    save(tmp_path, {f"{how['prefix']}{name}": tensor for name, tensor in body.items()}, shards=how["shards"])
    config = json.loads((source / "config.json").read_text())
    config |= {"tie_word_embeddings": how["tied"], "pad_token_id": how["pad"], "num_hidden_layers": how["depth"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if how["lost_shard"]:
        min(tmp_path.glob("*.safetensors")).unlink()
    torch.manual_seed(7)
    found, said = None, ""
    try:
        check_model_files(tmp_path)
        found = residual_alone(load_backbone(str(tmp_path), LAYER), IDS)
    except (ValueError, UserError) as error:
        said = str(error)
    assert "\n" not in said
    if found is None:
        return
    model = LlamaModel(LlamaConfig.from_pretrained(source)).eval()
    kept = {name: t for name, t in body.items() if name.startswith(("embed_tokens.", "layers.0.", "layers.1."))}
    missing, surplus = model.load_state_dict(kept, strict=False)
    assert not surplus
    assert all(name.startswith(("layers.2.", "norm.")) for name in missing)
    with torch.no_grad():
        wanted = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[LAYER]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
