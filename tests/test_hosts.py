"""Several processes of one command: they agree, share, and end together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

import qvd_jax
from qvd_jax import checkpoint, sample
from qvd_jax.pipelines.loading import save

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


def run(
    commands: Sequence[Sequence[str]],
    folders: Sequence[Path | None] = (None, None),
    unlike: Mapping[str, str] | None = None,
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of processes that run at once, with two devices each.

    Args:
      commands: what Python is told.
      folders: which they work in.
      unlike: what the last one's environment has otherwise.
    """
    values = jax.config.values
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # What LLVM makes faster takes longer to compile than these small models run.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": values["jax_compilation_cache_dir"],
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(values["jax_compilation_cache_max_size"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    environments = [environment] * (len(commands) - 1) + [environment | dict(unlike or {})]
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=own,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own, folder in zip(commands, environments, folders, strict=False)
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


def joined(command: Sequence[str], count: int = 2) -> list[list[str]]:
    """A command of several processes."""
    options = ["--coordinator", free_address(), "--num-processes", str(count)]
    return [[*command, *options, "--process-id", str(one)] for one in range(count)]


def test_hosts_with_other_prompts_and_other_models_are_told_in_what(tiny_checkpoint, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    models = [shutil.copytree(tiny_checkpoint, folder / "model") for folder in folders]
    with next(models[1].glob("tokenizer/*.json")).open("a") as file:
        file.write(" ")
    # Of another version, as far as Python can tell.
    (tmp_path / "flax-0.1.dist-info").mkdir()
    (tmp_path / "flax-0.1.dist-info" / "METADATA").write_text("Name: flax\nVersion: 0.1\n")
    first, second = joined(["-m", "qvd_jax.sample", "--checkpoint", "model", *SMALL])
    out = ["--out", str(tmp_path / "out")]
    ended = run(
        [[*first, *out, "--prompt", "a", "b"], [*second, *out, "--prompt", "a", "c"]],
        folders,
        {"XLA_FLAGS": "", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    differences = {
        "--prompt": (["a", "b"], ["a", "c"]),
        "the checkpoint model": (checkpoint.digest(models[0]), checkpoint.digest(models[1])),
        "input 2": (["b"], ["c"]),
        "the version of flax": (checkpoint.package_versions()["flax"], "0.1"),
        "the hardware": ("2 cpu", "1 cpu"),
    }
    told = [
        f"{name} is {json.dumps(other)} on process 1, {json.dumps(own)} on process 0"
        for name, (own, other) in differences.items()
    ]
    for code, _, said in ended:
        assert (code, errors(said)) == (2, [f"error: the hosts differ: {'; '.join(told)}"]), said
    assert not (tmp_path / "out").exists()


def on_hosts(count: int, verb: str, arguments: Sequence[object]) -> list[str]:
    """What a command says on some hosts of two devices each."""
    command = ["-m", f"qvd_jax.{verb}", *map(str, arguments)]
    said = []
    for code, output, complaint in run(joined(command, count) if count > 1 else [command]):
        assert code == 0, complaint
        said.append(output)
    return said


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of `sample`, and the folder that one process fills by them."""
    arguments = ["--checkpoint", str(tiny_checkpoint), *SMALL, "--scheduler", "euler_a"]
    # Batches of two: of a video alone the two devices take the halves of guidance.
    arguments += ["--prompt", *PROMPTS, *"defgh", "--contact-sheet", "--out"]
    folder = tmp_path_factory.mktemp("alone") / "one"
    on_hosts(1, "sample", [*arguments, folder])
    return arguments, folder


def assert_same_files(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        if name.endswith(".json"):
            assert (folder / name).read_text() == (expected / name).read_text()
        else:
            found = imageio.imread(folder / name)
            np.testing.assert_array_equal(found, imageio.imread(expected / name))


@pytest.mark.slow
def test_two_processes_sample_what_one_does(alone, tmp_path):
    arguments, expected = alone
    on_hosts(2, "sample", [*arguments, tmp_path / "two"])
    assert_same_files(tmp_path / "two", expected)


KILLED = """
import os, runpy, sys
from qvd_jax import hosts
from qvd_jax.data import video_io

hosts._HEARTBEAT_SECONDS = 4
replace_when_whole = video_io.replace_when_whole

def die(file):
    file.write_bytes(b"half")
    os.kill(os.getpid(), 9)

def killed(path, write):
    replace_when_whole(path, die if path.name.startswith("005-") else write)

video_io.replace_when_whole = killed
sys.argv[0] = "sample"
runpy.run_module("qvd_jax.sample", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(alone, tmp_path):
    arguments, expected = alone
    out = tmp_path / "out"
    (code, _, said), (other_code, *_) = run(joined(["-c", KILLED, *arguments, str(out)]))
    assert (code, other_code) == (2, -9)
    assert errors(said) == [
        "error: process 1 of 2 has died, or its host cannot be reached; no file is half-written: "
        "run the same again on all hosts, into a folder with --resume"
    ]
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    assert b"half" in left.values()
    assert {"001-b.mp4", "001-b.json", "003-d.mp4", "003-d.json"} <= set(left)
    assert not {name[:3] for name in left} & {"005", "007"}
    _, again = on_hosts(2, "sample", [*arguments, out, "--resume"])
    assert "2 of 4 videos are finished already" in again
    # What was finished is shown from its file, which is not what was sampled.
    expected = shutil.copytree(expected, tmp_path / "expected")
    shutil.copy(out / "contact-sheet.png", expected)
    assert_same_files(out, expected)
    for name in left.keys() & {path.name for path in out.iterdir()}:
        assert (out / name).read_bytes() == left[name]


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
    pipe = qvd_jax.load(tiny_checkpoint)
    last = jax.tree.map(lambda leaf: 1.2 * leaf, pipe.params["unet"]["conv_out"])
    params = pipe.params | {"unet": pipe.params["unet"] | {"conv_out": last}}
    save(replace(pipe, params=params), tmp_path / "other")
    arguments = ["--reference", tiny_checkpoint, "--candidate", tmp_path / "other"]
    arguments += ["--frames", "3", "--height", "16", "--width", "16", "--steps", "2"]
    arguments += ["--prompt", *PROMPTS, "--seeds", "3", "--out"]
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
    exact, other = one["models"]
    assert exact["flicker"]["value"] > 0
    assert 0 < other["psnr"]["value"] < 60
    assert 0 < other["latent_sqnr"][-1] < 60
