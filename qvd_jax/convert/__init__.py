"""The converter's installed name in a clone, whose top-level folder `convert` has the files.

A wheel has those files here in the place of this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "convert")]
