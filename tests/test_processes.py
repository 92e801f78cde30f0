"""Jobs in several processes: each is answered once, and nothing outlives who asked."""

import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from scoreinv.processes import answers, shared


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_answered_once(workers):
    """Of uneven groups, one of which is left alone, so that both processes end with it."""
    groups = [[-1], [-2, -3, -4, -5, -6], [], [-7]]
    found = list(answers(groups, workers, partial(partial, abs)))
    assert sorted(found) == [(-job, job) for job in range(7, 0, -1)]


def test_a_process_that_is_killed_is_said_to_be():
    with pytest.raises(ValueError, match="a process was killed"):
        list(shared(signal.raise_signal, [(signal.SIGKILL,)] * 2, 2))


def test_processes_end_with_the_one_that_was_killed():
    """Whose jobs would take minutes: what they write to is closed once all have ended."""
    code = (
        "import sys, time; from scoreinv.processes import shared\n"
        "list(shared(print, [('at work',)] * 2, 2)); list(shared(time.sleep, [(300,)] * 2, 2))"
    )
    asked = [sys.executable, "-uc", code]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        time.sleep(8)  # the next two have begun
        assert parent.poll() is None
        parent.kill()
        parent.communicate(timeout=60)
