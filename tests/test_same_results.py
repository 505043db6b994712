import json

from tests.same_results import compared, leaves_of


def test_a_changed_value_a_missing_one_and_a_new_one_are_differences_and_what_varies_by_itself_is_none():
    first, second = {"a": "1", "b": "2", "time": "3"}, {"a": "1", "b": "2", "time": "4"}
    differs, by_nature, equal = compared([first, second], {"a": "1", "b": "5", "time": "9", "c": "6"})
    assert (differs, by_nature, equal) == (["b: 2 -> 5", "c: new"], ["time"], 1)
    assert compared([first, second], {"a": "1", "time": "3"})[0] == ["b: 2 -> gone"]


def test_every_value_of_a_file_is_an_entry_and_copies_of_mlflow_are_none(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"rates": [0.5, 0.25], "name": str(tmp_path / "x")}))
    for folder in ("mlartifacts", "outbox"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "copy.json").write_text("{}")
    leaves = leaves_of(tmp_path)
    assert leaves == {
        "report.json :: .rates.length": "2",
        "report.json :: .rates[0]": "0.5",
        "report.json :: .rates[1]": "0.25",
        "report.json :: .name": "'OUT/x'",
    }
