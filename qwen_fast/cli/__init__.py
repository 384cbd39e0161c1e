"""The `qwen-fast` command. Nothing here imports torch: `--help` and mistyped arguments answer at once."""

import argparse
import difflib
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

OUT_OF_MEMORY = """\
Less is needed with --text-encoder-mode offload, --modulation host, --cuda-graph off, a smaller --size or --vae-memory BYTES;
docs/memory.md says what fits into which card."""


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
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(_unknown(unknown, args.parser))
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
        advice = f" {OUT_OF_MEMORY}" if type(error).__name__ == "OutOfMemoryError" and args.command == "generate" else ""
        print(f"qwen-fast {args.command}: error: {error or type(error).__name__}{advice}", file=sys.stderr)
        return 2


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What an error says of arguments that there are not."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    near = [guess for flag in flags for guess in difflib.get_close_matches(flag, known, 1)]
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {', '.join(near)}?" if near else "")
