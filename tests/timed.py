"""Wall-clock seconds and peak memory of a command."""

import re
import subprocess
import sys
from typing import NamedTuple


class Cost(NamedTuple):
    """What a command took; `printed` is its standard output."""

    seconds: float
    peak_bytes: int
    printed: str


def timed_python(*arguments: str) -> Cost:
    """Runs this Python under /usr/bin/time; what it says is shown if it fails."""
    done = subprocess.run(
        ["/usr/bin/time", "-v", sys.executable, *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    clock = re.search(r"Elapsed \(wall clock\).*: (?:(\d+):)?(\d+):([\d.]+)", done.stderr)
    hours, minutes, seconds = clock.groups()
    elapsed = int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    return Cost(elapsed, 1024 * int(peak[1]), done.stdout)
