"""The `qwen-fast` command. Nothing here imports torch: `--help` and mistyped arguments answer at once."""

import argparse
import os
import sys
from collections.abc import Sequence

from . import bench, doctor, generate, profile, schedule, tune

COMMANDS = {
    "generate": generate,
    "schedule": schedule,
    "bench": bench,
    "profile": profile,
    "tune": tune,
    "doctor": doctor,
}

DESCRIPTION = """\
Qwen-Image through diffusers: the same picture, faster."""

EPILOG = """\
examples:
  qwen-fast generate --prompt "a red circle on a white background"
  qwen-fast schedule --steps 20 --width 512 --height 512
  qwen-fast bench
  qwen-fast doctor

`qwen-fast COMMAND --help` describes a command. Exit codes: 0 done, 1 a check failed,
2 bad input (the message is on stderr), 130 interrupted."""


class _Version(argparse.Action):
    """Reads the version only when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: object):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        from .. import __version__

        print(f"qwen-fast {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of `qwen-fast`, one subcommand per module of this package."""
    parser = argparse.ArgumentParser(
        prog="qwen-fast",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show an error's traceback, not only its message")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.
    Returns:
        int: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
    Raises:
        SystemExit: `--help` and `--version` (0), arguments that argparse refuses (2).
    """
    args = build_parser().parse_args(argv)
    args.own_process = argv is None  # nothing comes behind the command
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is still handled
        return code
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this the interpreter complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"qwen-fast {args.command}: error: {error or type(error).__name__}", file=sys.stderr)
        return 2
