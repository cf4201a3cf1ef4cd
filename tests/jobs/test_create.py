import pytest

from nbdserve.errors import ConfigError
from nbdserve.jobs.create import Create
from nbdserve.jobs.status import JobStatus
from tests.jobs.chains import begin


@pytest.mark.parametrize("problem", [None, ConfigError("no")])
async def test_it_stays_known_until_it_is_dismissed(problem: ConfigError | None) -> None:
    async def make() -> None:
        if problem is not None:
            raise problem

    job = begin(Create("j", make))
    await job.wait()
    assert job.status is JobStatus.CONCLUDED
    assert job.error is problem
    assert (job.current_progress, job.total_progress) == (1, 1)
    job.dismiss()
    assert job.status is JobStatus.NULL
