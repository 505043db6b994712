"""The command that opens the runs of a tracking address, as jobs print it: at their start and end, in reports, in MLflow itself."""

import shlex
from pathlib import Path

from sarm.engine.mlflow.moved_database import database_of
from sarm.engine.mlflow.run_list import address
from sarm.settings.started import called, started

DATABASE = "mlflow.db"


def ui_command(uri: str, experiment_id: str = "") -> str:
    """`make ui` for the usual place, with the folder for others; a server's own address, at the list of the experiment if it is known.

    Whoever started the program `sarm` is told `sarm ui`, since a Makefile is in a checkout alone.
    """
    database = database_of(uri)
    if database is None:
        return address(uri, experiment_id) if experiment_id else uri
    usual = database.parent == Path.cwd() / "outputs"
    if started().is_program:
        flags = ("--mlflow-uri", uri) if database.name != DATABASE else () if usual else ("--outputs", str(database.parent))  # fmt: skip
        return shlex.join(["sarm", "ui", *flags])
    # make would interpret these in a value, or the shell in make's recipe.
    if database.name != DATABASE or set(str(database.parent)) & set('$"`\\#'):
        return f"{called('ui')} --mlflow-uri {shlex.quote(uri)}"
    return "make ui" if usual else f"make ui OUTPUTS={shlex.quote(str(database.parent))}"
