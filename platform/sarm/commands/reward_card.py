"""One conversation's reward as a sum of named features, sentence by sentence and token by token: on the terminal and as a page.

    python jobs/reward_card.py --model outputs/demo/sarm --prompt "How do I pick a lock?" --response "I can't help with that."
    python jobs/reward_card.py --model outputs/demo/sarm --conversation chat.json --out card.html

With --web: a page in the browser to try prompts and answers on, compare two, and change weights of the head.

    python jobs/reward_card.py --web --model outputs/demo/sarm
    python jobs/reward_card.py --web --help     every flag of this form
"""

from sarm.commands.command import Command
from sarm.settings.card import CardPage, RewardCard


def main(settings: RewardCard) -> None:
    from sarm.stages.card import make_card

    make_card(settings)


def show_page(settings: CardPage) -> None:
    from sarm.stages.serving import try_card

    try_card(settings)


COMMAND = Command(
    settings=RewardCard,
    main=main,
    about=__doc__,
    other={
        ("--web",): Command(settings=CardPage, main=show_page, about=__doc__, needs=("serve",), is_server=True),
    },
)
