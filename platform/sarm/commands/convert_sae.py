"""An SAE of this platform, SAELens, sparsify, dictionary_learning or the papers -> any other of these formats.

python jobs/convert_sae.py outputs/demo/sae exported-sae --format saelens
python jobs/convert_sae.py sae.pt outputs/mine/sae --format sarm --k 192 --model meta-llama/Llama-3.1-8B-Instruct --layer 16
python jobs/convert_sae.py outputs/rm/sae outputs/rm/attached --format attached --model outputs/rm/model --pairs outputs/rm/pairs
"""

from sarm.commands.command import Command
from sarm.settings.conversion import ConvertSae


def main(config: ConvertSae) -> None:
    from sarm.stages.convert_sae import convert_sae

    convert_sae(config)


COMMAND = Command(settings=ConvertSae, main=main, about=__doc__)
