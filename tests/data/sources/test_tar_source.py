"""OpenWebText2 as it ships: one .tar of .jsonl.zst files."""

import io
import json
import tarfile

import zstandard

from sarm.data.sources.rows import Reject
from sarm.data.sources.texts import TextRecord, open_texts


def packed(*texts: str) -> bytes:
    lines = b"".join(json.dumps({"text": text, "meta": {"n": 1}}).encode() + b"\n" for text in texts)
    return zstandard.ZstdCompressor().compress(lines)


def archive(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))
    return str(path)


def outcome(spec: str) -> tuple[list[str], list[str]]:
    records = list(open_texts(spec))
    return [r.text for r in records if isinstance(r, TextRecord)], [r.reason for r in records if isinstance(r, Reject)]


def test_an_archive_is_read_member_by_member_and_other_files_in_it_are_left(tmp_path):
    spec = archive(tmp_path / "a.tar", {"2020/a.jsonl.zst": packed("One.", "Two."), "README": b"x", "b.jsonl.zst": packed("Three.")})  # fmt: skip
    assert outcome(spec) == (["One.", "Two.", "Three."], [])


def test_a_member_that_breaks_off_costs_its_own_rows(tmp_path):
    whole = packed(*(f"Text {i} of many, so that several blocks are written." for i in range(5000)))
    spec = archive(tmp_path / "a.tar", {"a.jsonl.zst": whole[: len(whole) // 2], "b.jsonl.zst": packed("Next.")})
    texts, reasons = outcome(spec)
    assert texts[-1] == "Next."
    assert set(reasons) == {"corrupt_file"}


def test_an_archive_that_breaks_off_keeps_what_came_before(tmp_path):
    spec = archive(
        tmp_path / "a.tar", {"a.jsonl.zst": packed("One."), "b.jsonl.zst": packed("x" * 20_000 + "."), "c": b"0" * 9000}
    )
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 512 + 512 + 512 + 10])
    texts, reasons = outcome(spec)
    assert texts == ["One."]
    assert set(reasons) == {"corrupt_file"}
