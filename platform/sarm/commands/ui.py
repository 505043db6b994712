"""MLflow on the runs of a folder of outputs: the list of runs, with the figures that people compare as columns.

python jobs/ui.py
python jobs/ui.py --outputs /backup/outputs --port 5001
"""

from sarm.commands.command import Command
from sarm.engine.mlflow.ui import Ui


def main(settings: Ui) -> None:
    from sarm.engine.mlflow.ui import serve

    serve(settings)


COMMAND = Command(settings=Ui, main=main, about=__doc__, needs=("train",), is_server=True)
