from pathlib import Path

from sarm.settings.jobs import TrainSarm
from sarm.stages.preset_command import Made, names_a_preset, split, with_defaults

MADE = Made(TrainSarm, lambda run: {"contexts": str(run / "contexts"), "--sarm": str(run / "sarm"), "--out": str(run / "audit")})  # fmt: skip


def test_flags_go_to_whom_they_belong() -> None:
    line = "demo --sae.k 4 --off-target a b --out x --num-workers 2 --no-reward.use-margin --reward.no-topk --fdr 0.1 --dry-run --config f"
    chain, own = split(line.split())
    assert chain == [
        "demo",
        "--sae.k",
        "4",
        "--out",
        "x",
        "--num-workers",
        "2",
        "--no-reward.use-margin",
        "--reward.no-topk",
        "--dry-run",
        "--config",
        "f",
    ]
    assert own == ["--off-target", "a", "b", "--num-workers", "2", "--fdr", "0.1", "--dry-run"]


def test_what_is_named_is_not_read_from_the_runs_folder() -> None:
    assert with_defaults(["--sarm", "mine"], MADE, Path("/r")) == ["/r/contexts", "--out", "/r/audit", "--sarm", "mine"]
    assert with_defaults(["--out=here"], MADE, Path("/r")) == ["/r/contexts", "--sarm", "/r/sarm", "--out=here"]


def test_a_folder_called_like_a_preset_is_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_a_preset(["demo"])
    (tmp_path / "demo").mkdir()
    assert not names_a_preset(["demo"])
    assert not names_a_preset(["--sarm", "x"])
    assert not names_a_preset([])
