import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.throttling import ThrottleLimits, merged, shown
from nbdserve.block.filters.throttle import Limit, Limits


def test_what_is_not_given_stays() -> None:
    limits = merged(Limits(iops_size=4096), ThrottleLimits(iops_total=5, bps_read=7))
    assert limits == Limits(iops_total=Limit(5), bps_read=Limit(7), iops_size=4096)
    limits = merged(limits, ThrottleLimits(iops_total_max=50, iops_total_max_length=9, iops_size=0))
    assert limits == Limits(iops_total=Limit(5, 50, 9), bps_read=Limit(7))
    members = shown(limits)
    assert members.pop("iops-total-max-length") == 9
    assert {name: value for name, value in members.items() if value not in (0, 1)} == {
        "iops-total": 5,
        "iops-total-max": 50,
        "bps-read": 7,
    }
    with pytest.raises(QmpError, match="bps-read-max-length value must be in the range"):
        merged(limits, ThrottleLimits(bps_read_max_length=1 << 32))
