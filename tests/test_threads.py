"""What runs beside the work: OpenMP teams, seen by the threads that the process has, and the garbage collector."""

import contextlib
import gc
import os
import subprocess
import sys

import pytest

COUNT = """
import os, threading, time, torch
from foreword.threads import release_team

def threads():
    time.sleep(0.5)  # for those that are about to end
    return len(os.listdir("/proc/self/task"))

def work():
    torch.ones(1 << 22).sum()  # large enough for every thread

before = threads()
work(); with_team = threads()
release_team(); released = threads()
work(); again = threads()
release_team()

def elsewhere():
    work()
    release_team()

other = threading.Thread(target=elsewhere)
other.start(); other.join()
print(before, with_team, released, again, threads())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_released_team_is_gone_and_comes_back() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    before, with_team, released, again, end = map(int, done.stdout.split())
    assert with_team == before + 1, "the control: there is a team to release"
    assert released == before and again == with_team and end == before


def test_the_collector_rests_while_the_server_starts_and_comes_back() -> None:
    from foreword.cli.serve import _uncollected

    frozen = gc.get_freeze_count()
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    with contextlib.suppress(ValueError), _uncollected():
        assert not gc.isenabled()
        raise ValueError("a start that fails")
    try:
        assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()
