"""What each exit code of the command means."""

from __future__ import annotations

EXIT_CODES = {
    0: "done; of images that could not be used it says how many",
    1: "an error of this package, with a traceback",
    2: "refused, or nothing could be used; standard error says why",
    129: "stopped, as its terminal was closed (SIGHUP)",
    130: "stopped by Ctrl-C; the same command goes on, where it says so",
    143: "stopped (SIGTERM)",
}
"""By number."""


def exit_codes_text() -> str:
    """Return the table for the help, which keeps its lines."""
    return "\n".join(("\b", "Exit codes:", *(f"{n:>5}  {is_}" for n, is_ in EXIT_CODES.items())))
