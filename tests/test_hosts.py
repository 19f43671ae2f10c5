"""Several processes of one command: they agree, share, and end together."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from qvd_jax import checkpoint, sample

ROOT = Path(__file__).parent.parent
SMALL = ["--frames", "3", "--height", "8", "--width", "12", "--steps", "2"]
PROMPTS = ["a red circle", "b", "c"]

PROGRAM = """
import json, os, sys, time
import numpy as np
from qvd_jax import hosts
from qvd_jax.cli.command import command

act, process, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hosts._HEARTBEAT_SECONDS = 4

@command
def main(argv=None):
    with hosts.joined(hosts.Coordinator(address, 2, process, 30), "run it again") as both:
        try:
            work(both)
        finally:
            print("cleared away", flush=True)

def work(both):
    both.compare({"--steps": 4 + (act == "differ") * process, "prompts": ["a"]})
    if act == f"die {process}":
        os.kill(os.getpid(), 9)
    if process == 1 and act == "fill":
        raise OSError("No space left on device")
    if act != "well":
        time.sleep(120)
    own = [[np.full(item, item), np.float32(0.5)] for item in both.share(range(5))]
    found = [[array.tolist() for array in arrays] for arrays in both.gather("squares", own, 5)]
    print(json.dumps(found))

sys.exit(main())
"""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of processes that run at once, with two devices each."""
    values = jax.config.values
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": values["jax_compilation_cache_dir"],
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(values["jax_compilation_cache_max_size"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(one.returncode, *texts) for one, texts in zip(started, said, strict=True)]


def two(act: str) -> list[tuple[int, str, str]]:
    address = free_address()
    return run([["-c", PROGRAM, act, str(process), address] for process in range(2)])


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_what_is_shared_out_comes_together_in_order_at_the_first():
    (code, first, _), (other_code, other, _) = two("well")
    assert (code, other_code) == (0, 0)
    found, nothing = (json.loads(said.splitlines()[0]) for said in (first, other))
    assert found == [[[item] * item, 0.5] for item in range(5)]
    assert nothing == []


def test_hosts_that_differ_are_told_in_what():
    for code, _, said in two("differ"):
        assert code == 2
        assert errors(said) == [
            "error: the hosts differ: --steps is 5 on process 1, 4 on process 0"
        ]


def test_one_that_fails_ends_the_others_with_its_message():
    (code, first, said), (other_code, _, other) = two("fill")
    assert (code, other_code) == (2, 2)
    assert errors(said) == ["error: process 1 ended: No space left on device"]
    assert errors(other) == ["error: No space left on device"]
    assert "cleared away" in first


def test_one_that_dies_ends_the_others_with_its_number():
    (code, first, said), (other_code, *_) = two("die 1")
    assert (code, other_code) == (2, -9)
    assert "cleared away" in first
    assert errors(said) == [
        "error: process 1 of 2 has died, or its host cannot be reached; no file is half-written: "
        "run it again"
    ]


def test_where_the_first_dies_one_line_of_the_others_says_so():
    (code, *_), (_, _, said) = two("die 0")
    assert code == -9
    assert said.splitlines() == [
        "error: process 0, through which the hosts hear of each other, has died or cannot be "
        "reached; what is written is whole: run the same command again on all hosts, sample with "
        "--resume"
    ]


def test_a_coordinator_that_does_not_answer_is_named_with_the_seconds():
    address = free_address()
    verb = ["-m", "qvd_jax.sample", *SMALL, "--prompt", "a", "--coordinator", address]
    verb += ["--num-processes", "2", "--coordinator-timeout", "2", "--process-id"]
    (code, _, said), (other_code, _, other) = (run([[*verb, str(i)]])[0] for i in (1, 0))
    assert (code, other_code) == (2, 2)
    assert said.splitlines() == [
        f"error: the coordinator {address} did not answer within 2 s; process 0 of the same "
        f"command must run there, and its port be open"
    ]
    assert errors(other) == [
        f"error: not all of the 2 processes came to {address} within 2 s; run the same command on "
        f"every host, each with its own --process-id"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "a:1"], "--num-processes is missing; --coordinator, --num-processes"),
        (
            ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            "--coordinator a: HOST:PORT is needed",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2: 0 to 1 are possible with --num-processes 2",
        ),
        (["--coordinator-timeout", "0"], "--coordinator-timeout 0: at least 1 is needed"),
    ],
)
def test_hosts_that_cannot_be_are_refused(arguments, message, capsys):
    assert sample.main(["--prompt", "a", *arguments]) == 2
    assert message in capsys.readouterr().err


def on_hosts(count: int, verb: str, arguments: Sequence[object]) -> None:
    """A command on some hosts of two devices each."""
    command = ["-m", f"qvd_jax.{verb}", *map(str, arguments)]
    commands = [command]
    if count > 1:
        options = ["--coordinator", free_address(), "--num-processes", str(count)]
        commands = [[*command, *options, "--process-id", str(one)] for one in range(count)]
    for code, _, said in run(commands):
        assert code == 0, said


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tiny_checkpoint, tmp_path):
    arguments = ["--checkpoint", str(tiny_checkpoint), *SMALL, "--scheduler", "euler_a"]
    # Two batches of two: of a video alone the two devices take the halves of guidance.
    arguments += ["--prompt", *PROMPTS, "d", "--contact-sheet", "--out"]
    on_hosts(2, "sample", [*arguments, tmp_path / "two"])
    on_hosts(1, "sample", [*arguments, tmp_path / "one"])
    expected = sorted((tmp_path / "one").iterdir())
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == [
        path.name for path in expected
    ]
    for path in expected:
        if path.suffix == ".json":
            assert path.read_text() == (tmp_path / "two" / path.name).read_text()
        else:
            found = imageio.imread(tmp_path / "two" / path.name)
            np.testing.assert_array_equal(found, imageio.imread(path))


@pytest.mark.slow
def test_two_processes_calibrate_as_one_does(tiny_checkpoint, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "name: own\nrules:\n- {pattern: '*/ff/*', spec: {method: minmax}}\n"
        "- {pattern: '*/time_emb_proj', spec: {method: htdq}}\n"
    )
    arguments = ["--checkpoint", str(tiny_checkpoint), *SMALL, "--scheduler", "euler_a"]
    arguments += ["--policy", str(tmp_path / "own.yaml"), "--samples", "16"]
    # Two for each device: of a video alone XLA makes another program, whose rounding differs.
    arguments += ["--prompt", *"abcdefgh", "--out"]
    on_hosts(2, "calibrate", [*arguments, tmp_path / "two"])
    on_hosts(1, "calibrate", [*arguments, tmp_path / "one"])
    one, both = (checkpoint.digest(tmp_path / name) for name in ("one", "two"))
    assert one == both
    assert one != checkpoint.digest(tiny_checkpoint)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tiny_checkpoint, tmp_path):
    arguments = ["--reference", str(tiny_checkpoint), "--frames", "3", "--height", "16"]
    arguments += ["--width", "16", "--steps", "2", "--prompt", *PROMPTS, "--seeds", "3", "--out"]
    on_hosts(2, "evaluate", [*arguments, tmp_path / "two"])
    on_hosts(1, "evaluate", [*arguments, tmp_path / "one"])
    one, both = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    for results in (one, both):
        for name in ("command", "table"):
            del results[name]
        for model in results["models"]:
            del model["seconds_per_video"]
    assert one == both
    assert one["models"][0]["flicker"]["value"] > 0
