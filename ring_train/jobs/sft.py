"""Fine-tune on chat shards: `python -m ring_train.jobs.sft experiment=NAME init_from=DIR ...`.

The model is that of `init_from`, a Hugging Face folder, a checkpoint or a run folder, unless
`model=PRESET` is among the words; so is the tokenizer, unless `data.tokenizer` is given. Everything
else is `pretrain`: the same command on many ranks, and a run folder that holds checkpoints resumes.
"""

import sys

from ring_train.jobs.pretrain import pretrain
from ring_train.jobs.run_config import sft_config
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Run the fine-tuning job that the overrides describe."""
    pretrain(sft_config(overrides))


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
