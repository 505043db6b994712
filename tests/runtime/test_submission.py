"""How a job is handed to a cluster, as far as it takes no cluster to see; tests/test_submit.py has one."""

import pytest

from sarm.checks import UserError
from sarm.runtime.submission import check_dashboard, entrypoint


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:8265", "ray://x:1", "http://a/b"])
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="--submit takes the address of a Ray dashboard"):
        check_dashboard(address)


@pytest.mark.parametrize("submit", [["--submit", "http://h:8265"], ["--submit=http://h:8265"]])
@pytest.mark.parametrize("supervise", [[], ["--supervise"]])
def test_the_cluster_is_told_once_to_supervise(submit: list[str], supervise: list[str]) -> None:
    said = entrypoint("/project/jobs/train_sarm.py", ["tiny", *supervise, *submit, "--out", "a b"])
    assert said == "python jobs/train_sarm.py tiny --out 'a b' --supervise"
