"""The command line that all jobs share: `python jobs/X.py PRESET [--flag value]`, or `sarm X PRESET [--flag value]`.

Nothing heavy is imported here: `--help`, `--dry-run` and wrong flags answer before torch and ray load.
"""

import contextlib
import difflib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from sarm.contracts.untrusted import holds_a_secret
from sarm.data.formats.model_shapes import BUILT_IN_MODELS
from sarm.data.sources.built_in import BUILT_IN_PAIRS, BUILT_IN_TEXTS, RESPONSE_SOURCES
from sarm.engine.live.display import displayed
from sarm.engine.results import kept
from sarm.engine.stopping import Listener, command_line
from sarm.engine.supervisor import is_supervised, supervise_this
from sarm.settings.checks import StalledError, StoppedError, UserError
from sarm.settings.extras import Extra, extra_of, need, said_of
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.registered import REGISTRIES
from sarm.settings.started import started
from sarm.stages.config_file import as_file, config_flags
from sarm.stages.dry_run.describing import describe
from sarm.stages.help_text import HELP, few, in_width, like, more, shown
from sarm.stages.preset_command import Made, in_order, names_a_preset, split, with_defaults

DEFAULT_PRESET = "demo"


def run_job(
    config_type: type,
    job: Callable[[Any], None],
    description: str,
    arguments: Sequence[str] | None = None,
    presets: Mapping[str, tuple[str, Pipeline]] = PRESETS,
    explain: Callable[[Any], str] | None = None,
    needs: Sequence[Extra] = (),
) -> None:
    """Parse the command line into `config_type`, starting from the preset it names (`demo` if none), and run `job` on it.

    `explain` is what `--dry-run` prints, `describe` if there is none. `needs` are the extras without whose libraries the job is refused
    before it does anything.

    Exits with status 2 and one line for a user's mistake, 75 (try again) after SIGTERM, once what it was training is saved, and for
    failures of machines and networks, 130 for an interrupt, and leaves other errors to Python.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _guarded(
        parsed=lambda: parse(config_type, description, arguments, presets),
        job=job,
        arguments=arguments,
        explain=explain or describe,
        needs=needs,
    )


def run_command(
    config_type: type,
    job: Callable[[Any], None],
    description: str,
    arguments: Sequence[str] | None = None,
    made: Made | None = None,
    *,
    needs: Sequence[Extra] = (),
    is_server: bool = False,
) -> None:
    """`run_job` for a job whose settings are all flags.

    Where it reads what the chain `made`, its first argument may be a preset: the stages before it are run first, or found done.
    `is_server` says that the job has nothing to go on with, and answers Ctrl-C and SIGTERM itself, which are how it ends.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    script = " ".join(started().typed)
    if made is None or not names_a_preset(arguments):
        of_flags = functools.partial(_parse_flags, config_type, arguments, script, shown(description))
        _guarded(parsed=of_flags, job=job, arguments=arguments, explain=describe, needs=needs, is_server=is_server)
        return
    chain: list[Any] = []

    def parsed() -> Any:
        of_chain, own = split(arguments)
        chain.append(parse(made.job, description, of_chain))
        return _parse_flags(config_type, with_defaults(own, made, chain[0].run.out), script, shown(description))

    _guarded(
        parsed=parsed,
        job=lambda config: in_order(chain[0], job, made)(config),
        arguments=arguments,
        explain=lambda config: f"{describe(chain[0])}\n\n{describe(config)}",
        before=chain,
        # The stages before it are the chain's.
        needs=("train", *needs),
    )


def _guarded(
    parsed: Callable[[], Any],
    job: Callable[[Any], None],
    arguments: Sequence[str],
    explain: Callable[[Any], str],
    before: Sequence[Any] = (),
    *,
    needs: Sequence[Extra] = (),
    is_server: bool = False,
) -> None:
    debug = "--debug" in arguments
    try:
        _refuse_arguments(arguments)
        # A server is ended by its signals, and says so itself.
        with contextlib.nullcontext() if is_server else Listener(command_line(arguments), is_loud=debug):
            try:
                config = parsed()
            # Help whose reader has seen enough, such as `| head`.
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(0)
            run = getattr(config, "run", None)
            if run is not None and run.dry_run:
                print(as_file(config) if run.json else explain(config))
                return
            need(*needs)
            if run is not None and run.submit:
                from sarm.engine.submission import submit

                submit(started().script, arguments, config)
                return
            if run is None or not is_supervised(run):
                with kept(config, *before), _shown(config, is_server=is_server):
                    job(config)
                return
        # A supervisor passes signals on, and the job answers them.
        sys.exit(supervise_this(arguments, config))
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
        # What nobody expected keeps its traceback.
        if debug or (told := _told(error)) is None:
            raise
        message, status = told
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


