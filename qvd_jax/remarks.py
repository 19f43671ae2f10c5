"""A program that copies lines but for XLA's remarks on how long it compiles; it imports no JAX."""

import re
import sys

_REMARK = re.compile(rb".*\bslow_operation_alarm\.cc:\d+\]")
_GOES_ON = re.compile(
    rb"\s*$|\*{8}|\[Compiling module|Very slow compile\?|  %"
    rb"|This isn't necessarily a bug; constant-folding|If you'd like to file a bug"
)


def main() -> None:
    """Copies standard input to standard output."""
    inside = False
    for line in sys.stdin.buffer:
        inside = bool(_REMARK.match(line)) or (inside and bool(_GOES_ON.match(line)))
        if not inside:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
