"""Ratings by people: write a sheet of an explanations folder, and put filled sheets beside the judges' ratings.

python jobs/rate.py outputs/demo/explanations --sheet safety.csv
python jobs/rate.py outputs/demo/explanations --filled ada.csv bob.csv --out outputs/agreement
"""

from sarm.interpret.judge_settings import HumanRatings
from sarm.runtime.job import run_command


def main(settings: HumanRatings) -> None:
    from sarm.runtime.judges.human_ratings import run_ratings

    run_ratings(settings)


if __name__ == "__main__":
    run_command(HumanRatings, main, __doc__ or "")
