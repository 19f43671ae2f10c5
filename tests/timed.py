"""Wall-clock seconds and peak memory of a command."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from qvd_jax.environment import environment


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


def write_record(out: Path, command: str, results: Any, table: str = "") -> None:
    """Writes and prints results, with the command, versions and hardware they come from.

    Args:
      out: the file.
      command: what made it.
      results: what was found.
      table: of these as Markdown, for a document.
    """
    record = {"command": command, **environment(), "results": results}
    record |= {"table": table} if table else {}
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table or json.dumps(results, indent=2))
