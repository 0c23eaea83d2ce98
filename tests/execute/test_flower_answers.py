"""What a site's answer may say of its work: a server adds it up, so a wild number must not get through."""

from __future__ import annotations

import math
from typing import Any

import pytest

from consilience.core.encode import encode
from consilience.core.messages import Work
from consilience.deploy.post import Answer
from consilience.execute.flower import _read

GOOD = Work(None, 5, 2, 0.5, flops=3e9, behind=(1, 1, 2.0))


def read(work: Work) -> Any:
    blobs = (encode(None), encode((work, None)))
    return _read("train", Answer({}, blobs), 1 << 20)


def test_usual_work_is_read() -> None:
    work, state = read(GOOD)
    assert work == GOOD
    assert state is None
    assert read(GOOD._replace(flops=7, behind=None))[0].flops == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 10**400}, {"samples": -1}, {"samples": True}, {"steps": 2**60}, {"steps": 1.0}, {"flops": 10**400},
        {"flops": math.inf}, {"flops": math.nan}, {"flops": -1.0}, {"flops": "x"}, {"behind": "x"}, {"behind": (1, 2)},
        {"behind": (1, 2, math.inf)}, {"behind": (10**400, 1, 1.0)}, {"loss": 1},
    ],
)  # fmt: skip
def test_wild_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no "):
        read(GOOD._replace(**wrong))
