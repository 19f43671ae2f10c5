"""Pipelines understand diffusers' names of arguments, or say what to write in their place."""

import inspect

import diffusers
import pytest

from qvd_jax.errors import InputError
from qvd_jax.pipelines import arguments
from qvd_jax.pipelines.animation import AnimationPipeline
from qvd_jax.pipelines.arguments import by_either_name
from qvd_jax.pipelines.image_to_video import ImageToVideoPipeline
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline

THEIRS = {
    diffusers.AnimateDiffPipeline: TextToVideoPipeline,
    diffusers.AnimateDiffControlNetPipeline: TextToVideoPipeline,
    diffusers.AnimateDiffSparseControlNetPipeline: TextToVideoPipeline,
    diffusers.TextToVideoSDPipeline: TextToVideoPipeline,
    diffusers.StableVideoDiffusionPipeline: ImageToVideoPipeline,
}


def names(pipeline: type) -> set[str]:
    return set(inspect.signature(pipeline.__call__).parameters) - {"self", "kwargs"}


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda pipeline: pipeline.__name__)
def test_every_argument_of_diffusers_is_taken_or_refused(theirs):
    for name in names(theirs):
        known = arguments._SAME.get(name, name) in names(THEIRS[theirs])
        assert known != (name in arguments._REFUSED), name


class Recorder:
    @by_either_name
    def __call__(self, prompts=None, frames=None, steps=None, callback_on_step_end=None):
        return prompts, frames, steps


def test_the_same_call_by_either_name():
    assert Recorder()(prompt="a", num_frames=3, num_inference_steps=2) == ("a", 3, 2)
    assert Recorder()("a", frames=3, steps=2) == ("a", 3, 2)


@pytest.mark.parametrize("pipeline", [TextToVideoPipeline, ImageToVideoPipeline, AnimationPipeline])
def test_pipelines_refuse_what_means_nothing_here_before_anything_else(pipeline):
    message = f"generator is no argument of {pipeline.__name__}: noise is drawn from seed = N"
    with pytest.raises(InputError, match=message):
        object.__new__(pipeline)("a", generator=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_frames": 3, "frames": 4}, "num_frames means frames, which was given, too"),
        ({"prompt": "b"}, "prompt means prompts, which was given, too"),
        ({"image": "b"}, "Recorder takes no images; leave image out"),
        ({"return_dict": False}, "return_dict is no argument of Recorder: an array is returned"),
        (
            {"callback_on_step_end": lambda pipe, step, t, values: values},
            "called with the number of finished steps and the latents, .*: missing a required",
        ),
    ],
)
def test_what_is_no_argument_or_given_twice_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Recorder()("a", **given)


def test_a_word_of_nobodys_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'framse'"):
        Recorder()("a", framse=3)
