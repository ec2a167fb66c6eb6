"""What a job needs of the machine: process groups, seeds, device, log lines and exit status.

Empty on purpose: `errors` must be importable without torch, so that a mistyped key costs a second.
"""
