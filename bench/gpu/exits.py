"""What the exit status of a part's process means."""

PASSED, FAILED, ERROR, LEFT_OUT, OUT_OF_TIME = 0, 1, 2, 3, 4
WORDS = {PASSED: "passed", FAILED: "failed", LEFT_OUT: "left out", OUT_OF_TIME: "ran out of time"}


def word(status: int | None) -> str:
    """For a process's exit status; None: it was still running at its deadline."""
    if status is None:
        return WORDS[OUT_OF_TIME]
    return WORDS.get(status, f"ended with status {status}" if status >= 0 else f"ended by signal {-status}")
