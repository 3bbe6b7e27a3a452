"""Settings from YAML files and flags to config objects, and what is said when one is wrong.

    argv ─flags─┐
                ├─► {name: value} ─► config class, or one ConfigError
    YAML file ──┘

Works on any of the classes in `config.py`. Nothing here imports torch, ray or transformers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from raywards.errors import ConfigError, did_you_mean
from raywards.trl_fields import Refused

_SECRETS = ("api_key", "hub_token")
_FINDINGS_SHOWN = 10


def read_settings(argv: Sequence[str], classes: Sequence[type[Any]]) -> list[Any]:
    """Instances of `classes` from `--config FILE.yaml` and `--field value` flags; flags win.

    A key belongs to the first class that has a field of its name. Raises `ConfigError` for a key
    or flag that no class knows, and for a value that its field refuses.
    """
    flags = _read_flags(argv, classes)
    config_file = flags.pop("config", None)
    settings = {**(_read_yaml(config_file) if config_file else {}), **flags}
    known = {name: cls for cls in reversed(classes) for name in field_names(cls)}
    refused = {name: advice for cls in classes for name, advice in refused_settings(cls).items()}
    shares: dict[type[Any], dict[str, Any]] = {cls: {} for cls in classes}
    for name, value in settings.items():
        if name in known:
            shares[known[name]][name] = value
        elif not (name in refused and _means_neutral(value, refused[name])):
            check_names({name}, known, refused)
    return [cls(**share) for cls, share in shares.items()]


def describe(error: ValidationError, cls: Any) -> str:
    """A screenful that names each refused field, the value seen, and what is expected."""
    lines = []
    findings = error.errors(include_url=False)
    for finding in findings[:_FINDINGS_SHOWN]:
        path = ".".join(str(part) for part in finding["loc"])
        if finding["type"] in (
            "extra_forbidden",
            "unexpected_keyword_argument",
            "no_such_attribute",
        ):
            lines.append(f"{path}: no such setting.{did_you_mean(path, field_names(cls))}")
        elif finding["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
            lines.append(f"{path}: is required, and was not given.")
        else:
            reason = finding["msg"].removeprefix("Value error, ")
            told = finding["type"] == "value_error" or path in _SECRETS
            # Of settings that do not agree there is no path, and all of them would be the input.
            line = f"{path}: {reason}" if path else reason
            lines.append(line + ("" if told or not path else f" (got {finding['input']!r:.80})"))
    if len(findings) > _FINDINGS_SHOWN:
        lines.append(f"and {len(findings) - _FINDINGS_SHOWN} more")
    return f"{cls.__name__}: " + "\n  ".join(["", *lines] if len(lines) > 1 else lines)


def field_names(cls: Any) -> list[str]:
    """Names of the settings of a config class."""
    if is_pydantic_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(cls.model_fields)


def refused_settings(cls: Any) -> Mapping[str, Refused]:
    """Settings that a config class refuses by name, with what to use instead."""
    refused: Mapping[str, Refused] = getattr(cls, "refused", {})
    return refused


def check_names(names: Iterable[str], known: Iterable[str], refused: Mapping[str, Refused]) -> None:
    """Refuse what is not `known`: TRL's with what to use instead, others as typos."""
    options = set(known)
    for name in names:
        if name in options:
            continue
        if name in refused:
            raise ConfigError(
                f"{name}: raywards does not support this setting of TRL. {refused[name].instead}"
            )
        raise ConfigError(f"{name}: no such setting.{did_you_mean(name, options)}")


def read_mapping(text: str) -> dict[str, Any]:
    """A mapping written as JSON or YAML. Raises `ValueError`."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'expected a mapping such as {{"key": value}}, got {text!r:.80}')
    return value


def help_text(classes: Sequence[type[Any]]) -> str:
    """The `--help` of a job: every flag with its default and docstring."""
    lines = ["  --config FILE", "      YAML file with any of the settings below; flags win."]
    for cls in classes:
        lines += ["", f"{cls.__name__}: {(cls.__doc__ or '').splitlines()[0]}"]
        for name, field in _fields(cls).items():
            default = "required" if field.is_required() else f"default {field.default!r}"
            lines.append(f"  --{name}  ({default})")
            lines.append("      " + " ".join((field.description or "").split()))
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML where `1e-4` is a number, as in Python and JSON, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


# YAML 1.1 wants a dot and a sign: `1e-4` would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _fields(cls: Any) -> dict[str, Any]:
    if is_pydantic_dataclass(cls):
        return dict(cls.__pydantic_fields__)
    return dict(cls.model_fields)


def _means_neutral(value: Any, refused: Refused) -> bool:
    """Whether a flag's text or a YAML value is one that means what raywards does anyway."""
    if isinstance(value, str) and value not in refused.neutral:
        try:
            value = yaml.safe_load(value.lower())
        except yaml.YAMLError:
            return False
    return value in refused.neutral


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.y*ml")])
        raise ConfigError(f"--config {path}: there is no such file.{near}")
    try:
        settings = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ConfigError(
            f"--config {path}: expected `name: value` lines at the top, got a {kind}."
        )
    return {str(name): _yaml_value(value) for name, value in settings.items()}


def _yaml_value(value: Any) -> Any:
    # YAML's own null is `null`; `none` is what the flags take, and Python's word.
    return None if isinstance(value, str) and value.lower() == "none" else value


def _read_flags(argv: Sequence[str], classes: Sequence[type[Any]]) -> dict[str, Any]:
    """`--name value`, `--name=value`, or `--name` alone for true. `-` and `_` are one."""
    switches = {
        n for cls in classes for n, f in _fields(cls).items() if "bool" in str(f.annotation)
    }
    switches |= {name for cls in classes for name in refused_settings(cls)}
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"{word!r}: expected a flag such as --learning_rate 1e-4; see --help."
            )
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            flags[name] = _flag_value(text)
        elif words and not words[0].startswith("--"):
            flags[name] = _flag_value(words.pop(0))
        elif name in switches:
            flags[name] = True
        else:
            known = ["config", *(n for cls in classes for n in field_names(cls))]
            hint = "expected a value after it." if name in known else "no such setting."
            raise ConfigError(
                f"--{name}: {hint}{did_you_mean(name, known) if name not in known else ''}"
            )
    return flags


def _flag_value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text
