"""How MLflow's list of runs opens: on machine-learning runs, with the figures that people compare as columns.

MLflow keeps the columns that somebody chose in the browser, but opens any view that a tag of the experiment holds by an address that
names it. The experiment gets such a tag; the address is what jobs print and `jobs/ui.py` opens.
"""

import json

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
VIEW = "sarm"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"

# Widths are in pixels; MLflow chooses those of its own columns.
_COLUMNS = {
    ("metrics", "heldout_accuracy"): 130,
    ("metrics", "heldout_accuracy_low"): 130,
    ("metrics", "heldout_accuracy_high"): 130,
    ("metrics", "sae_fvu"): 90,
    ("params", "layer"): 70,
    ("params", "d_sae"): 80,
    ("params", "k"): 60,
    ("params", "sae_lr"): 80,
    ("params", "reward_lr"): 90,
    ("params", "head_lr"): 80,
    ("params", "model"): 130,
    ("attributes", "Dataset"): 0,
    ("attributes", "Source"): 0,
    ("attributes", "Version"): 0,
    ("attributes", "User"): 0,
}
_COLUMN_ID = {"metrics": "$$$metric$$$", "params": "$$$param$$$"}


def view() -> str:
    """The tag's value: the state of MLflow's list as its browser part writes it when a view is shared."""
    state = {
        "selectedColumns": [f"{group}.`{name}`" for group, name in _COLUMNS],
        "columnWidths": {f"{_COLUMN_ID[group]}-{name}": width for (group, name), width in _COLUMNS.items() if width},
        "runsHiddenMode": "SHOW_ALL",
    }
    return json.dumps(state)


def address(server: str, experiment_id: str) -> str:
    """Where the list of an experiment's runs is, with its columns."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
