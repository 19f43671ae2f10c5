"""An exported sampler: the pipeline's videos, by jax alone."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import qvd_jax
from qvd_jax import exported
from qvd_jax.errors import InputError
from qvd_jax.exported import ExportedSampler

SMALL = {"frames": 3, "height": 8, "width": 12, "steps": 2}
PROMPTS = ["one", "two"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def artifact(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "artifact"
    qvd_jax.export(pipe, out, ["cpu"], videos=2, **SMALL)
    return out


ALONE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from exported import ExportedSampler
tokens = np.load(sys.argv[2])
sampler = ExportedSampler(sys.argv[1])
np.save(sys.argv[3], sampler(tokens[:2], tokens[2:], seed=7, guidance_scale=3.0))
assert not {"qvd_jax", "flax", "orbax", "transformers"} & {n.split(".")[0] for n in sys.modules}
"""


def test_jax_alone_makes_the_pipelines_videos(pipe, artifact, tmp_path):
    np.save(tmp_path / "tokens.npy", pipe.token_ids([*PROMPTS, "", "blurry"]))
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    arguments = [str(artifact), str(tmp_path / "tokens.npy"), str(tmp_path / "videos.npy")]
    # What all processes that share a cache have to agree on.
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    cache = {name.upper(): str(jax.config.values[name]) for name in names}
    subprocess.run(
        [sys.executable, "-P", str(script), *arguments], check=True, env=os.environ | cache
    )
    want = pipe(PROMPTS, ["", "blurry"], seed=7, guidance_scale=3.0, **SMALL)
    np.testing.assert_array_equal(np.load(tmp_path / "videos.npy"), want)


def test_embeddings_become_latents(pipe, artifact):
    embeds, negative = (np.asarray(pipe.encode_text(p)) for p in (PROMPTS, ["", ""]))
    sample = ExportedSampler(artifact)
    found = sample(embeds=embeds, negative_embeds=negative, output_type="latents")
    want = pipe(PROMPTS, output_type="latents", **SMALL)
    np.testing.assert_array_equal(found, want)


def test_what_was_not_exported_is_refused_with_what_was(pipe, artifact):
    sample = ExportedSampler(artifact)
    ids = pipe.token_ids(PROMPTS)
    for message, arguments in (
        (r"tokens of shape \(1, 16\): the sampler was exported for \(2, 16\)", (ids[:1], ids[:1])),
        ("negative_tokens are missing: the sampler was exported with guidance", (ids,)),
        ("tokens or embeds are needed, one of the two", ()),
    ):
        with pytest.raises(ValueError, match=message):
            sample(*arguments)
    with pytest.raises(ValueError, match="guidance_scale = 1: the sampler was exported with"):
        sample(ids, ids, guidance_scale=1.0)
    with pytest.raises(ValueError, match="output_type = 'gif'"):
        sample(ids, ids, output_type="gif")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: (p / "weights.bin").write_bytes(b"0"), "weights.bin is damaged, or was edited"),
        (lambda p: (p / "sample-cpu.jaxexport").unlink(), "sample-cpu.jaxexport cannot be read"),
        (lambda p: (p / "index.json").write_text("{}"), "is no exported sampler: 'format_version'"),
        (lambda p: index(p, format_version=2), "has format version 2, this reads 1"),
        (lambda p: index(p, platforms=["tpu"]), "was exported for tpu; jax runs on cpu"),
    ],
)
def test_a_damaged_or_other_artifact_is_refused(artifact, tmp_path, edit, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit(copy)
    with pytest.raises(ValueError, match=message):
        ExportedSampler(copy)


def index(folder, **changes):
    file = folder / exported.INDEX
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["gpu"]}, "'gpu' is none of cpu, cuda, tpu"),
        ({"platforms": []}, "at least one of cpu, cuda, tpu is needed"),
        ({"videos": 0}, "videos = 0: at least 1 is needed"),
        ({"height": 9}, "height = 9: it must be a positive multiple of"),
    ],
)
def test_a_wrong_export_is_refused_before_anything_is_traced(pipe, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        qvd_jax.export(pipe, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_lowered_here(pipe, tmp_path, platform):
    qvd_jax.export(pipe, tmp_path / "out", [platform], **SMALL)
    programs = sorted(file.name for file in (tmp_path / "out").glob("*.jaxexport"))
    assert programs == sorted(f"{stage}-{platform}.jaxexport" for stage in exported.STAGES)
    program = jax.export.deserialize(bytearray((tmp_path / "out" / programs[-1]).read_bytes()))
    assert program.platforms == (platform,)
