"""A reward server: a SARM behind HTTP, for OpenRLHF, verl, TRL, slime, LLaMA-Factory and whoever speaks as vLLM, SGLang or TEI do.

python jobs/serve.py --model outputs/demo/sarm
python jobs/serve.py --model outputs/demo/sarm --host 0.0.0.0 --token env:REWARD_TOKEN
"""

from sarm.commands.command import Command
from sarm.settings.serving import Serving


def main(settings: Serving) -> None:
    from sarm.stages.serving import serve

    serve(settings)


COMMAND = Command(settings=Serving, main=main, about=__doc__, needs=("serve",), is_server=True)
