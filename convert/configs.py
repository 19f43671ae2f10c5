"""Reading configs so that no key is dropped in silence.

Every key of a class is in one of its tables: it is obeyed, told better by the tensors, supported
at some values only, left out by diffusers too, or without influence on the result. A key in none of
them is named in a note.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig

Json = Mapping[str, Any]


class ConfigClass(NamedTuple):
    """What is done with the keys of a class.

    Attributes:
      name: of the class.
      obeyed: keys that are read, and the values the class gives to those that are absent.
      told: keys that the tensors' names and shapes tell; a config that contradicts them is named.
      only: keys that change the result, and the values that are supported; of a list each entry
        must be one.
      ignored: keys that diffusers' pipelines of videos do not read, and their defaults; another
        value is named.
      irrelevant: keys that do not change the result, and why.
      aliases: other names of the class in `_class_name` or `model_type`.
    """

    name: str
    obeyed: Json
    told: tuple[str, ...]
    only: Mapping[str, tuple[Any, ...]]
    irrelevant: Mapping[str, str]
    ignored: Mapping[str, Any] = {}
    aliases: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """All keys that the tables know."""
        return (
            frozenset(self.obeyed)
            | frozenset(self.told)
            | frozenset(self.only)
            | frozenset(self.irrelevant)
            | frozenset(self.ignored)
        )


class Config(NamedTuple):
    """A config that has been read.

    Attributes:
      values: of the obeyed keys.
      notes: what the user should know.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def read(json: Json, known: ConfigClass, where: str) -> Config:
    """Reads a `config.json`.

    Args:
      json: its content; empty where there is none.
      known: its class.
      where: how messages name the component.

    Raises:
      InputError: it is of another class, or a key has a value that is not supported.
    """
    for key in ("_class_name", "model_type"):
        if json.get(key) not in (None, known.name, *known.aliases):
            raise InputError(
                f"{where}: its config.json is of {json[key]}, which is not supported here; "
                f"{known.name} is expected"
            )
    notes = []
    for key, value in json.items():
        if key in known.only and not _supported(value, known.only[key]):
            raise InputError(
                f"{where}: {key} = {value!r} is not supported; it must be "
                f"{' or '.join(map(repr, known.only[key]))}"
            )
        if key in known.ignored and not _same(value, known.ignored[key]):
            notes.append(
                f"{where}: {key} = {value!r} has no effect: the UNet of videos computes as with "
                f"{known.ignored[key]!r}, in diffusers, too"
            )
        if key not in known.keys and key not in BOOKKEEPING:
            notes.append(f"{where}: {key} = {value!r} is no key of {known.name}; left out")
    values = {key: json.get(key, default) for key, default in known.obeyed.items()}
    return Config(values, tuple(notes))


def contradictions(json: Json, facts: Json, where: str) -> tuple[str, ...]:
    """Notes on keys whose values are not what the tensors tell.

    Args:
      json: a `config.json`.
      facts: what the tensors tell, by key; one value may stand for a list of equal ones.
      where: how messages name the component.
    """
    return tuple(
        f"{where}: config.json says {key} = {json[key]!r}, but the weights have {fact!r}; the "
        f"weights decide"
        for key, fact in facts.items()
        if json.get(key) is not None and not _same(json[key], fact)
    )


def check_like(values: Json, unet: UNet3DConfig, where: str) -> None:
    """Raises `InputError` if values are not those of the UNet that a network stands beside.

    Args:
      values: what the network's config says, by key; one may stand for a list of equal ones.
      unet: the UNet.
      where: how messages name the network.
    """
    heads = values["num_attention_heads"] or values["attention_head_dim"]
    own = {**values, "attention_head_dim": heads}
    shared = {
        "attention_head_dim": unet.num_heads,
        "norm_num_groups": unet.norm_groups,
        "norm_eps": (*unet.down_eps, unet.mid_eps),
        "motion_num_attention_heads": unet.temporal_heads,
    }
    for key, wanted in shared.items():
        if key in own and not _same(own[key], wanted):
            raise InputError(
                f"{where}: {key} = {own[key]!r}, but the UNet beside it has {wanted!r}; both "
                f"must be alike"
            )


def _supported(value: Any, allowed: tuple[Any, ...]) -> bool:
    entries = value if isinstance(value, list | tuple) and value else [value]
    return all(_supported(v, allowed) if isinstance(v, list) else v in allowed for v in entries)


def _same(value: Any, fact: Any) -> bool:
    if isinstance(value, list | tuple) and not isinstance(fact, list | tuple):
        return all(_same(entry, fact) for entry in value)
    if isinstance(fact, list | tuple) and not isinstance(value, list | tuple):
        return all(_same(value, entry) for entry in fact)
    if isinstance(value, list | tuple):
        return len(value) == len(fact) and all(map(_same, value, fact))
    return bool(value == fact)


BOOKKEEPING = frozenset(
    {
        "_class_name",
        "_commit_hash",
        "_diffusers_version",
        "_module",
        "_name_or_path",
        "_use_default_values",
        "_attn_implementation_autoset",
        "model_type",
    }
)
"""Keys that every config may have, of where it comes from."""
