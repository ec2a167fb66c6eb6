"""Commands: `python -m ring_train.jobs.NAME key=value`, one module each."""
