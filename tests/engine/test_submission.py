"""How a job is handed to a cluster, as far as it takes no cluster to see; tests/submit has one."""

from dataclasses import dataclass

import pytest
from ray.job_submission import JobStatus

from sarm.engine.submission import check_dashboard, entrypoint, follow
from sarm.settings.checks import UserError


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:8265", "ray://x:1", "http://a/b"])
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="--submit takes the address of a Ray dashboard"):
        check_dashboard(address)


@pytest.mark.parametrize("submit", [["--submit", "http://h:8265"], ["--submit=http://h:8265"]])
@pytest.mark.parametrize("supervise", [[], ["--supervise"]])
def test_the_cluster_is_told_once_to_supervise(submit: list[str], supervise: list[str]) -> None:
    said = entrypoint("/project/jobs/train_sarm.py", ["tiny", *supervise, *submit, "--out", "a b"])
    assert said == "python jobs/train_sarm.py tiny --out 'a b' --supervise"


@dataclass
class Told:
    """What a cluster says of a job whose log is in a state that comes by luck."""

    status: JobStatus
    log: str
    message: str = "exit code 2"

    def get_job_status(self, name: str) -> JobStatus:
        return self.status

    def get_job_logs(self, name: str) -> str:
        return self.log

    def get_job_info(self, name: str) -> "Told":
        return self


LOST = "error: ConnectionError: the server went away\nsupervisor: status 75; starting again in 0.5 s\n"
PLACE = "results  /shared/x on h\nmlflow   http://m:5000\n"


@pytest.mark.parametrize("log", [PLACE, LOST + PLACE, PLACE + LOST, PLACE + LOST + PLACE])
@pytest.mark.parametrize("status", [JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_an_earlier_start_s_error_is_none_of_a_job_that_runs(
    log: str, status: JobStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(Told(status, log), "a-job")
    assert capsys.readouterr().out == PLACE


def test_a_refused_job_is_refused_with_its_last_word() -> None:
    with pytest.raises(UserError, match=r"^mend it\. Pass --other\.$"):
        follow(Told(JobStatus.FAILED, f"{LOST}error: mend it. Pass --other.\n"), "a-job")
    with pytest.raises(UserError, match="a-job ended before it began: exit code 2"):
        follow(Told(JobStatus.FAILED, "Traceback\n"), "a-job")


def test_a_job_that_does_not_begin_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    follow(Told(JobStatus.PENDING, LOST), "a-job", seconds=0.1)
    assert capsys.readouterr().out.startswith("a-job has not begun within 0 s; the cluster may have no room")
