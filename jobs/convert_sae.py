"""An SAE of this platform, SAELens, sparsify, dictionary_learning or the papers -> any other of these formats.

python jobs/convert_sae.py outputs/demo/sae exported-sae --format saelens
python jobs/convert_sae.py sae.pt outputs/mine/sae --format sarm --k 192 --model meta-llama/Llama-3.1-8B-Instruct --layer 16
"""

from sarm.settings.conversion import ConvertSae
from sarm.stages.job import run_command


def main(config: ConvertSae) -> None:
    from sarm.stages.convert_sae import convert_sae

    convert_sae(config)


if __name__ == "__main__":
    run_command(ConvertSae, main, __doc__ or "")
