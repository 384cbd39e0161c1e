"""How the command line says no."""

import pytest

from qwen_fast.cli import main


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run a command that must end with exit code 2; returns its message, one line without a traceback."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]
