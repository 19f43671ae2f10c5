"""An accelerator that jax leaves idle is named once, with what gives it to jax."""

import importlib.metadata
import logging
import re
import sys
from types import SimpleNamespace

import pytest

import qvd_jax
from qvd_jax import accelerators
from qvd_jax.cli.command import command


@pytest.mark.parametrize(
    ("devices", "vendor", "found"),
    [
        (["nvidia0", "nvidiactl"], "0x10de", accelerators.GPU),
        (["dxg"], "0x1414", accelerators.GPU),
        (["accel0"], "0x1ae0", accelerators.TPU),
        (["vfio/7"], "0x1ae0", accelerators.TPU),
        # What another virtual machine is handed, and Intel's processors for neural networks.
        (["vfio/7"], "0x8086", None),
        (["accel/accel0"], "0x8086", None),
        (["vfio/vfio", "null"], "0x1ae0", None),
    ],
)
def test_an_accelerator_is_known_by_its_device_files(tmp_path, devices, vendor, found):
    for device in devices:
        (tmp_path / "dev" / device).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / device).touch()
    (tmp_path / "sys/bus/pci/devices/0000:00:04.0").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:00:04.0/vendor").write_text(f"{vendor}\n")
    assert accelerators.present(tmp_path) == found


@pytest.fixture
def machine(monkeypatch):
    """Makes this one look like another, to which nothing was said."""

    def make(name, installed=None, platforms=None, backend="cpu"):
        config = SimpleNamespace(jax_platforms=platforms)
        jax = SimpleNamespace(config=config, default_backend=lambda: backend)
        monkeypatch.setattr(accelerators, "jax", jax)
        monkeypatch.setattr(accelerators, "present", lambda root: name)
        monkeypatch.setattr(accelerators, "version", (installed or {}).get)

    accelerators.check_used.cache_clear()
    yield make
    accelerators.check_used.cache_clear()


JAX = importlib.metadata.version("jax")
INSTALLS = rf": {re.escape(sys.executable)} -m pip install 'jax\[(\w+)\]=={re.escape(JAX)}'$"


@pytest.mark.parametrize(
    ("name", "installed", "message", "extra"),
    [
        (accelerators.GPU, {}, "jax-cuda12-plugin is missing; on Linux", "cuda12"),
        # As where jax alone was upgraded.
        (
            accelerators.GPU,
            {"jax-cuda13-plugin": "0.1"},
            rf"jax-cuda13-plugin 0.1 does not fit jax {JAX}, which asks for \S+",
            "cuda13",
        ),
        (accelerators.TPU, {}, "libtpu is missing; on Linux", "tpu"),
    ],
)
def test_an_idle_accelerator_is_named_once_with_what_mends_it(
    machine, caplog, name, installed, message, extra
):
    machine(name, installed)
    for _ in range(2):
        accelerators.check_used()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    said = f"this machine has {name}, jax sees its CPU alone: {message}{INSTALLS}"
    assert re.fullmatch(said, record.getMessage())[1] == extra


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        (accelerators.GPU, "jax-cuda12-plugin", "fits; `nvidia-smi` tells whether the driver"),
        (accelerators.TPU, "libtpu", "fits; another process may hold the chips"),
    ],
)
def test_what_is_installed_and_fits_is_not_installed_again(
    machine, caplog, monkeypatch, name, package, message
):
    machine(name, {package: "1.2"})
    monkeypatch.setattr(accelerators, "_asked_of", lambda *_: None)
    accelerators.check_used()
    assert message in caplog.text


@pytest.mark.parametrize(
    ("name", "platforms", "backend"),
    [
        (None, None, "cpu"),
        (accelerators.GPU, "cpu", "cpu"),
        (accelerators.GPU, None, "gpu"),
    ],
)
def test_nothing_is_said_of_what_is_used_or_was_turned_down(
    machine, caplog, name, platforms, backend
):
    machine(name, platforms=platforms, backend=backend)
    accelerators.check_used()
    assert not caplog.records


def test_loading_looks_for_it(monkeypatch):
    def called():
        raise InterruptedError

    monkeypatch.setattr(accelerators, "check_used", called)
    with pytest.raises(InterruptedError):
        qvd_jax.load("shapes-w8a8")


def test_a_command_shows_it_where_errors_stand(machine, capsys):
    machine(accelerators.GPU)

    @command
    def main(argv):
        accelerators.check_used()
        logging.getLogger("qvd_jax.pipelines").warning("windows hardly overlap")

    assert main([]) == 0
    printed, errors = capsys.readouterr()
    assert printed == "note: windows hardly overlap\n"
    assert errors.startswith("WARNING: this machine has an NVIDIA GPU, jax sees its CPU alone: ")
