"""The entry of the command line: errors of the user are one line and exit status 2."""

import sys

import typer

from piggyback_lens.app.commands import app
from piggyback_lens.errors import LensError, visible

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def main() -> None:
    """Run a command."""
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer turns Ctrl-C into this status
            raise KeyboardInterrupt
        if isinstance(status, int) and status:
            sys.exit(status)
    except LensError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error))
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; the same command continues where it was", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Wrong options; typer brings its own copy of click, so the class cannot be named.
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()
        sys.exit(error.exit_code)


def _fail(message: str) -> None:
    typer.echo("error: " + visible(" ".join(message.split())), err=True)
    sys.exit(2)
