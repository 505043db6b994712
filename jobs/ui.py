"""MLflow on the runs of a folder of outputs: the list of runs, with the figures that people compare as columns.

python jobs/ui.py
python jobs/ui.py --outputs /backup/outputs --port 5001
"""

from sarm.engine.mlflow.ui import Ui
from sarm.stages.job import run_command


def main(settings: Ui) -> None:
    from sarm.engine.mlflow.ui import serve

    serve(settings)


if __name__ == "__main__":
    run_command(Ui, main, __doc__ or "", is_server=True)
