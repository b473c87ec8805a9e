"""What every command shares: errors as one message on stderr, Ctrl-C as a clean stop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from csm_studio.errors import CsmStudioError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command's `main` on the process's arguments and exit.

    Exit status: 0 on success, 2 for an error the user can mend (one message, no traceback),
    130 after Ctrl-C. Any other exception is a defect and keeps its traceback.
    """
    try:
        main(None)
    except CsmStudioError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    raise SystemExit(0)


@contextlib.contextmanager
def download_line() -> Iterator[Callable[[int, int | None, str], None]]:
    """Yield a callback (bytes done, bytes in all, file name) that keeps a line on stderr current.

    On anything but a terminal it writes nothing.
    """
    last = ""

    def show(done: int, total: int | None, name: str) -> None:
        nonlocal last
        share = f" of {total / 1e6:,.0f} MB ({done / total:.0%})" if total else " MB"
        line = f"downloading {name}: {done / 1e6:,.0f}{share}"
        if line != last and sys.stderr.isatty():
            print(f"\r{line:<{len(last)}}", end="", file=sys.stderr, flush=True)
            last = line

    try:
        yield show
    finally:
        if last:
            print(file=sys.stderr)
