"""What other libraries say about themselves does not reach who runs a command; failures do."""

import subprocess
import sys

import pytest

from qvd_jax import quiet

REMARK = (
    r"E0000 00:00:1764467113.123456    4242 slow_operation_alarm.cc:73] \n"
    r"********************************\n"
    r"[Compiling module jit_sample_steps] Very slow compile? If you want to file a bug, run with "
    r"envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.\n"
    r"********************************\n"
)
FOLDING = (
    r"2026-11-30 02:05:13.123456: E external/xla/xla/service/slow_operation_alarm.cc:65] Constant "
    r"folding an instruction is taking > 1s:\n\n"
    r"  %pad.1 = f32[8,8]{1,0} pad(f32[] %constant.2), padding=0_7x0_7\n\n"
    r"This isn't necessarily a bug; constant-folding is inherently a trade-off between compilation "
    r"time and speed at runtime. XLA has some guards that attempt to keep constant folding from "
    r"taking too long, but fundamentally you'll always be able to come up with an input program "
    r"that takes a long time.\n\n"
    r"If you'd like to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the "
    r"results.\n"
)
PROGRAM = f"""
import os, sys
from qvd_jax.quiet import libraries_quiet

with libraries_quiet():
    os.write(2, b"E0000 00:00:1764467113.1 1 cuda_dnn.cc:1] out of memory\\n{REMARK}after\\n")
    os.write(2, b"{FOLDING}")
    print("from Python", file=sys.stderr)
    if "--crash" in sys.argv:
        os.write(2, b"F0000 00:00:1764467113.1 1 client.cc:1] last words\\n")
        os.abort()
sys.modules["torch"] = None
import transformers
print("behind", file=sys.stderr)
"""


@pytest.mark.parametrize("crash", [False, True])
def test_remarks_of_xla_and_transformers_are_left_out_and_last_words_are_not(crash):
    arguments = [sys.executable, "-c", PROGRAM, *(["--crash"] if crash else [])]
    said = subprocess.run(arguments, capture_output=True, text=True).stderr.splitlines()
    assert "E0000 00:00:1764467113.1 1 cuda_dnn.cc:1] out of memory" in said
    assert "from Python" in said
    assert said[-1].endswith("last words" if crash else "behind")
    assert "slow" not in str(said)
    assert "after" in said
    assert len(said) == 4


@pytest.mark.parametrize(
    ("device", "lacks"),
    [("null", True), ("accel0", False), ("nvidia0", False), ("dxg", False), ("vfio/7", False)],
)
def test_a_tpu_is_looked_for_where_there_may_be_an_accelerator(tmp_path, device, lacks):
    pytest.importorskip("libtpu")
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    (tmp_path / device).touch()
    assert quiet._lacks_tpu(tmp_path) is lacks
