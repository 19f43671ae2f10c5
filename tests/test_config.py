"""Dataclasses from untrusted dictionaries and back."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from qvd_jax.config import did_you_mean, from_dict, read_yaml, to_dict
from qvd_jax.errors import InputError
from qvd_jax.lora import LoRAConfig
from qvd_jax.models.configs import UNet3DConfig, animatediff
from qvd_jax.training.loop import LoopConfig


@dataclass(frozen=True)
class Engine:
    power: float
    fuel: Literal["petrol", "diesel"] = "petrol"

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"Engine.power = {self.power} must be positive")


@dataclass(frozen=True)
class Car:
    name: str
    engine: Engine
    spare: Engine | None = None
    electric: bool = False
    seats: int = 4
    gears: tuple[float, ...] = (3.5, 1.0)
    limits: tuple[float, float] = (0.0, 1.0)
    wheels: tuple[Engine, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    notes: Any = None


SMALL: dict[str, Any] = {"name": "small", "engine": {"power": 40.5}}


def through_json(config: Any) -> Any:
    return from_dict(type(config), json.loads(json.dumps(to_dict(config))), "file")


@pytest.mark.parametrize(
    "config",
    [
        Car("plain", Engine(1.0)),
        Car(
            "full",
            Engine(40.5, "diesel"),
            spare=Engine(2.0),
            electric=True,
            seats=2,
            gears=(),
            wheels=(Engine(1.0), Engine(2.0, "diesel")),
            options={"radio": 1},
            notes=[{"any": None}],
        ),
        animatediff("v2"),
        UNet3DConfig(
            block_channels=(8, 16),
            attention_levels=(True, False),
            num_heads=(2, 4),
            down_eps=(1e-6, 1e-5),
            up_eps=(1e-5, 1e-6),
            temporal_heads=(1, 2),
            norm_groups=4,
        ),
    ],
    ids=["defaults", "nested", "animatediff", "unet"],
)
def test_json_gives_the_same_config_back(config):
    again = through_json(config)
    assert again == config
    # Equality takes 1 for 1.0 and lists of them for lists: the types must survive as well.
    assert repr(again) == repr(config)


def test_whole_numbers_are_floats_where_floats_are_needed():
    car = from_dict(Car, {**SMALL, "engine": {"power": 40}, "gears": [3, 1.5]}, "file")
    assert (type(car.engine.power), type(car.gears[0])) == (float, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([SMALL], r"^file: a mapping is needed, got \["),
        (None, r"^file: a mapping is needed, got None$"),
        ({**SMALL, "seat": 2}, r"^file: unknown key 'seat'; did you mean 'seats'\?$"),
        ({**SMALL, "qqq": 2}, r"^file: unknown key 'qqq'; known: name, engine, spare, .*notes$"),
        ({**SMALL, 7: 2}, r"^file: unknown key 7; known: name"),
        ({"name": "small"}, r"^file: key 'engine' is missing$"),
        ({**SMALL, "engine": {}}, r"^file.engine: key 'power' is missing$"),
        ({**SMALL, "engine": 40.5}, r"^file.engine: a mapping is needed, got 40.5$"),
        ({**SMALL, "engine": None}, r"^file.engine: a mapping is needed, got None$"),
        ({**SMALL, "spare": {"power": "2"}}, r"^file.spare.power: float is needed, got '2'$"),
        ({**SMALL, "name": 3}, r"^file.name: str is needed, got 3$"),
        ({**SMALL, "seats": True}, r"^file.seats: int is needed, got True$"),
        ({**SMALL, "seats": 2.0}, r"^file.seats: int is needed, got 2.0$"),
        ({**SMALL, "seats": None}, r"^file.seats: int is needed, got None$"),
        ({**SMALL, "electric": 1}, r"^file.electric: bool is needed, got 1$"),
        ({**SMALL, "gears": 3.5}, r"^file.gears: a list is needed, got 3.5$"),
        ({**SMALL, "gears": "3"}, r"^file.gears: a list is needed, got '3'$"),
        ({**SMALL, "gears": [1.0, False]}, r"^file.gears\[1\]: float is needed, got False$"),
        ({**SMALL, "limits": [1.0]}, r"^file.limits: 2 values are needed, got \[1.0\]$"),
        ({**SMALL, "limits": [1.0, "2"]}, r"^file.limits\[1\]: float is needed, got '2'$"),
        ({**SMALL, "wheels": [{"power": 1}, {}]}, r"^file.wheels\[1\]: key 'power' is missing$"),
        ({**SMALL, "options": []}, r"^file.options: a mapping is needed, got \[\]$"),
        ({**SMALL, "options": {"radio": "on"}}, r"^file.options.radio: int is needed, got 'on'$"),
        (
            {**SMALL, "engine": {"power": 1.0, "fuel": "petroll"}},
            r"^file.engine.fuel: unknown value 'petroll'; did you mean 'petrol'\?$",
        ),
        (
            {**SMALL, "engine": {"power": 1.0, "fuel": None}},
            r"^file.engine.fuel: unknown value None; known: petrol, diesel$",
        ),
        ({**SMALL, "engine": {"power": -1}}, r"^file.engine: Engine.power = -1.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(data, message):
    with pytest.raises(InputError, match=message):
        from_dict(Car, data, "file")


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (LoopConfig, {"steps": 1, "batch_size": 1, "learning_rate": 1.0, "seed": -1}, "seed = -1"),
        (LoRAConfig, {"rank": 0}, "rank = 0"),
    ],
)
def test_what_shared_checks_refuse_is_named_with_its_place(cls, data, message):
    with pytest.raises(InputError, match=f"^file.part: {message}: "):
        from_dict(cls, data, "file.part")


@pytest.mark.parametrize("text", ["a: 1\nb: {c: 1, d: 2, c: 3}\n", "rules: []\nc: 1\nc: 2\n"])
def test_a_key_that_a_mapping_has_twice_is_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.yaml is no YAML: key 'c' is there twice.* line \d"):
        read_yaml(tmp_path / "a.yaml")


def test_merged_keys_of_yaml_may_be_set_anew(tmp_path):
    text = "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml")["mine"] == {"a": 1, "b": 3}


def test_inconsistent_unets_are_refused_with_their_place():
    plain = to_dict(UNet3DConfig())
    for change, message in (
        ({"num_heads": [8]}, r"^unet: UNet3DConfig.num_heads has 1 entries, one for each of the 4"),
        ({"norm_groups": 48}, r"^unet: UNet3DConfig.norm_groups = 48 does not divide the 320"),
        ({"temporal_heads": [8, 8, 7, 8]}, r"^unet: .*temporal_heads = 7 does not divide .*evel 2"),
        ({"temporal_op": "conv"}, r"^unet.temporal_op: unknown value 'conv'; known: motion_module"),
        ({"block_channel": [8]}, r"^unet: unknown key .*; did you mean 'block_channels'\?$"),
    ):
        with pytest.raises(InputError, match=message):
            from_dict(UNet3DConfig, {**plain, **change}, "unet")


@pytest.mark.parametrize("change", [{"norm_groups": 0}, {"num_heads": [8, 0, 8, 8]}], ids=str)
def test_divisors_of_zero_are_refused(change):
    with pytest.raises(InputError, match=f"^unet: UNet3DConfig.{next(iter(change))}"):
        from_dict(UNet3DConfig, change, "unet")


def test_hints_name_the_nearest_word_or_all_of_them():
    assert did_you_mean("eulr", ["ddim", "euler"]) == "; did you mean 'euler'?"
    assert did_you_mean("zzz", {"ddim": 1, "euler": 2}) == "; known: ddim, euler"
    assert did_you_mean("zzz", [*map(str, range(99))]).endswith("28, 29 and 69 more")
