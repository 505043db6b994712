"""How MLflow's list of runs opens: on machine-learning runs, with the figures that people compare as columns.

MLflow keeps the columns that somebody chose in the browser, but opens any view that a tag of the experiment holds by an address that
names it. The experiment gets such a tag; the address is what jobs print and `jobs/ui.py` opens.
"""

import json

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
VIEW = "sarm"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"

# In the order in which they stand, with widths in pixels: those that are compared come first, and fit a screen.
_COLUMNS = {
    "attributes.`Run Name`": 130,
    "metrics.`heldout_accuracy`": 125,
    "params.`layer`": 60,
    "params.`d_sae`": 70,
    "params.`k`": 50,
    "params.`lr_sae`": 70,
    "params.`lr_reward`": 85,
    "params.`lr_head`": 75,
    "metrics.`heldout_accuracy_low`": 125,
    "metrics.`heldout_accuracy_high`": 125,
    "metrics.`sae_fvu`": 75,
    "params.`model`": 110,
    "runDateAndNestInfo": 110,
    "duration": 80,
    "attributes.`User`": 70,
    "attributes.`Source`": 120,
    "attributes.`Version`": 80,
    "attributes.`Dataset`": 300,
}


def view() -> str:
    """The tag's value: the state of MLflow's list as its browser part writes it when a view is shared."""
    state = {
        "selectedColumns": [name for name in _COLUMNS if "." in name],
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
    }
    return json.dumps(state)


def address(server: str, experiment_id: str) -> str:
    """Where the list of an experiment's runs is, with its columns."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
