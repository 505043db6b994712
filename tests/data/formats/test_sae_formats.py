"""SAE files: their exact layouts, what is folded, round trips, and what is refused. `tests/formats` asks the libraries themselves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nn.every_sae import KINDS, kind_of
from torch import Tensor

from sarm.data.formats.sae_formats import FORMATS, export_sae, import_sae, with_relu
from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, sae_of, weights_of, with_input_bias
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae, dense
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError

D_IN, D_SAE, K = 8, 20, 3
METADATA = {"activations": {"model": "some/model", "layer": 4}}


def made(architecture: str = "topk") -> Sae:
    sae = build_sae(**kind_of(architecture), d_in=D_IN, d_sae=D_SAE, k=K)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if name == "threshold":
                tensor.abs_()
        if architecture in ("batch_topk", "matryoshka"):
            sae.state_dict()["threshold"].fill_(0.6)
        if sae.is_tied:
            sae.normalise_decoder_()
    return sae


def computed(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        codes = sae(x)
        return dense(codes, D_SAE), sae.decode(codes)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3)) * 2 + 1


HELD = [(kind, format) for kind in KINDS for format, known in FORMATS.items() if made(kind).exported_as in known.holds]
REFUSED = [(kind, format) for kind in KINDS for format in FORMATS if (kind, format) not in HELD]


def test_formats_hold_what_their_libraries_know():
    assert {kind: [format for of, format in HELD if of == kind] for kind in KINDS} == {
        "topk": ["saelens", "saelens_residual", "sparsify", "dictionary_learning", "pt"],
        "signed": ["pt"],
        **{
            kind: ["saelens", "saelens_residual", "dictionary_learning"]
            for kind in ("batch_topk", "matryoshka", "jumprelu")
        },
        "abs_topk": [],
        "matching_pursuit": ["saelens", "saelens_residual"],
    }


@pytest.mark.parametrize(("architecture", "format"), HELD)
def test_what_is_exported_comes_back_with_codes_origin_and_training(tmp_path, x, architecture, format):
    sae = made(architecture)
    export_sae(weights_of(sae, METADATA), tmp_path / "out", format)
    found = import_sae(tmp_path / "out")
    assert found.input == STANDARDISED
    assert found.metadata["activations"] == METADATA["activations"]
    back = sae_of(found)
    assert (type(back), back.k, back.describe()) == (type(sae), sae.k, sae.describe())
    for one, other in zip(computed(back, x), computed(sae, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("architecture", "format"), REFUSED)
def test_an_sae_whose_rule_a_format_does_not_know_is_refused_and_nothing_is_written(tmp_path, architecture, format):
    with pytest.raises(UserError, match=r"knows only|puts a ReLU behind TopK"):
        export_sae(weights_of(made(architecture), METADATA), tmp_path / "out", format)
    assert not any(tmp_path.iterdir())


class NewSae(TopKSae):
    """As somebody would add one, who does not think of other libraries' files."""

    architecture = exported_as = "new"


@pytest.mark.parametrize("format", FORMATS)
def test_a_new_architecture_is_refused_by_every_foreign_format(tmp_path, format):
    with pytest.raises(UserError, match=r"this SAE's rule is new\. Only this platform's own folders hold it"):
        export_sae(weights_of(NewSae(D_IN, D_SAE, K), METADATA), tmp_path / "out", format)


def test_weights_that_are_not_what_they_say_they_were_trained_as_are_refused(tmp_path):
    folder = saelens_file(tmp_path / "a", {"metadata": {"sae": {"architecture": "abs_topk", "k": K}}})
    with pytest.raises(UserError, match=r"says that it was trained as .*abs_topk.* its weights are those of topk"):
        sae_of(import_sae(folder))
    folder = saelens_file(tmp_path / "b", {"metadata": {"sae": {"architecture": "gated", "k": K}}})
    with pytest.raises(UserError, match="which cannot be: there is no SAE architecture 'gated'"):
        sae_of(import_sae(folder))


def matching_pursuit_file(folder: Path, **config) -> Path:
    """As SAELens writes it: one matrix."""
    w = weights_of(made("matching_pursuit"), {}).tensors()
    folder.mkdir()
    save_file({name: w[name] for name in ("W_dec", "b_dec")}, folder / "sae_weights.safetensors")
    said = {"architecture": "matching_pursuit", "d_in": D_IN, "d_sae": D_SAE, "metadata": {}, **config}
    (folder / "cfg.json").write_text(json.dumps(said))
    return folder


