"""What a job needs of the machine: process groups, seeds, device, log lines and exit status."""

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.runtime.device import local_device
from ring_train.runtime.distributed import Groups, start_runtime
from ring_train.runtime.errors import run_job
from ring_train.runtime.logs import progress_bar, start_logs

__all__ = ["Groups", "local_device", "progress_bar", "run_job", "start_logs", "start_runtime"]
