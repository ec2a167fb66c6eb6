"""How a job ends: UserError becomes one message on stderr and exit status 2."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ring_train.errors import UserError

USER_ERROR_STATUS = 2


def run_job(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0 if it returns, 2 with the message alone if it raises a UserError.

    Before the runtime starts every rank reads the same config and fails the same way, so only
    rank 0 speaks. Inside `start_runtime` the first rank to fail speaks, see there. Any other
    exception is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        if error.rank is not None or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_STATUS)
    sys.exit(0)
