"""The files that make a folder of a reward model one of MLflow's models: `mlflow.pyfunc` and `mlflow.transformers` load it.

No pickles: `mlflow.pyfunc` gets copies of `sarm_pyfunc`, of the model's code and of the encoder's; `mlflow.transformers` runs the code in the model's folder. Weights are copied, or named by the
absolute path of their folder, so that they are loaded where that path exists.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sarm_folder import copy_model_code, copy_text_code

WEIGHTS = "model"
_LOADER = Path(__file__).parent / "sarm_pyfunc.py"
_LIBRARIES = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "numpy")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def describe(folder: Path, target: Path, run_id: str, place: str, *, copied: bool) -> None:
    """Write into `target` everything of the model but its weights: MLmodel, loader, tokenizer, requirements.

    With `copied` the weights are to be put beside it, in `target/WEIGHTS`; else they are read from `folder`.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "code" / "sarm_model").mkdir(parents=True)
    shutil.copyfile(_LOADER, target / "code" / _LOADER.name)
    (target / "code" / "sarm_model" / "__init__.py").touch()
    copy_model_code(target / "code" / "sarm_model")
    copy_text_code(target / "code" / "sarm_model")
    tokenizer = target / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for name in _TOKENIZER:
        if (folder / name).exists():
            shutil.copyfile(folder / name, tokenizer / name)
    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in _LIBRARIES]
    (target / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    model = Model(run_id=run_id, artifact_path=place, signature=_signature(), metadata=_metadata(folder))
    place_of_weights = WEIGHTS if copied else str(folder.absolute())
    model.add_flavor("python_function", loader_module=_LOADER.stem, code="code", data=place_of_weights)
    model.add_flavor("transformers", **_transformers(folder, place_of_weights, copied))
    model.save(str(target / "MLmodel"))


def _transformers(folder: Path, weights: str, copied: bool) -> dict[str, Any]:
    return {
        "transformers_version": version("transformers"),
        "code": "code",
        "task": "text-classification",
        "instance_type": "TextClassificationPipeline",
        "framework": "pt",
        "pipeline_model_type": "SarmForSequenceClassification",
        "source_model_name": folder.name,
        "components": ["tokenizer"],
        "tokenizer_type": "PreTrainedTokenizerFast",
        # MLflow's own way to name weights that lie elsewhere, made for base models of adapters.
        **({"model_binary": weights} if copied else {"local_base_model_path": weights}),
    }


def _signature() -> ModelSignature:
    turn = Object([Property("role", DataType.string), Property("content", DataType.string)])
    return ModelSignature(Schema([ColSpec(Array(turn), "messages")]), Schema([ColSpec(DataType.double, "reward")]))


def _metadata(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    return {key: config[key] for key in ("layer", "d_sae", "k", "head") if key in config}
