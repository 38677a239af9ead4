"""The command line: parse, call the library, print. One line and exit status 2 for bad input."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its status: 0 done, 1 a defect of ours, 2 bad input, 130/143 stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _warned
        status = _run([argument for argument in arguments if argument != "--debug"], debug)
    sys.exit(status)


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of ours as one line, without the code that gave it; others as ever."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    text = f"torchstone: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)


def _run(arguments: list[str], debug: bool) -> int:
    from torchstone.cli.app import app
    from torchstone.errors import TorchstoneError

    try:
        status = app(args=arguments, prog_name="torchstone", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except TorchstoneError as error:
        if debug:
            raise
        return _complain(f"torchstone: {error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 0
    except OSError as error:  # the machine's trouble, not ours: a name too long, a folder that vanished
        if debug or not error.strerror:
            return _other(error, debug)
        return _complain(f"torchstone: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
    except Exception as error:
        return _other(error, debug)


def _other(error: Exception, debug: bool) -> int:
    """What the parser raised, a stop by a signal, or a defect of ours."""
    kind, context = type(error).__name__, getattr(error, "ctx", None)
    # by name: typer brings a click of its own or uses the installed one, depending on its version
    if kind == "NoArgsIsHelpError":
        print(context.get_help() if context else error)
        return 0
    if kind == "Abort":
        return 130
    if hasattr(error, "format_message"):
        return _complain(f"{context.command_path if context else 'torchstone'}: {error.format_message()}")
    if kind == "Stopped":
        print(f"torchstone: {error}; continue with --resume", file=sys.stderr)
        return 128 + int(getattr(error, "signal", 2))
    if debug:
        raise error
    text = " ".join(str(error).split())[:300]
    print(f"torchstone: unexpected {kind}: {text} (a defect; --debug shows where)", file=sys.stderr)
    return 1


def _complain(text: str) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return 2
