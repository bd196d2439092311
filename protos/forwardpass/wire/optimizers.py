"""Keras optimizers as JSON: names and configurations in one canonical form, checked without Keras."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from forwardpass.wire.errors import OptimizerNotSupported

OPTIMIZERS = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lamb",
    "Lion",
    "Muon",
    "Nadam",
    "RMSprop",
    "SGD",
    "ScheduleFreeAdamW",
)
"""The classes of Keras's optimizers, without those that wrap other optimizers."""

SCHEDULES = (
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
)
"""The classes of Keras's learning-rate schedules."""

# Keras's longest configuration has 1,100 characters.
_MAX_CHARS = 16_384
# A PiecewiseConstantDecay makes five operations for each number.
_MAX_NUMBERS = 256
_MAX_NAME_CHARS = 64
# Larger integers are not exact as JSON numbers.
_MAX_INTEGER = 2**53

_KEYS = {"class_name", "config", "module", "registered_name", "build_config", "compile_config"}


class Optimizer(NamedTuple):
    """An optimizer.

    text: its canonical JSON, {"class_name": ..., "config": {...}} with sorted keys and without whitespace. The config
      has no "name", and no "learning_rate" unless that is a schedule. Equal texts are equal optimizers.
    learning_rate: the number in its configuration; None for a schedule, and where the configuration has none.
    has_schedule: whether the learning rate is a schedule.
    """

    text: str
    learning_rate: float | None
    has_schedule: bool


def canonical(optimizer: str | Mapping[str, Any], place: str = "optimizer") -> Optimizer:
    """The canonical form of an optimizer.

    optimizer: the name of a class of `OPTIMIZERS` in any case ("sgd"), or what `keras.optimizers.serialize` returns, as
      a mapping or as JSON: {"class_name": "Adam", "config": {"learning_rate": 0.01}}. Only a learning rate may be a
      nested object, of a class of `SCHEDULES`.
    Raises OptimizerNotSupported, which names the place. The server, which has Keras, checks the keys of the config.
    """
    if isinstance(optimizer, str) and not optimizer.lstrip().startswith("{"):
        optimizer = {"class_name": optimizer}
    value = _parsed(optimizer, place)
    class_name, config = _object(value, OPTIMIZERS, place)
    place = f"{place}.config"
    learning_rate = config.pop("learning_rate", None)
    checked = {name: _value(config[name], f"{place}.{name}") for name in config}
    rate = None
    if isinstance(learning_rate, dict):
        schedule_place = f"{place}.learning_rate"
        schedule_class, schedule = _object(learning_rate, SCHEDULES, schedule_place)
        checked["learning_rate"] = {
            "class_name": schedule_class,
            "config": {name: _value(schedule[name], f"{schedule_place}.config.{name}") for name in schedule},
        }
    elif learning_rate is not None:
        rate = check_learning_rate(learning_rate, f"{place}.learning_rate")
    text = json.dumps({"class_name": class_name, "config": checked}, sort_keys=True, separators=(",", ":"))
    return Optimizer(text, rate, isinstance(learning_rate, dict))


def check_learning_rate(value: object, place: str = "learning_rate") -> float:
    """The learning rate as a float. Raises OptimizerNotSupported unless it is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise OptimizerNotSupported(
            place=place, expected="a finite number that is not negative, or a schedule", found=_shown(value)
        )
    return float(value)


def _parsed(optimizer: Any, place: str) -> Any:
    """The value of JSON; a mapping as if it had been JSON."""
    if not isinstance(optimizer, str):
        try:
            optimizer = json.dumps(optimizer)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptimizerNotSupported(f"expected JSON values: {error}", place=place) from None
    if len(optimizer) > _MAX_CHARS:
        raise OptimizerNotSupported(
            place=place, expected=f"at most {_MAX_CHARS} characters of JSON", found=str(len(optimizer))
        )

    def refuse(constant: str) -> None:
        raise OptimizerNotSupported(place=place, expected="finite numbers", found=constant)

    try:
        return json.loads(optimizer, parse_constant=refuse)
    except OptimizerNotSupported:
        raise
    except (ValueError, RecursionError) as error:
        raise OptimizerNotSupported(f"expected JSON: {error}", place=place) from None


def _object(value: Any, classes: tuple[str, ...], place: str) -> tuple[str, dict[str, Any]]:
    """The class and the configuration of a serialized object, without its "name"."""
    if not isinstance(value, dict) or not _KEYS.issuperset(value) or "class_name" not in value:
        raise OptimizerNotSupported(
            place=place, expected='an object {"class_name": ..., "config": {...}}', found=_shown(value)
        )
    known = {name.lower(): name for name in classes}
    class_name = value["class_name"]
    if not isinstance(class_name, str) or class_name.lower() not in known:
        raise OptimizerNotSupported(
            place=f"{place}.class_name", expected=f"one of {', '.join(classes)}", found=_shown(class_name)
        )
    # What Keras writes beside the class and the configuration. Anything else names code that is not Keras's.
    if value.get("registered_name") is not None:
        raise OptimizerNotSupported(
            place=f"{place}.registered_name", expected="null", found=_shown(value["registered_name"])
        )
    module = value.get("module")
    if module is not None and module not in ("keras.optimizers", "keras.optimizers.schedules"):
        raise OptimizerNotSupported(place=f"{place}.module", expected="keras.optimizers", found=_shown(module))
    for key in ("build_config", "compile_config"):
        if value.get(key):
            raise OptimizerNotSupported(place=f"{place}.{key}", expected="null", found=_shown(value[key]))
    config = value.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise OptimizerNotSupported(place=f"{place}.config", expected="an object", found=_shown(config))
    return known[class_name.lower()], {key: config[key] for key in config if key != "name"}


def _value(value: Any, place: str) -> Any:
    """A value of a configuration: a number, a boolean, null, or a list of numbers."""
    if isinstance(value, list):
        if len(value) > _MAX_NUMBERS:
            raise OptimizerNotSupported(
                place=place, expected=f"at most {_MAX_NUMBERS} numbers", found=f"{len(value)} items"
            )
        return [_number(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    return _number(value, place)


def _number(value: Any, place: str) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise OptimizerNotSupported(place=place, expected="a finite number", found=_shown(value))


def _shown(value: object) -> str:
    """A value for an error message: what a caller sent may be long."""
    if isinstance(value, dict):
        return f"an object with the keys {sorted(str(key)[:_MAX_NAME_CHARS] for key in value)[:10]}"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return "a larger integer"
    text = json.dumps(value) if value is None or isinstance(value, (bool, str)) else str(value)
    return text if len(text) <= _MAX_NAME_CHARS else text[:_MAX_NAME_CHARS] + "..."
