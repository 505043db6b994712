"""Ratings by people: write a sheet of an explanations folder, and put filled sheets beside the judges' ratings.

python jobs/rate.py outputs/demo/explanations --sheet safety.csv
python jobs/rate.py outputs/demo/explanations --filled ada.csv bob.csv --out outputs/agreement
"""

from sarm.settings.judging import HumanRatings
from sarm.stages.job import run_command


def main(settings: HumanRatings) -> None:
    from sarm.stages.rate import run_ratings

    run_ratings(settings)


if __name__ == "__main__":
    run_command(HumanRatings, main, __doc__ or "")
