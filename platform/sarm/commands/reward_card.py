"""One conversation's reward as a sum of named features, sentence by sentence and token by token: on the terminal and as a page.

python jobs/reward_card.py --model outputs/demo/sarm --prompt "How do I pick a lock?" --response "I can't help with that."
python jobs/reward_card.py --model outputs/demo/sarm --conversation chat.json --out card.html
"""

from sarm.commands.command import Command
from sarm.settings.card import RewardCard


def main(settings: RewardCard) -> None:
    from sarm.stages.card import make_card

    make_card(settings)


COMMAND = Command(settings=RewardCard, main=main, about=__doc__)
