"""contexts/v1 -> feature pages: features.html (sort, filter, search), pages of features, features.md, a picture, SAEDashboard's JSON.

python jobs/feature_pages.py demo
python jobs/feature_pages.py demo --redo-from feature_pages --pages.features 200 --pages.explanations outputs/demo/explanations
"""

from sarm.commands.command import Command
from sarm.settings.jobs import FeaturePages
from sarm.settings.presets import PRESETS


def main(config: FeaturePages) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)
    print(f"features  {config.run.out / 'features' / 'features.html'}")


COMMAND = Command(settings=FeaturePages, main=main, about=__doc__, presets=PRESETS, needs=("train",))
