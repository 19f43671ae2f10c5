"""The video UNet: one module whose families differ by the data of `UNet3DConfig`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.meshes import divided_by_xla
from qvd_jax.models.appearance import AppearanceEncoder
from qvd_jax.models.attention import TemporalTransformer
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.controlnet import ControlNet
from qvd_jax.models.layers import (
    FLOAT,
    LayerSet,
    TimestepEmbedding,
    silu,
    sinusoidal_embedding,
)
from qvd_jax.models.stages import Features, down_stages, map_stages, mid_stage, run_down, up_stages

_INPUT_TRANSFORMER_HEADS = 8
_ADDED_ID_WIDTH = 256


class UNet3D(nn.Module):
    """Predicts the noise (or v) of video latents.

    Sampling calls `temporal_features` for all steps and `context_features` for the prompts once,
    then `denoise` at every step; `__call__` does all three.

    Attributes:
      config: the family's data.
      layers: the layer classes and dtypes.
    """

    config: UNet3DConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        config, layers = self.config, self.layers
        widths = config.block_channels
        embedding = 4 * widths[0]
        self.time_embedding = TimestepEmbedding(embedding, embedding, layers)
        if config.added_ids:
            self.add_embedding = TimestepEmbedding(embedding, embedding, layers)
        self.conv_in = layers.conv(widths[0], (3, 3))
        if config.input_transformer_channels is not None:
            self.transformer_in = TemporalTransformer(
                widths[0],
                config.input_transformer_channels,
                _INPUT_TRANSFORMER_HEADS,
                config.max_frames,
                config.norm_groups,
                config.temporal_norm_scope,
                layers,
            )

        self.down_blocks = down_stages(config, layers)
        self.mid_block = mid_stage(config, layers)
        self.up_blocks = up_stages(config, layers)
        self.conv_norm_out = layers.group_norm(
            config.norm_groups, config.out_eps, config.resnet_norm_scope
        )
        self.conv_out = layers.conv(config.out_channels, (3, 3))
        if config.controlnet is not None:
            self.controlnet = ControlNet(config, config.controlnet, layers)
        if config.appearance_encoder:
            self.appearance_encoder = AppearanceEncoder(config, layers)

    def temporal_features(self, timesteps: Array, added_ids: Array | None = None) -> Features:
        """Projections of the time embedding for every resnet.

        They depend on nothing but the step, so a sampler computes those of all its steps at once.

        Args:
          timesteps: `[N]`, in units of training timesteps, fractions allowed.
          added_ids: `[N, added_ids]`, or `[1, added_ids]` for all; for a config that has them.

        Returns:
          `[N, C]` for each resnet.
        """
        sinusoid = sinusoidal_embedding(timesteps, self.config.block_channels[0])
        embedding = self.time_embedding(sinusoid.astype(self.layers.dtype))
        if (added_ids is not None) != bool(self.config.added_ids):
            raise ValueError(
                f"the time embedding takes {self.config.added_ids} added ids, "
                f"{'none were' if added_ids is None else 'some were'} given"
            )
        if added_ids is not None:
            ids = sinusoidal_embedding(added_ids.reshape(-1), _ADDED_ID_WIDTH)
            ids = ids.reshape(-1, self.config.added_ids * _ADDED_ID_WIDTH)
            embedding = embedding + self.add_embedding(ids.astype(self.layers.dtype))
        embedding = silu(embedding)
        features = map_stages(
            lambda stage: stage.temporal_features(embedding),
            self.down_blocks,
            self.mid_block,
            self.up_blocks,
        )
        if self.config.controlnet is not None:
            own = self.controlnet.temporal_features(timesteps)
            features = features._replace(controlnet=own)
        if self.config.appearance_encoder:
            own = self.appearance_encoder.temporal_features(timesteps)
            features = features._replace(appearance=own)
        return features

    def context_features(self, context: Array) -> Features:
        """What every transformer needs of the context, which is the same at all steps.

        Args:
          context: text embedding `[B, L, C]`, or SVD's image embedding `[B, 1, C]`.

        Returns:
          For each layer a `Context`; in SVD what spatial and temporal block add, `[B, 1, C]` each;
          None where there is no transformer.
        """
        context = context.astype(self.layers.dtype)
        features = map_stages(
            lambda stage: stage.context_features(context),
            self.down_blocks,
            self.mid_block,
            self.up_blocks,
        )
        if self.config.controlnet is not None:
            own = self.controlnet.context_features(context)
            features = features._replace(controlnet=own)
        if self.config.appearance_encoder:
            own = self.appearance_encoder.context_features(context)
            features = features._replace(appearance=own)
        return features

    def control_features(self, control: Array) -> Array:
        """What the ControlNet needs of its condition, which is the same at all steps.

        Args:
          control: `[B, F, H, W, C]`, of pixels or of latents' size as the ControlNet asks.

        Returns:
          `[B, F, h, w, C]`.
        """
        return self.controlnet.control_features(control)

    def denoise(
        self,
        latents: Array,
        temporal: Features,
        context: Features,
        control: Array | None = None,
        reference: Array | None = None,
        control_scale: Array | None = None,
    ) -> Array:
        """Predicts the noise (or v), given the features of one step and of the prompts.

        Args:
          latents: `[B, F, H, W, C]`.
          temporal: of `temporal_features`, N = B or 1.
          context: of `context_features`.
          control: of `control_features`, for a UNet with a ControlNet.
          reference: latents of a reference image without noise, `[N, 1, H, W, C]`, for a UNet with
            an appearance encoder. It shows in the last N videos; those before are taken for the
            same ones' negatives.
          control_scale: factor of what the ControlNet adds, a scalar; None is one.

        Returns:
          `[B, F, H, W, C]`, float32.
        """
        x = self.conv_in(latents.astype(self.layers.dtype))
        if self.config.input_transformer_channels is not None:
            x = self.transformer_in(x)
        x, skips = run_down(self.down_blocks, x, temporal, context)
        if reference is not None:
            context = self._show(reference, temporal, context)
        x, _ = self.mid_block(x, temporal.mid, context.mid)
        if control is not None:
            # Negatives see the same latents and, in MagicAnimate, the same text.
            copies = 1 if reference is None else len(latents) // len(reference)
            shown, text = jax.tree.map(
                lambda leaf: leaf[-(len(latents) // copies) :], (latents, context.controlnet)
            )
            residuals = self.controlnet(shown, temporal.controlnet, text, control)
            if control_scale is not None:
                residuals = jax.tree.map(
                    lambda leaf: control_scale.astype(leaf.dtype) * leaf, residuals
                )
            residuals = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * copies), residuals)
            skips = [skip + residual for skip, residual in zip(skips, residuals.down, strict=True)]
            x = x + residuals.mid
        for stage, feature, text in zip(self.up_blocks, temporal.up, context.up, strict=True):
            x, _ = stage(x, feature, text, skips)
        x = self.conv_norm_out(x).silu()
        return self.conv_out(x).astype(jnp.float32)

    def _show(self, reference: Array, temporal: Features, context: Features) -> Features:
        """The context features with what the appearance encoder sees in the reference."""
        own = jax.tree.map(lambda leaf: leaf[-len(reference) :], context.appearance)
        tokens = self.appearance_encoder(reference, temporal.appearance, own)

        def stage(texts: tuple[Any, ...], seen: tuple[Array | None, ...]) -> tuple[Any, ...]:
            pairs = zip(texts, seen, strict=True)
            return tuple(c if s is None else c._replace(reference=s) for c, s in pairs)

        up = (stage(texts, seen) for texts, seen in zip(context.up, tokens.up, strict=True))
        return context._replace(mid=stage(context.mid, tokens.mid), up=tuple(up))

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        added_ids: Array | None = None,
        control: Array | None = None,
        reference: Array | None = None,
    ) -> Array:
        """Predicts the noise (or v) of `latents` at `timesteps`.

        Args:
          latents: `[B, F, H, W, C]`.
          timesteps: `[N]`, N = B or 1.
          context: as in `context_features`, one for each video (not for each frame).
          added_ids: as in `temporal_features`.
          control: as in `control_features`.
          reference: as in `denoise`.

        Returns:
          `[B, F, H, W, C]`, float32, on a mesh of explicit axes lying as the latents.
        """
        inputs = latents, timesteps, context, added_ids, control, reference
        return divided_by_xla(UNet3D._predict, self, *inputs)

    @nn.nowrap
    def _predict(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        added_ids: Array | None,
        control: Array | None,
        reference: Array | None,
    ) -> Array:
        return self.denoise(
            latents,
            self.temporal_features(timesteps, added_ids),
            self.context_features(context),
            None if control is None else self.control_features(control),
            reference,
        )
