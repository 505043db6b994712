"""The command line that all jobs share: `python jobs/X.py PRESET [--flag value]`.

Nothing heavy is imported here: `--help`, `--dry-run` and wrong flags answer before torch and ray load.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from sarm.config import Run, UserError, as_json
from sarm.presets import PRESETS


def run_job(
    config_type: type, job: Callable[[Any], None], description: str, arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line into `config_type`, starting from the preset it names, and run `job` on it.

    Exits with status 2 and one line for a user's mistake, 130 for an interrupt, and leaves other errors to Python.
    """
    presets = {name: (summary, preset.part(config_type)) for name, (summary, preset) in PRESETS.items()}
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        config = tyro.extras.overridable_config_cli(presets, args=arguments, description=description)
        if config.run.dry_run:
            print(describe(config))
            return
        # Set before torch loads: a third of a CPU step is page faults on big tensors that glibc gives back and takes again.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
        job(config)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the unfinished stage", file=sys.stderr)
        sys.exit(130)


def describe(config: Any) -> str:
    """The resolved config, and what the job would do as far as that is known without data."""
    run: Run = config.run
    lines = [as_json(config), "", f"writes to    {run.out}"]
    model, sae, reward = (getattr(config, name, None) for name in ("model", "sae", "reward"))
    if model is not None:
        lines.append(f"model        {model.name}, first {model.layer} blocks")
    if sae is not None:
        lines.append(f"dictionary   {sae.d_sae:,} latents, {sae.k} active")
        if model is not None and (d_in := KNOWN_WIDTHS.get(model.name)):
            parameters = 2 * d_in * sae.d_sae
            lines.append(
                f"SAE          {parameters / 1e6:,.0f} M weights, {16 * parameters / 1e9:.1f} GB with gradients and Adam's moments"
            )
            lines.append(
                f"activations  {2 * d_in / 1e3:.1f} kB each: {2 * d_in * 50e6 / 1e9:,.0f} GB for 50 M sentence ends"
            )
    if reward is not None:
        lines.append(
            f"training     {reward.epochs} epochs, {reward.batch_pairs} pairs a step, ZeRO {reward.zero_stage}, {run.num_workers} workers"
        )
    return "\n".join(lines)


KNOWN_WIDTHS = {
    "demo:smollm2": 576,
    "tiny:llama": 64,
    "meta-llama/Llama-3.2-1B-Instruct": 2048,
    "meta-llama/Llama-3.2-3B-Instruct": 3072,
    "meta-llama/Llama-3.1-8B-Instruct": 4096,
}
"""d_in of the presets' models, so that a dry run needs no download."""
