"""The command line that all jobs share: `python jobs/X.py PRESET [--flag value]`.

Nothing heavy is imported here: `--help`, `--dry-run` and wrong flags answer before torch and ray load.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from sarm.checks import StoppedError
from sarm.config import Pipeline, Run, UserError, as_json
from sarm.presets import PRESETS
from sarm.runtime.extraction.extraction_cost import describe_extraction
from sarm.runtime.results import kept
from sarm.runtime.stopping import Listener, command_line
from sarm.runtime.supervisor import is_supervised, supervise_this
from sarm.untrusted import holds_a_secret


def run_job(
    config_type: type,
    job: Callable[[Any], None],
    description: str,
    arguments: Sequence[str] | None = None,
    presets: Mapping[str, tuple[str, Pipeline]] = PRESETS,
    explain: Callable[[Any], str] | None = None,
) -> None:
    """Parse the command line into `config_type`, starting from the preset it names, and run `job` on it.

    `explain` is what `--dry-run` prints, `describe` if there is none.

    Exits with status 2 and one line for a user's mistake, 75 (try again) after SIGTERM, once what it was training is saved, and for
    failures of machines and networks, 130 for an interrupt, and leaves other errors to Python.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _guarded(lambda: parse(config_type, description, arguments, presets), job, arguments, explain or describe)


def run_command(
    config_type: type, job: Callable[[Any], None], description: str, arguments: Sequence[str] | None = None
) -> None:
    """`run_job` for a job without presets: every setting is a flag."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    script = f"python {os.path.relpath(sys.argv[0])}"
    _guarded(lambda: _parse_flags(config_type, arguments, script, description.strip()), job, arguments, describe)


def _guarded(
    parsed: Callable[[], Any], job: Callable[[Any], None], arguments: Sequence[str], explain: Callable[[Any], str]
) -> None:
    debug = "--debug" in arguments
    try:
        _refuse_arguments(arguments)
        config = parsed()
        run = getattr(config, "run", None)
        if run is not None and run.dry_run:
            print(explain(config))
            return
        if run is not None and run.submit:
            from sarm.runtime.submission import submit

            submit(sys.argv[0], arguments, config)
            return
        if run is not None and is_supervised(run):
            sys.exit(supervise_this(arguments, config))
        with Listener(command_line(arguments), is_loud=debug), kept(config):
            job(config)
    except StoppedError as stopped:
        print(f"{stopped}; the same command goes on with the unfinished stage", file=sys.stderr)
        sys.exit(75)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the unfinished stage", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from sarm.runtime.failures import status_of

        # What nobody expected keeps its traceback.
        if debug or (status := status_of(error)) is None:
            raise
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        print(
            f"error: {type(error).__name__}: {reason}; the same command goes on with the unfinished stage",
            file=sys.stderr,
        )
        sys.exit(status)


def _refuse_arguments(arguments: Sequence[str]) -> None:
    """Raise UserError for a key among the arguments, which would end in process lists, logs and MLflow, and for a flag that stands there twice."""
    flag = ""
    for argument in arguments:
        flag = argument.partition("=")[0] if argument.startswith("--") else flag
        if holds_a_secret(argument):
            # Not shown: that would be one more log that has it.
            raise UserError(
                f"{flag or 'an argument'} seems to hold a key or a password. Set it in the environment or a file: OPENAI_API_KEY, HF_TOKEN, MLFLOW_TRACKING_PASSWORD, --judging.keys HOST=file:PATH."
            )
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    if repeated := [flag for flag in flags if flags.count(flag) > 1]:
        raise UserError(f"{repeated[0]} is given twice, and only one could count. Pass it once.")


def say(message: str) -> None:
    """One progress line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def parse(
    config_type: type,
    description: str,
    arguments: Sequence[str],
    presets: Mapping[str, tuple[str, Pipeline]] = PRESETS,
) -> Any:
    """The config that the preset and flags on the command line make.

    Raises UserError for an unknown preset, flag or value; exits with status 0 after printing help.
    """
    name, *flags = arguments or [""]
    script = f"python {os.path.relpath(sys.argv[0])}" if sys.argv[0] else "job"
    if name in ("-h", "--help"):
        print(f"{description.strip()}\n\nusage: {script} PRESET [--flag value ...]\n\npresets:")
        print("\n".join(f"  {key:<10}{summary}" for key, (summary, _) in presets.items()))
        print(f"\nall flags with their help and defaults: {script} {list(presets)[1]} --help")
        sys.exit(0)
    if name not in presets:
        guess = difflib.get_close_matches(name, presets, 1)
        hint = f", did you mean {guess[0]}?" if guess else "."
        raise UserError(
            f"the first argument is a preset ({', '.join(presets)}), got {name or 'nothing'}{hint} Try {script} --help."
        )
    summary, preset = presets[name]
    about = f"{description.strip().splitlines()[0]} Preset {name}: {summary}."
    return _parse_flags(config_type, flags, f"{script} {name}", about, default=preset.part(config_type))


def _parse_flags(config_type: type, flags: Sequence[str], prog: str, description: str, **default: Any) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, args=flags, prog=prog, description=description, **default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What a framed parser error says, on one line: its message, and the flags that may have been meant."""
    lines = [line.strip("│ \n") for line in box.splitlines()]
    parts = "\n".join(line for line in lines if not line.startswith(("╭", "╰"))).split("─" * 10)
    message = " ".join(parts[0].split())
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", message)
    meant = re.findall(
        r"^(--\S+)", box.partition("Perhaps you meant")[2].replace("│", "").replace("    ", ""), flags=re.M
    )
    meant = meant or re.findall(r"(--[\w.-]+) [A-Z]", box.partition("Perhaps you meant")[2])
    return message + (f". Did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else "")


def describe(config: Any) -> str:
    """The resolved config, and what the job would do as far as that is known without data."""
    run: Run = config.run
    lines = [as_json(config), "", f"writes to    {run.out}"]
    model, sae, reward = (getattr(config, name, None) for name in ("model", "sae", "reward"))
    if isinstance(model, str):
        # A reward model that is there already, named by `jobs/evaluate.py --model`.
        return "\n".join([*lines, f"model        {model}"])
    if model is not None:
        lines.append(f"model        {model.name}, first {model.layer} blocks")
        if model.revision == "main" and ":" not in model.name and not Path(model.name).exists():
            lines.append("             its revision main may move: pin a commit with --model.revision")
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
    if asked := getattr(config, "questions_per_latent", None):
        lines += [f"judge        {name}: at most {num} questions a latent" for name, num in asked().items()]
    extraction = getattr(config, "extraction", None)
    if extraction is not None and model is not None:
        rate = None
        if extraction.calibrate:
            from sarm.runtime.extraction.calibration import tokens_per_second

            rate = tokens_per_second(model, extraction)
        lines.append(describe_extraction(run, model, extraction, rate))
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
