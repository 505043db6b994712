"""A reward server: a SARM behind HTTP, for OpenRLHF, verl, TRL, slime, LLaMA-Factory and whoever speaks as vLLM, SGLang or TEI do.

python jobs/serve.py --model outputs/demo/sarm
python jobs/serve.py --model outputs/demo/sarm --host 0.0.0.0 --token env:REWARD_TOKEN
"""

from sarm.settings.serving import Serving
from sarm.stages.job import run_command


def main(settings: Serving) -> None:
    from sarm.stages.serving import serve

    serve(settings)


if __name__ == "__main__":
    run_command(Serving, main, __doc__ or "", is_server=True)