def _shown(config: Any, *, is_server: bool) -> contextlib.AbstractContextManager[None]:
    """The display of a job that works on a folder; what libraries warn of lies beside that, since it is no stage's."""
    run = getattr(config, "run", None)
    # The cells of a sweep train side by side, and one display would show now this one and now that one.
    if run is None or is_server or hasattr(config, "sweep"):
        return contextlib.nullcontext()
    return displayed(run.out.with_name(f".{run.out.name}.warnings.log"))


def _told(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status for an error that is no bug: a library that is not installed, a machine or network that failed."""
    # What a job needs by its settings alone: the judges' client, adapters, a search.
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name)) is not None:
        return said_of(extra, str(error.name)), 2
    from sarm.engine.failures import status_of

    if (status := status_of(error)) is None:
        return None
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    # The text of a stall says all, and its class nothing.
    kind = "" if isinstance(error, StalledError) else f"{type(error).__name__}: "
    return f"{kind}{reason}; the same command goes on with the unfinished stage", status


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
    script = " ".join(started().typed).strip() or "job"
    if name in HELP:
        print(f"{shown(description)}\n\nusage: {script} [PRESET] [--config FILE] [--flag value ...]\n\npresets:")
        width = max(map(len, presets), default=0)
        print("\n".join(in_width(f"  {key:<{width}}  {summary}", width + 4) for key, (summary, _) in presets.items()))
        print(f"\nwithout a preset: {DEFAULT_PRESET}")
        print(f"flags, with defaults: {script} {DEFAULT_PRESET} --help, and all: --help-all")
        sys.exit(0)
    if not name or name.startswith("-"):
        name, flags = DEFAULT_PRESET, list(arguments)
        print(f"no preset is named, so this is {name}: {presets[name][0]}", file=sys.stderr)
    if name not in presets:
        guess = difflib.get_close_matches(name, presets, 1)
        hint = f", did you mean {guess[0]}?" if guess else "."
        raise UserError(
            f"the first argument is a preset ({', '.join(presets)}) or a flag, got {name}{hint} Try {script} --help."
        )
    summary, preset = presets[name]
    about = f"{shown(description)}\n\n{in_width(f'Preset {name}: {summary}.')}"
    return _parse_flags(config_type, flags, f"{script} {name}", about, default=preset.part(config_type))


def _known_benchmarks() -> Iterable[str]:
    from sarm.evaluate.benchmarks.registry import BENCHMARKS

    return BENCHMARKS


_REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {
    "known benchmarks": _known_benchmarks,
    "built-in texts": lambda: BUILT_IN_TEXTS,
    "built-in responses": lambda: RESPONSE_SOURCES,
    "built-in pairs": lambda: BUILT_IN_PAIRS,
    "built-in models": lambda: BUILT_IN_MODELS,
}


def _parse_flags(config_type: type, flags: Sequence[str], prog: str, description: str, **default: Any) -> Any:
    REGISTRIES.update(_REGISTRIES)
    if asked := next((flag for flag in flags if flag in HELP), None):
        _print_help(config_type, prog, description, whole=asked == "--help-all", **default)
    said = io.StringIO()
    # Later flags count: those of the command line go over those of the file.
    flags = [*config_flags(flags, config_type), *flags]
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, args=flags, prog=prog, description=description, **default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _print_help(config_type: type, prog: str, description: str, *, whole: bool, **default: Any) -> NoReturn:
    """Print what the job does, with its examples, then its flags by group: the common ones, or all of them; exits with status 0."""
    print(f"{description}\n")
    kind, hidden = few(config_type, whole=whole)
    default = {name: like(value, kind) for name, value in default.items()}
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, description=" ", **default)
    if hidden:
        print(more(hidden))
    sys.exit(0)


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
