"""A SARM with its model card (method, data, figures with intervals, licence, what it is not for), in a folder or on the Hugging Face hub.

python jobs/push.py --model outputs/demo/sarm --to outputs/pushed
python jobs/push.py --model outputs/demo/sarm --hub owner/name --licence apache-2.0
"""

from sarm.commands.command import Command
from sarm.settings.push import Push


def main(settings: Push) -> None:
    from sarm.stages.push import push

    push(settings)


COMMAND = Command(settings=Push, main=main, about=__doc__)
