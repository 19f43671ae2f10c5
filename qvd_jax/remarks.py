"""A program that copies lines but for XLA's remarks on what it does; it imports no JAX.

A process whose coordinator is gone is ended by JAX, which writes pages: one line says so in their
place.
"""

import re
import sys

_REMARK = re.compile(
    rb".*\b(slow_operation_alarm\.cc:\d+\]"
    rb"|coordination_service\.cc:\d+\] .*experimental recoverable"
    rb"|coordination_service_agent\.cc:\d+\] Polled an error)"
)
_GOES_ON = re.compile(
    rb"\s*$|\*{8}|\[Compiling module|Very slow compile\?|  %"
    rb"|This isn't necessarily a bug; constant-folding|If you'd like to file a bug"
)
_ENDED = re.compile(rb".*\] Terminating process because the JAX distributed service detected fatal")
_WHY = (
    b"error: process 0, through which the hosts hear of each other, has died or cannot be reached; "
    b"what is written is whole: run the same command again on all hosts, sample with --resume\n"
)


def main() -> None:
    """Copies standard input to standard output."""
    inside = ended = False
    for line in sys.stdin.buffer:
        if _ENDED.match(line):
            ended, line = True, _WHY
        elif ended:
            continue
        inside = bool(_REMARK.match(line)) or (inside and bool(_GOES_ON.match(line)))
        if not inside:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
