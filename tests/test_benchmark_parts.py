"""The parts of a UNet that the benchmark compiles are what the UNet itself is made of."""

from collections import Counter
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from qvd_jax.benchmarks import parts
from qvd_jax.benchmarks.unet import SIZES, Case
from qvd_jax.models.unet3d import UNet3D

TINY = SIZES["tiny"]()
UNETS = {
    "animatediff": TINY,
    "svd": replace(
        TINY,
        temporal_op="spatio_temporal",
        temporal_mid_block=False,
        max_frames=None,
        added_ids=3,
        in_channels=8,
    ),
}
CLASSES = {
    "layer": ("Layer",),
    "resnet": ("ResnetBlock", "SpatioTemporalResnet"),
    "spatial": ("SpatialTransformer",),
    "spatio_temporal": ("SpatioTemporalTransformer",),
    "motion": ("TemporalTransformer",),
}


OF_PARTS = {cls for classes in CLASSES.values() for cls in classes}


def shapes(tree):
    return str(jax.tree.map(jnp.shape, tree))


@pytest.mark.parametrize("family", UNETS)
def test_parts_are_given_what_the_unet_gives_its_layers(monkeypatch, family):
    monkeypatch.setitem(SIZES, family, lambda: UNETS[family])
    case = Case(family, 2, 3, 8, 12)
    called = Counter()

    def note(run, args, kwargs, context):
        cls = type(context.module).__name__
        # The halves of SVD's resnet are none of the UNet's.
        own = context.module.name not in ("spatial", "temporal")
        if cls in OF_PARTS and context.method_name == "__call__" and own:
            called[cls, shapes(args)] += 1
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(UNet3D(case.config).init, jax.random.key(0), *case.shapes())
    names = [name for name in parts.names(case.config) if name.partition(".")[2] in CLASSES]
    counts = Counter()
    for name in names:
        kind, part = name.partition(".")[2], parts.find(name, case, jnp.bfloat16)
        assert any((cls, shapes(part.inputs)) in called for cls in CLASSES[kind]), name
        counts[kind] += parts.count(name, case.config)
    for kind, classes in CLASSES.items():
        assert counts[kind] == sum(n for (cls, _), n in called.items() if cls in classes), kind
