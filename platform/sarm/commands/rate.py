"""Ratings by people: write a sheet of an explanations folder, and put filled sheets beside the judges' ratings.

python jobs/rate.py outputs/demo/explanations --sheet safety.csv
python jobs/rate.py outputs/demo/explanations --filled ada.csv bob.csv --out outputs/agreement
"""

from sarm.commands.command import Command
from sarm.settings.judging import HumanRatings


def main(settings: HumanRatings) -> None:
    from sarm.stages.rate import run_ratings

    run_ratings(settings)


COMMAND = Command(settings=HumanRatings, main=main, about=__doc__)
