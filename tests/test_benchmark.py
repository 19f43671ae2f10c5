"""`python -m qvd_jax.benchmark` at toy size: it measures what it says and refuses bad input."""

import json

import pytest

from qvd_jax import benchmark


@pytest.mark.slow
def test_unet_is_timed_beside_diffusers(tmp_path, capsys):
    out = tmp_path / "unet.json"
    arguments = ["unet", "--size", "tiny", "--against", "diffusers", "--frames", "2"]
    sizes = ["--height", "32", "--width", "48", "--rounds", "2", "--out", str(out)]
    sizes += ["--policy", "minmax-w8a8"]
    assert benchmark.main([*arguments, *sizes]) == 0
    record = json.loads(out.read_text())
    assert [(r["framework"], r["dtype"], r["policy"]) for r in record["results"]] == [
        (name, dtype, policy)
        for dtype in ("float32", "bfloat16")
        for name, policy in (("qvd_jax", None), ("diffusers", None), ("qvd_jax", "minmax-w8a8"))
    ]
    assert all(len(r["rounds_s"]) == 2 and r["median_s"] > 0 for r in record["results"])
    assert record["case"]["height"] == 4
    assert {"jax", "torch", "diffusers"} <= set(record["versions"])
    assert "| diffusers | bfloat16 |" in capsys.readouterr().out


def test_a_missing_peer_is_named_with_its_install_command(capsys, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["unet", "--against", "diffusers"]) == 2
    assert "pip install diffusers torch" in capsys.readouterr().err


def test_an_unknown_policy_is_refused_before_anything_runs(capsys):
    assert benchmark.main(["unet", "--policy", "qvd-w9"]) == 2
    assert "unknown policy 'qvd-w9'" in capsys.readouterr().err


def test_sizes_the_unet_cannot_halve_are_refused(capsys):
    assert benchmark.main(["unet", "--height", "100"]) == 2
    assert "100x128 pixels: both sides must be multiples of 64" in capsys.readouterr().err
