"""How a job ends: its exit status says whether to start it again.

| status | |
|---|---|
| 0 | it is done |
| 2 | a mistake of a person: starting it again would fail again |
| 70 | ranks waited for one another for too long, see `ring_train.resilience.watchdog` |
| 75 | a signal or the deadline stopped it, and all that was computed is saved: start it again |
| others | a crash |
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ring_train.errors import UserError
from ring_train.runtime.signals import StopRequested

USER_ERROR_STATUS = 2
HANG_STATUS = 70
"""EX_SOFTWARE of sysexits.h."""
STOPPED_STATUS = 75
"""EX_TEMPFAIL of sysexits.h."""


def run_job(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0 if it returns, 2 with the message alone if it raises a UserError.

    Before the runtime starts every rank reads the same config and fails the same way, so only
    rank 0 speaks. Inside `start_runtime` the first rank to fail speaks, see there. A signal that
    stops the job before there is anything to save exits with 75. Any other exception is a bug of
    ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        if error.rank is not None or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_STATUS)
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stop}\n")
        _exit_at_once(STOPPED_STATUS)
    sys.exit(0)


def _exit_at_once(status: int) -> NoReturn:
    """Exit without waiting for threads or peers, which may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
