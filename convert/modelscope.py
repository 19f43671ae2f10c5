"""ModelScope's and ZeroScope's UNet: its config read from the keys."""

from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.models.configs import MODELSCOPE, UNet3DConfig

from . import config_classes as classes
from . import configs, keys
from .configs import Json
from .tensors import Tensors


def is_modelscope(tensors: Tensors) -> bool:
    """Whether a UNet has ModelScope's temporal convolutions."""
    return any(".temp_convs." in name for name in tensors)


def unet_config(
    tensors: Tensors, unet_json: Json, where: str
) -> tuple[UNet3DConfig, tuple[str, ...]]:
    """Reads the UNet's shape from its tensors; only the width of a head is the config's.

    Args:
      tensors: by diffusers' names.
      unet_json: the UNet's `config.json`.
      where: how messages name the checkpoint.

    Returns:
      The config, and notes.

    Raises:
      InputError: tensors are missing, or a config value is missing or odd.
    """
    read = configs.read(unet_json, classes.UNET_3D, where)
    fields = keys.unet_fields(tensors, read.values, where)
    widths = fields["block_channels"]
    # Other than in Stable Diffusion 1.5 this is a head's width, not the number of heads.
    head = keys.per_level(read.values["attention_head_dim"], 1, f"{where}: attention_head_dim")[0]
    if any(width % head for width in widths):
        raise InputError(f"{where}: attention_head_dim = {head} does not divide {widths} channels")
    heads = [width // head for width in widths]
    inner = keys.require(tensors, "transformer_in.proj_in.weight", where)[0]
    config = from_dict(
        UNet3DConfig,
        {
            **fields,
            "num_heads": heads,
            "temporal_heads": heads,
            "temporal_op": MODELSCOPE.temporal_op,
            "max_frames": MODELSCOPE.max_frames,
            "input_transformer_channels": inner,
        },
        where,
    )
    facts = keys.unet_facts(fields, tensors, "3D")
    return config, (*read.notes, *configs.contradictions(unet_json, facts, where))
