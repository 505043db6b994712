"""Jobs through `ray job submit`, from a working directory: what travels to the cluster, and where the results are afterwards."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.ray_head import RAY, Head

ROOT = Path(__file__).parents[2]


def submit(head: Head, *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as the README writes it, with this Python."""
    line = [RAY, "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--", *command]
    return subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env=head.environment, timeout=800, check=False
    )


def test_driver_and_workers_import_the_package_that_travelled(head: Head, tmp_path: Path) -> None:
    script = tmp_path / "where.py"
    script.write_text(
        "import ray, sarm\n"
        "ray.init()\n"
        "print('at', sarm.__file__, ray.get(ray.remote(lambda: __import__('sarm').__file__).remote()))\n"
    )
    done = submit(head, sys.executable, str(script))
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    assert line.count("working_dir_files") == 2, line


def test_a_submitted_job_trains_on_the_cluster(head: Head, finished: Path, tmp_path: Path, mlflow_db: Path) -> None:
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    out = tmp_path / "submitted"
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)
    done = submit(
        head, sys.executable, "jobs/train_sarm.py", "tiny", "--out", str(out), "--cpus-per-worker", "1",
        "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    weights = "model.safetensors"
    alone, submitted = (load_file(folder / "sarm" / weights) for folder in (finished, out))
    assert alone.keys() == submitted.keys()
    assert all(torch.equal(alone[name], submitted[name]) for name in alone), "the same seed, the same weights"


def place_of(said: str) -> Path:
    """Where a job says that its results are, the same at its start and its end."""
    (place,) = set(re.findall(r"^results  (\S+) on", said, flags=re.M))
    # The checkout's own outputs are what `make ui` opens by itself.
    is_default = Path(place).parts[-2] == "outputs"
    command = "make ui" if is_default else f"make ui OUTPUTS={Path(place).parent}"
    assert said.count(f"mlflow   {command}\n") == 2, said[-2000:]
    return Path(place)


def test_the_readme_s_line_from_a_clean_clone_leaves_its_model_in_the_home_folder(head: Head, clone: Path) -> None:
    (line,) = re.findall(r"^(ray job submit .*runtime_env.*)$", (clone / "README.md").read_text(), flags=re.M)
    assert line.endswith("-- python jobs/train_sarm.py demo")
    # Only shorter: the preset for tests.
    line = line.removesuffix("demo") + "tiny"
    done = head.run(line, clone)
    assert done.returncode == 0, done.stdout[-4000:]
    place = place_of(done.stdout)
    assert place == Path(head.environment["HOME"]) / "sarm-outputs" / "tiny"
    assert load_file(place / "sarm" / "model.safetensors")
    assert (place.parent / "mlflow.db").exists()
    assert not list(head.temporary.rglob("mlflow.db")), "nothing is left in Ray's temporary folder"
    assert not (clone / "outputs").exists()
    started = time.monotonic()
    again = head.run(line, clone)
    print(f"the second time: {time.monotonic() - started:.1f} s")
    assert again.returncode == 0, again.stdout[-4000:]
    assert f"train_sarm: already done, {place / 'sarm'}" in again.stdout


def test_the_short_form_writes_to_the_checkout_that_the_head_was_started_in(
    head: Head, clone: Path, tmp_path: Path
) -> None:
    done = head.run("ray job submit -- python jobs/prepare_data.py tiny", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert place_of(done.stdout) == clone / "outputs" / "tiny"
    assert (clone / "outputs" / "tiny" / "pairs" / "manifest.json").exists()
    shutil.rmtree(clone / "outputs")


def test_submit_says_where_results_go_and_what_the_cluster_refuses(head: Head, clone: Path) -> None:
    line = f"python jobs/prepare_data.py tiny --submit {head.address}"
    done = head.run(line, clone)
    assert done.returncode == 0, done.stderr
    assert f"\nresults  {head.environment['HOME']}/sarm-outputs/tiny on " in done.stdout
    done = head.run(f"{line} --out /proc/here", clone)
    assert done.returncode == 2
    # Above it Ray may say that the package is there already.
    assert done.stderr.strip().splitlines()[-1].startswith("error: /proc"), done.stderr
