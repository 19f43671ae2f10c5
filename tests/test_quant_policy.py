"""Policies: names, rules in order, what they say about layers."""

from dataclasses import replace

import pytest

from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.models.configs import (
    MAGIC_ANIMATE,
    MODELSCOPE,
    STABLE_VIDEO_DIFFUSION,
    UNet3DConfig,
    animatediff,
)
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.quant.policy import (
    LayerSpec,
    Policy,
    Rule,
    TracedLayer,
    match,
    match_table,
    named_policy,
)
from qvd_jax.quant.statistics import trace_layers

LAYERS = [
    TracedLayer("conv_in", (3, 3, 4, 8), (1, 2, 4, 4, 4), (1, 2, 4, 4, 8), (0,)),
    TracedLayer("time_embedding/linear_1", (8, 32), (1, 8), (1, 32), (1,)),
    TracedLayer("down_blocks_0/blocks_0/resnet/time_emb_proj", (32, 8), (1, 32), (1, 8), (2,)),
    TracedLayer(
        "down_blocks_0/blocks_0/resnet/conv1", (3, 3, 8, 8), (1, 2, 4, 4, 8), (1, 2, 4, 4, 8), (3,)
    ),
    TracedLayer(
        "down_blocks_0/blocks_0/motion_module/block/attn1/to_qkv",
        (8, 24),
        (16, 2, 8),
        (16, 2, 24),
        (4,),
    ),
    TracedLayer("conv_out", (3, 3, 8, 4), (1, 2, 4, 4, 8), (1, 2, 4, 4, 4), (5,)),
]


def test_qvd_is_htdq_on_temporal_features_and_scri_elsewhere():
    specs = match(named_policy("qvd-w4a8"), LAYERS)
    assert specs == {
        LAYERS[1].path: LayerSpec("htdq", 4, 8),
        LAYERS[2].path: LayerSpec("htdq", 4, 8),
        LAYERS[3].path: LayerSpec("scri", 4, 8),
        LAYERS[4].path: LayerSpec("scri", 4, 8),
    }


@pytest.mark.parametrize(
    ("config", "projections", "embeddings"),
    [
        (animatediff("v2"), 22, 2),
        (MODELSCOPE, 22, 2),
        (STABLE_VIDEO_DIFFUSION, 44, 4),
        (MAGIC_ANIMATE, 22 + 10 + 22, 2 + 2 + 2),
    ],
    ids=["AnimateDiff", "ModelScope", "SVD", "MagicAnimate"],
)
def test_htdq_takes_every_temporal_feature_of_the_real_models(
    config: UNet3DConfig, projections: int, embeddings: int
):
    """At full size, from shapes alone."""
    shapes = ComponentConfigs(config, VAEConfig()).unet_shapes(2, 8, 8, 1)
    layers = trace_layers(UNet3D(config), *shapes)
    specs = match(named_policy("qvd-w8a8"), layers)
    taken = [path for path, spec in specs.items() if spec.method == "htdq"]
    ends = [path.rpartition("/")[2] for path in taken]
    assert ends.count("time_emb_proj") == projections
    assert sum(end in ("linear_1", "linear_2") for end in ends) == embeddings
    assert len(taken) == projections + embeddings
    # The frames' numbers are the same for every video.
    assert not any("time_pos_embed" in path for path in specs)


@pytest.mark.parametrize(
    ("name", "ordinary", "temporal"),
    [
        ("qvd-scri-w8a8", "scri", "minmax"),
        ("qvd-htdq-w6a6", "minmax", "htdq"),
        ("smoothquant-w8a8", "smoothquant", "smoothquant"),
        ("qvd-w8a16", "minmax", "minmax"),
    ],
)
def test_named_policies(name, ordinary, temporal):
    specs = match(named_policy(name), LAYERS)
    assert specs[LAYERS[3].path].method == ordinary
    assert specs[LAYERS[2].path].method == temporal


@pytest.mark.parametrize("method", ["qvd", "minmax", "mse", "smoothquant", "qdiffusion"])
def test_the_plus_of_a_method_is_its_own_with_the_same_options_as_all_others(method):
    """So that what a table of them compares is the method."""
    plain, plus = (match(named_policy(f"{method}{kind}-w4a8"), LAYERS) for kind in ("", "-plus"))
    for path, spec in plain.items():
        ranges = "static" if spec.method == "htdq" or path.endswith("conv1") else "token"
        own = "learned" if spec.method == "scri" else spec.method
        options = {"rounding": "gptq", "ranges": ranges}
        assert plus[path] == replace(spec, method=own, **options)
    floats = match(named_policy(f"{method}-plus-w8a16"), LAYERS)
    assert set(floats.values()) == {LayerSpec("minmax", 8, 16, rounding="gptq")}


def test_the_first_rule_that_matches_decides():
    policy = Policy(
        "own",
        (Rule("*/motion_module/*"), Rule("down_blocks_*", LayerSpec("mse", 6, 8))),
    )
    assert set(match(policy, LAYERS)) == {LAYERS[2].path, LAYERS[3].path}
    table = match_table(policy, LAYERS).splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["*/motion_module/*", "1", "192"],
        ["down_blocks_*", "2", "832"],
        ["(no", "rule)", "3"],
    ]
    # Two per weight and position: 32 positions of to_qkv.
    assert LAYERS[4].flops == 2 * 8 * 24 * 32


@pytest.mark.parametrize(
    ("data", "clips"),
    [
        ({"method": "minmax", "weight_bits": 4}, True),
        ({"method": "scri", "weight_bits": 5}, False),
        ({"method": "htdq", "weight_bits": 4, "weight_clipping": False}, False),
        ({"method": "mse", "weight_clipping": True}, True),
    ],
)
def test_weights_of_four_bits_are_clipped_unless_a_file_says_otherwise(data, clips):
    """Whatever the method; files of before the key have none."""
    spec = from_dict(LayerSpec, data, "p.yaml")
    assert spec.clips_weights is clips
    table = match_table(Policy("own", (Rule("*", spec),)), LAYERS)
    assert ("weights clipped" in table) is clips


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("up_blocks_*"), Rule("*")), r"rule 1 \('up_blocks_\*'\): no layer has such a path"),
        ((Rule("*"), Rule("conv_in")), r"rule 2 \('conv_in'\): the rules before it decide"),
    ],
)
def test_a_rule_that_decides_about_nothing_is_an_error(rules, message):
    with pytest.raises(InputError, match=message):
        match(Policy("own", rules), LAYERS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "scry"}, "unknown value 'scry'; did you mean 'scri'"),
        ({"method": "scri", "weight_bits": 9}, "weight_bits = 9: 2 to 8 are possible"),
        ({"method": "scri", "activation_bits": 12}, "activation_bits = 12: 2 to 8, or 16"),
        ({"method": "htdq", "activation_bits": 16}, "minmax is needed"),
        ({"methods": "scri"}, "unknown key 'methods'; did you mean 'method'"),
        ({"method": "scri", "rounding": "adaround"}, "unknown value 'adaround'"),
    ],
)
def test_bad_rules_name_their_place(data, message):
    policy = {"name": "own", "rules": [{"pattern": "*", "spec": data}]}
    with pytest.raises(InputError, match=r"p\.yaml\.rules\[0\]\.spec.*" + message.split(";")[0]):
        from_dict(Policy, policy, "p.yaml")


def test_unknown_names_give_the_nearest():
    with pytest.raises(InputError, match="unknown policy 'qvd-w8a9'; did you mean 'qvd-w8a8'"):
        named_policy("qvd-w8a9")
