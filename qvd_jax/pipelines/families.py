"""The families of models, each registered once: what samples it and what it takes.

How a family's published weights become a checkpoint is registered in `convert`, under the same
name.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.pipelines.animation import AnimationPipeline
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults, ImageToVideoPipeline
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline


class Takes(NamedTuple):
    """What a model makes videos from.

    Attributes:
      inputs: of which each makes one video.
      control: what all videos of a call follow: "images" of some frames (SparseCtrl), a "video"
        with an image for each frame (an ordinary ControlNet), or the "motion" of a person; None
        follows nothing.
    """

    inputs: Literal["prompts", "images"]
    control: Literal["images", "video", "motion"] | None = None


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
      title: for people.
      pipeline: what samples it.
      takes: what it makes videos from, without a ControlNet of the user's choice.
      scheduler: what it was trained for. Other solvers that fit take their schedule from it:
        `schedules.unsupported` says which do not, and why.
      defaults: of its videos, where its source says nothing else.
    """

    title: str
    pipeline: type[VideoPipeline]
    takes: Takes
    scheduler: SchedulerConfig
    defaults: VideoDefaults

    def takes_with(self, unet: UNet3DConfig) -> Takes:
        """What a model with this UNet makes videos from."""
        if self.takes.control is not None or unet.controlnet is None:
            return self.takes
        return self.takes._replace(control="images" if unet.controlnet.ignores_latents else "video")


FAMILIES = {
    "animatediff": Family(
        "AnimateDiff",
        TextToVideoPipeline,
        Takes("prompts"),
        schedules.ANIMATEDIFF,
        VideoDefaults(),
    ),
    "modelscope": Family(
        "ModelScope",
        TextToVideoPipeline,
        Takes("prompts"),
        schedules.MODELSCOPE,
        VideoDefaults(frames=16, height=256, width=256, steps=50, guidance_scale=9.0),
    ),
    "svd": Family(
        "Stable Video Diffusion",
        ImageToVideoPipeline,
        Takes("images"),
        schedules.STABLE_VIDEO_DIFFUSION,
        ImageToVideoDefaults(),
    ),
    "magicanimate": Family(
        "MagicAnimate",
        AnimationPipeline,
        Takes("images", "motion"),
        schedules.ANIMATEDIFF,
        VideoDefaults(),
    ),
}
"""By the name that manifests have."""
