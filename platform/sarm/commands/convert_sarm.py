"""A reward model of this platform <-> one in the papers' layout (`sarm_param` in its config, keys `model.*`, `sae.*`, `score.weight`); and as vLLM loads it.

python jobs/convert_sarm.py Llama-SARM-4B outputs/llama-sarm-4b
python jobs/convert_sarm.py outputs/demo/sarm exported-sarm --format papers
python jobs/convert_sarm.py outputs/demo/sarm outputs/demo/vllm --format vllm --on-cut-off penalise
python jobs/convert_sarm.py Llama-SARM-4B-PostSAEPretrain outputs/postpretrained/sae --format sae --model meta-llama/Llama-3.1-8B-Instruct
"""

from sarm.commands.command import Command
from sarm.settings.conversion import ConvertSarm


def main(config: ConvertSarm) -> None:
    from sarm.stages.convert_sarm import convert_sarm

    convert_sarm(config)


COMMAND = Command(settings=ConvertSarm, main=main, about=__doc__)
