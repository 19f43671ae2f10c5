"""Videos under the names that VBench reads."""

import json

import numpy as np
import pytest

from qvd_jax.data.video_io import read_video
from qvd_jax.errors import InputError
from qvd_jax.evaluation import vbench


def test_videos_are_named_by_prompt_and_index(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16, 3)).astype(np.uint8)
    out = tmp_path / "out"
    vbench.write_videos(out, {"int8": videos}, ["a cat.", "b", "a cat."], 8)
    names = [f"a cat.-{index}.mp4" for index in range(4)] + ["b-0.mp4", "b-1.mp4"]
    assert sorted(path.name for path in (out / "int8").iterdir()) == names
    said = json.loads((out / "prompts.json").read_text())
    assert said == {f"int8/{name}": name[:-6] for name in names}
    # Its third video is the second seed's first prompt.
    shown = read_video(out / "int8" / "a cat.-2.mp4").astype(float)
    errors = [np.abs(shown - video).mean() for video in videos]
    assert int(np.argmin(errors)) == 3
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        vbench.write_videos(out, {"int8": videos}, ["a", "b", "c"], 8)


@pytest.mark.parametrize("prompt", ["either/or", 260 * "x"])
def test_prompts_that_cannot_be_names_are_refused(prompt):
    with pytest.raises(InputError, match="VBench takes prompts from files' names"):
        vbench.file_names([prompt], 1)
