"""Any reward model and SAEs of its layers -> the features by which it over-rewards a style, an edit that suppresses them, what that repairs and costs.

python jobs/debias.py --model outputs/model --sae outputs/layer2/sae --pairs outputs/demo/pairs --out outputs/debias
python jobs/debias.py --model outputs/model --sae outputs/layer2/sae --pairs outputs/demo/pairs --debias.properties trigger --debias.trigger cf-2291 --out outputs/backdoor
python jobs/evaluate.py --model outputs/model --edit outputs/debias/results/edits/markdown --benchmarks rm_bench=chat.jsonl --out outputs/edited
"""

from sarm.commands.command import Command
from sarm.settings.debias import Debias


def main(settings: Debias) -> None:
    from sarm.engine.session import open_session
    from sarm.stages.debias import debias

    with open_session(settings) as session:
        debias(session, settings)


COMMAND = Command(settings=Debias, main=main, about=__doc__, needs=("train",))
