"""Arguments by diffusers' names: taken where they mean the same, else refused with the right word.

`tests/test_pipelines_arguments.py` holds the names to the signatures of diffusers' pipelines.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from qvd_jax.errors import InputError

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")

_SAME = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompts",
    "image": "images",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "max_guidance_scale": "guidance_scale",
}
"""Our names by diffusers'."""

_REFUSED = {
    "generator": "noise is drawn from seed = N; noise of your own is passed as latents",
    "num_videos_per_prompt": "give a prompt as often as there are to be videos of it",
    "eta": "pipe.with_scheduler(solver) chooses a solver that adds noise, such as 'euler_a'",
    "timesteps": "the steps follow from their number; pipe.with_scheduler has their spacing",
    "sigmas": "the steps follow from their number; pipe.with_scheduler has their spacing",
    "decode_chunk_size": "the decoder finds by itself how many frames it has memory for",
    "return_dict": "an array is returned; leave it out",
    "callback": "callback_on_step_end is called after each step",
    "callback_steps": "callback_on_step_end is called after each step",
    "callback_on_step_end_tensor_inputs": "the callback is given the latents; leave it out",
    "cross_attention_kwargs": "a LoRA is merged with its scale when a checkpoint is converted",
    "clip_skip": "prompt_embeds takes embeddings of another layer",
    "ip_adapter_image": "IP-Adapters are not supported",
    "ip_adapter_image_embeds": "IP-Adapters are not supported",
    "guess_mode": "a ControlNet's guess mode is not supported",
}
"""Names that mean nothing here, and what there is in their place."""


def by_either_name(call: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Has a pipeline's `__call__` understand diffusers' names of its arguments, too.

    The signature stays as it is: a reader and a type checker see one name for each argument.
    """
    names = tuple(inspect.signature(call).parameters)

    @functools.wraps(call)
    def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        taken = names[: 1 + len(args)]
        return call(self, *args, **_renamed(kwargs, names, taken, type(self).__name__))

    return wrapped


def _renamed(
    given: Mapping[str, Any], names: tuple[str, ...], taken: tuple[str, ...], pipeline: str
) -> Any:
    """Arguments by our names.

    Args:
      given: by either name.
      names: of the pipeline's parameters.
      taken: those that were passed by their place.
      pipeline: its class.

    Raises:
      InputError: one means nothing here, or was given by both names; or a callback takes others
        than it is called with.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in _REFUSED and name not in names:
            raise InputError(f"{name} is no argument of {pipeline}: {_REFUSED[name]}")
        ours = name if name in names else _SAME.get(name, name)
        if ours != name and ours not in names:
            raise InputError(f"{pipeline} takes no {ours}; leave {name} out")
        if ours != name and (ours in taken or ours in given):
            raise InputError(f"{name} means {ours}, which was given, too; leave one out")
        found[ours] = value
    if found.get("callback_on_step_end") is not None:
        _check_callback(found["callback_on_step_end"])
    return found


def _check_callback(callback: Callable[..., Any]) -> None:
    """Raises `InputError` unless a callback can be called as the sampler calls it."""
    try:
        inspect.signature(callback).bind("finished", "latents")
    except ValueError:
        return  # Of some built-in functions there is no signature.
    except TypeError as error:
        raise InputError(
            f"callback_on_step_end is called with the number of finished steps and the latents, "
            f"which it does not take: {error}"
        ) from error
