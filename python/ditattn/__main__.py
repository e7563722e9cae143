"""``python -m ditattn``: the command line ``ditattn``, in a process where class paths also lead to Python classes."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys

from . import _native


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    library = _native.folder_of_library() / "libditattn_command.so"
    if not library.is_file():
        print(f"ditattn: error: {library} is missing: this build has no command line.", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if arguments is None else arguments
    texts = [b"ditattn", *map(os.fsencode, arguments)]
    argv = (ctypes.c_char_p * (len(texts) + 1))(*texts, None)
    command = ctypes.CDLL(str(library)).ditattn_command  # CDLL: Python's lock is free meanwhile
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait until the command is done
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what back ends print goes between what the command prints
    return int(command(len(texts), argv))


if __name__ == "__main__":
    sys.exit(main())
