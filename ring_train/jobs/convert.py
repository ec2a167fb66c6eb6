"""Convert a Hugging Face folder: `python -m ring_train.jobs.convert hf_dir=DIR output=DIR ...`.

`layer_group_size=5 group_norm_size=4` makes a Ling 2.0 model a Ring-linear one, a smaller
`layer_group_size` (1 = none) makes lightning layers softmax again; `vocab_size`, `vocab_multiple`
and `tokenizer` change the vocabulary. See docs/conversions.md. One tensor at a time; under torchrun
the ranks share the files.
"""

import sys

from ring_train.config import ConvertConfig, compose
from ring_train.jobs.output_place import check_output_place
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Convert the folder that the overrides name."""
    config: ConvertConfig = compose("convert", overrides)
    check_output_place(config.output)

    from ring_train.hf.conversion import convert_folder, make_conversion
    from ring_train.runtime.ranks import start_ranks

    with start_ranks() as ranks:
        conversion = ranks.agree(lambda: make_conversion(config))
        convert_folder(conversion, config, ranks)
        if ranks.rank == 0:
            sys.stdout.write(
                f"converted {config.hf_dir} to {config.output}: {conversion.summary()}; "
                f"weights in {conversion.precision}\n"
            )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
