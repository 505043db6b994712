"""What a reader of a finished SARM does, without what trains: `python tests/reading_side.py FOLDER` with the files of `tests.export_sarm`.

Needs the package and no more. It fails if any library of the extras is imported on the way.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

EXTRAS = ("ray", "deepspeed", "mlflow", "datasets", "openai", "peft", "optuna", "wandb", "starlette", "uvicorn", "prometheus_client", "accelerate", "gguf", "sentencepiece")  # fmt: skip


class Without(PathFinder):
    """Finds all but the libraries of the extras: they look as if they were not installed, to imports and to whoever asks for a spec."""

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:  # fmt: skip
        return None if fullname.partition(".")[0] in EXTRAS else super().find_spec(fullname, path, target)


def main(folder: Path) -> None:
    for name in EXTRAS:
        sys.modules.pop(name, None)
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    os.environ["SARM_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    import sarm
    from sarm.commands.program import main as program

    def run(*arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                program(list(arguments))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    conversation = [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": "yes, 1 of them"}]
    model = sarm.load("sarm")
    (reward,) = model.reward([conversation])
    told = model.explain(conversation)
    assert abs(told.rest + sum(one.contribution for one in told.features) - reward) < 1e-4
    assert abs(model.edit({told.features[0].latent: 0.0}).reward([conversation])[0] - (reward - told.features[0].contribution)) < 1e-4  # fmt: skip

    code, out, err = run("card", "--model", "sarm", "--prompt", "question 1", "--response", "yes, 1 of them", "--out", "card.html")  # fmt: skip
    assert code == 0, err
    assert f"{reward:+.3g}"[:4] in out, (reward, out)
    assert Path("card.html").exists()

    code, out, err = run("evaluate", "--model", "sarm", "--benchmarks", "pairs=pairs.jsonl", "--out", "scores", "--cpus-per-worker", "1")  # fmt: skip
    assert code == 0, out + err
    assert "scoring in this process" in out, out
    assert "MLflow is not installed" in out, out
    report = json.loads(Path("scores/report.json").read_text())
    assert report["scoring"]["num_scored"] > 0
    code, out, err = run("evaluate", "--model", "sarm", "--benchmarks", "pairs=pairs.jsonl", "--out", "scores", "--cpus-per-worker", "1")  # fmt: skip
    assert (code, "already done" in out) == (0, True), out + err

    for arguments, extra, module in (
        (("train-sarm", "tiny", "--out", "run"), "train", "ray"),
        (("serve", "--model", "sarm"), "serve", "starlette"),
        (("ui",), "train", "ray"),
        (("interpret", "contexts", "--out", "run"), "judge", "openai"),
    ):
        code, out, err = run(*arguments)
        assert code == 2, (arguments, out, err)
        line = err.strip().splitlines()[-1]
        assert line.startswith("error: "), err
        assert f"({module} is not installed): pip install 'sarm[{extra}]'" in line, err
    assert not Path("run").exists()
    refused = ""
    try:
        sarm.train("tiny", out="run")
    except sarm.UserError as error:
        refused = str(error)
    assert "sarm[train]" in refused
    # Plans and help do without.
    assert run("train-sarm", "tiny", "--dry-run", "--out", "run")[0] == 0
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(EXTRAS))
    assert loaded == [], loaded
    print(f"reward {reward:.4f}; none of the extras is loaded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