def test_saelens_holds_matching_pursuit_of_so_many_steps(tmp_path, x):
    sae = made("matching_pursuit")
    export_sae(weights_of(sae, METADATA), tmp_path / "out", "saelens")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    ends = {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    assert {name: config[name] for name in ("architecture", *ends)} == {"architecture": "matching_pursuit", **ends}
    assert load_file(tmp_path / "out" / "sae_weights.safetensors").keys() == {"W_dec", "b_dec"}
    foreign = sae_of(import_sae(matching_pursuit_file(tmp_path / "theirs", **ends)))
    torch.testing.assert_close(computed(foreign, x), computed(sae, x))
    without = sae_of(import_sae(matching_pursuit_file(tmp_path / "b", **{**ends, "max_iterations": None})))
    assert without.k == D_IN, "SAELens takes as many steps as rows are wide"
    others = ({**ends, "residual_threshold": 0.01}, {**ends, "stop_on_duplicate_support": True}, {"max_iterations": K})
    for number, config in enumerate(others):
        folder = matching_pursuit_file(tmp_path / f"c{number}", **config)
        with pytest.raises(UserError, match="ends by another rule than its number of steps"):
            import_sae(folder)


LAYOUTS = {
    "saelens": ("sae_weights.safetensors", {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}),
    "sparsify": ("sae.safetensors", {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}),
    "dictionary_learning": ("ae.pt", {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE), "b_dec": (D_IN,), "k": (), "threshold": ()}),
    "pt": ("sae.pt", {"pre_bias": (D_IN,), "latent_bias": (D_SAE,), "encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}),
}  # fmt: skip


@pytest.mark.parametrize("format", LAYOUTS)
def test_files_are_named_and_shaped_as_the_library_has_them(tmp_path, format):
    export_sae(weights_of(made(), METADATA), tmp_path / "out", format)
    name, shapes = LAYOUTS[format]
    path = tmp_path / "out" / name
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes


def test_configs_say_what_the_libraries_read(tmp_path):
    for format in ("saelens", "sparsify", "dictionary_learning"):
        export_sae(weights_of(made(), METADATA), tmp_path / format, format)
    lens = json.loads((tmp_path / "saelens" / "cfg.json").read_text())
    assert (lens["architecture"], lens["d_in"], lens["d_sae"], lens["k"]) == ("topk", D_IN, D_SAE, K)
    assert (lens["apply_b_dec_to_input"], lens["normalize_activations"]) == (True, "none")
    # The residual stream after 4 blocks is the output of block number 3.
    assert (lens["metadata"]["model_name"], lens["metadata"]["hook_name"]) == ("some/model", "blocks.3.hook_resid_post")
    sparse = json.loads((tmp_path / "sparsify" / "cfg.json").read_text())
    assert {key: sparse[key] for key in ("activation", "num_latents", "k", "d_in", "transcode")} == {
        "activation": "topk", "num_latents": D_SAE, "k": K, "d_in": D_IN, "transcode": False,
    }  # fmt: skip
    trainer = json.loads((tmp_path / "dictionary_learning" / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"], trainer["layer"]) == ("AutoEncoderTopK", K, 3)


def test_saelens_is_told_to_standardise_residuals(tmp_path):
    export_sae(weights_of(made(), METADATA), tmp_path / "out", "saelens_residual")
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["normalize_activations"] == "layer_norm"
    with pytest.raises(UserError, match="takes raw residuals as it is"):
        export_sae(
            SaeWeights(**{**vars(weights_of(made(), {})), "input": RESIDUAL}), tmp_path / "b", "saelens_residual"
        )


def saelens_file(folder: Path, config: dict, **tensors: Tensor) -> Path:
    folder.mkdir()
    weights = weights_of(made(), {}).tensors() | tensors
    save_file(weights, folder / "sae_weights.safetensors")
    said = {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": K, "metadata": {}, **config}
    (folder / "cfg.json").write_text(json.dumps(said))
    return folder


def test_a_bias_that_is_not_taken_off_the_input_is_folded_exactly(tmp_path, x):
    folder = saelens_file(tmp_path / "a", {"apply_b_dec_to_input": False})
    w = load_file(folder / "sae_weights.safetensors")
    pre = x.double() @ w["W_enc"].double() + w["b_enc"].double()
    wanted = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values.relu())
    codes, _ = computed(sae_of(import_sae(folder)), x)
    torch.testing.assert_close(codes.double(), wanted, rtol=1e-5, atol=1e-5)


def test_folding_a_bias_in_and_out_costs_one_rounding():
    weights = weights_of(made(), {})
    again = with_input_bias(weights.without_input_bias(), weights.b_dec, weights.W_enc)
    torch.testing.assert_close(again, weights.b_enc, rtol=0, atol=2e-6)


def test_decoder_norms_that_scale_the_codes_are_folded(tmp_path, x):
    folder = saelens_file(tmp_path / "a", {"rescale_acts_by_decoder_norm": True})
    w = load_file(folder / "sae_weights.safetensors")
    norms = w["W_dec"].norm(dim=1)
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    wanted = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values.relu())
    codes, reconstruction = computed(sae_of(import_sae(folder)), x)
    torch.testing.assert_close(codes, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction, (wanted / norms) @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)


def test_a_relu_sae_is_one_with_thresholds_of_zero(tmp_path, x):
    folder = saelens_file(tmp_path / "a", {"architecture": "standard"})
    w = load_file(folder / "sae_weights.safetensors")
    codes, _ = computed(sae_of(import_sae(folder)), x)
    torch.testing.assert_close(codes, ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), rtol=1e-5, atol=1e-5)


def papers_file(path: Path, **more) -> Path:
    """As the papers' code saves it: nothing but tensors."""
    w = weights_of(made(), {}).tensors()
    torch.save({"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous(), **more}, path)  # fmt: skip
    return path


def test_the_papers_file_keeps_negative_latents_until_they_are_dropped(tmp_path, x):
    weights = import_sae(papers_file(tmp_path / "a.pt"), k=15)
    pre = (x - weights.b_dec) @ weights.W_enc + weights.b_enc
    wanted = torch.zeros_like(pre).scatter(1, pre.topk(15).indices, pre.topk(15).values)
    assert bool((wanted < 0).any())
    torch.testing.assert_close(computed(sae_of(weights), x)[0], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(computed(sae_of(with_relu(weights)), x)[0], wanted.relu(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"saelens puts a ReLU behind TopK.*--relu"):
        export_sae(weights, tmp_path / "out", "saelens")
    assert not (tmp_path / "out").exists()
    export_sae(weights, tmp_path / "out", "pt")
    assert sae_of(import_sae(tmp_path / "out")).signed


def test_an_openai_file_says_its_k_and_its_relu(tmp_path):
    state = {"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "ReLU"}}
    weights = import_sae(papers_file(tmp_path / "a.pt", stats_last_nonzero=torch.zeros(D_SAE), **state))
    assert (weights.k, weights.rule) == (5, "topk")


def test_an_encoder_without_a_bias_has_one_of_zeros(tmp_path):
    tensors = torch.load(papers_file(tmp_path / "a.pt"), weights_only=True)
    del tensors["latent_bias"]
    torch.save(tensors, tmp_path / "b.pt")
    assert torch.equal(import_sae(tmp_path / "b.pt", k=2).b_enc, torch.zeros(D_SAE))


def test_a_papers_file_needs_to_be_told_k(tmp_path):
    with pytest.raises(UserError, match=r"does not say how many latents are active. Pass --k"):
        import_sae(papers_file(tmp_path / "a.pt"))
    with pytest.raises(UserError, match=r"k must be between 1 and d_sae=20, .* gives k=21. Pass --k"):
        import_sae(papers_file(tmp_path / "a.pt"), k=21)


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_that_holds_code_is_not_opened(tmp_path):
    path = papers_file(tmp_path / "a.pt", encoder=Evil(tmp_path / "canary"))
    with pytest.raises(UserError, match="holds more than tensors"):
        import_sae(path, k=2)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_breaks_off_is_refused_by_name(tmp_path, format, share):
    export_sae(weights_of(made(), METADATA), tmp_path / "out", format)
    path = tmp_path / "out" / LAYOUTS[format][0]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=str(tmp_path)):
        import_sae(tmp_path / "out")


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning"])
def test_a_config_that_breaks_off_is_refused_by_name(tmp_path, format):
    export_sae(weights_of(made(), METADATA), tmp_path / "out", format)
    path = next(path for path in (tmp_path / "out").glob("c*.json"))
    path.write_text(path.read_text()[:30])
    with pytest.raises(UserError, match=f"is not a readable {format} SAE"):
        import_sae(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "temporal"}, "holds a temporal SAE"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations constant_norm_rescale"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"k": 99}, "k must be between 1 and d_sae=20"),
        ({"k": None}, "k must be between 1 and d_sae=20"),
    ],
)
def test_what_has_no_equal_here_is_refused(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        import_sae(saelens_file(tmp_path / "a", change))


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "pt"])
def test_a_k_that_is_not_the_files_is_refused_and_one_that_the_file_lacks_is_taken(tmp_path, format):
    sae = made()
    export_sae(with_relu(weights_of(sae, {})) if format != "pt" else weights_of(sae, {}), tmp_path / "sae", format)
    assert import_sae(tmp_path / "sae", k=sae.k).k == sae.k
    with pytest.raises(UserError, match=rf"says k={sae.k}, got k={sae.k + 1}. Leave --k out"):
        import_sae(tmp_path / "sae", k=sae.k + 1)


def test_a_saelens_file_without_k_takes_the_flags(tmp_path):
    folder = saelens_file(tmp_path / "sae", {"architecture": "topk", "k": None})
    with pytest.raises(UserError, match=r"Pass --k\."):
        import_sae(folder)
    assert import_sae(folder, k=2).k == 2


@pytest.mark.parametrize("k", ["4", 2.5, True, [4]])
def test_a_k_that_is_no_number_of_latents_is_refused(tmp_path, k):
    folder = saelens_file(tmp_path / "sae", {"architecture": "topk", "k": k})
    with pytest.raises(UserError, match="is no number of latents"):
        import_sae(folder)


@pytest.mark.parametrize("name", ["W_skip", "threshold", "W_enc_other"])
def test_weights_that_the_rule_does_not_compute_with_are_refused(tmp_path, name):
    folder = saelens_file(tmp_path / "sae", {"architecture": "topk", "k": 2}, **{name: torch.ones(4)})
    with pytest.raises(UserError, match=f"holds {name}, for which a topk SAE has no use"):
        import_sae(folder)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"W_dec": torch.zeros(D_SAE, D_IN + 1)}, r"holds W_dec \(20, 9\)"),
        ({"b_enc": torch.zeros(D_IN)}, r"holds b_enc \(8,\)"),
        ({"b_dec": torch.full((D_IN,), float("nan"))}, "NaN or infinite values in b_dec"),
        ({"W_enc": torch.full((D_IN, D_SAE), float("inf"))}, "NaN or infinite values in W_enc"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path, tensors, said):
    with pytest.raises(UserError, match=said):
        import_sae(saelens_file(tmp_path / "a", {}, **tensors))


def test_what_a_format_does_not_know_is_named_with_those_that_do(tmp_path):
    for format in ("sparsify", "pt"):
        with pytest.raises(
            UserError, match=f"{format} knows only TopK, .* thresholds. Pass --format saelens or dictionary_l"
        ):
            export_sae(weights_of(made("jumprelu"), {}), tmp_path / "out", format)
        with pytest.raises(UserError, match=f"{format} knows only TopK, .* matching pursuit. Pass --format saelens"):
            export_sae(weights_of(made("matching_pursuit"), {}), tmp_path / "out", format)


def test_nothing_known_and_a_folder_in_use_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"holds no known SAE: no cfg.json"):
        import_sae(tmp_path / "a")
    with pytest.raises(UserError, match="there is no SAE at"):
        import_sae(tmp_path / "b")
    (tmp_path / "a" / "kept").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export_sae(weights_of(made(), {}), tmp_path / "a", "saelens")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_foreign_sae_is_not_taken_for_one_of_standardised_rows(tmp_path):
    assert import_sae(saelens_file(tmp_path / "a", {})).input == RESIDUAL
    assert import_sae(saelens_file(tmp_path / "b", {"normalize_activations": "layer_norm"})).input == STANDARDISED
