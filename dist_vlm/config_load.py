"""Reads a configuration from YAML and from command-line flags, and writes it back as YAML.

Both forms come from the fields of `dist_vlm.config` and `dist_vlm.config_server`; every error is a `ConfigError` that
names where the value stands.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dist_vlm.config import RULES, SECTION_OF, SECTIONS, ConfigError, EngineConfig, resolve
from dist_vlm.config_environment import resolved_server
from dist_vlm.config_fields import Rule, nearest, nearest_name, rules_of
from dist_vlm.config_resolve import resolved_without_checkpoint
from dist_vlm.config_server import ServerConfig

SERVER = "server"
SERVER_RULES = rules_of(ServerConfig)

# The engine's sections and the server's. Field names are unique over all of them.
_SECTIONS: dict[str, type] = {**SECTIONS, SERVER: ServerConfig}
_RULES: dict[str, Rule] = {**RULES, **SERVER_RULES}
_SECTION_OF: dict[str, str] = {**SECTION_OF, **dict.fromkeys(SERVER_RULES, SERVER)}
_FLAG_PREFIX = "config_flag_"


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A configuration and, for each field that was given, where: a file or a flag. `file` is "" without one."""

    config: EngineConfig
    server: ServerConfig
    sources: Mapping[str, str]
    file: str = ""

    @property
    def has_server(self) -> bool:
        """Whether any field of the server was given."""
        return any(name in SERVER_RULES for name in self.sources)

    def resolve(self, *, checkpoint: bool = True) -> EngineConfig:
        """The configuration with every auto decided; without `checkpoint`, only what needs none.

        Errors name the source of the value.
        """
        try:
            return resolve(self.config) if checkpoint else resolved_without_checkpoint(self.config)
        except ConfigError as error:
            raise self.located(error) from None

    def resolve_server(self, environ: Mapping[str, str]) -> ServerConfig:
        """The server's section with everything decided. Errors name the variable."""
        return resolved_server(self.server, self.config, environ)

    def located(self, error: ConfigError) -> ConfigError:
        """An error about one of the fields, with the source of the value."""
        return error.at(_source_of(error, self.sources, self.file))


def section_of(name: str) -> str:
    """The section that a field, the engine's or the server's, stands in."""
    return _SECTION_OF[name]


def load_config(path: str | None, flags: Mapping[str, str] | None = None) -> LoadedConfig:
    """Reads a YAML file (or none) and lays flags over it. `flags` maps field names to a command line's text."""
    values, sources = ({}, {}) if path is None else _read_yaml(path)
    for name, text in (flags or {}).items():
        rule = _RULES[name]
        try:
            values[name] = rule.parse(text)
        except ValueError as error:
            raise rule.error(str(error), field=name, value=text, source=flag_of(name)) from None
        sources[name] = flag_of(name)
    return _assemble(values, sources, path or "")


def _assemble(values: dict[str, Any], sources: dict[str, str], file: str) -> LoadedConfig:
    if "model" not in values:
        problem = f"model.model is missing: a checkpoint directory is needed (or {flag_of('model')} DIR)"
        raise ConfigError(problem, source=file)
    engine = {name: value for name, value in values.items() if name not in SERVER_RULES}
    server = {name: value for name, value in values.items() if name in SERVER_RULES}
    try:
        return LoadedConfig(
            config=EngineConfig.from_fields(**engine), server=ServerConfig(**server), sources=sources, file=file
        )
    except ConfigError as error:
        raise error.at(_source_of(error, sources, file)) from None


def _source_of(error: ConfigError, sources: Mapping[str, str], file: str) -> str:
    return sources.get(error.field.rpartition(".")[2], file)


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Refuses what YAML allows and a configuration cannot mean: a key given twice, or a key that is no string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: the key {key!r} must be a string")
            if key in seen:
                raise ConfigError(f"line {line}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Checked values of a file, by flat field name, and the source of each."""
    try:
        document = _parse_yaml(path)
        values = _checked_document(document, os.path.dirname(os.path.abspath(path)))
    except ConfigError as error:
        raise error.at(path) from None
    return values, dict.fromkeys(values, path)


def _parse_yaml(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("is not a configuration: nested too deeply") from None


def _checked_document(document: Any, folder: str) -> dict[str, Any]:
    known = ", ".join(_SECTIONS)
    if document is None:
        raise ConfigError(f"is empty; a configuration has the sections {known}")
    if not isinstance(document, dict):
        raise ConfigError(f"must hold a mapping of the sections {known}, not {_article(document)}")
    values: dict[str, Any] = {}
    for section, entries in document.items():
        if section not in _SECTIONS:
            raise ConfigError(_unknown_section(section), field=section)
        values.update(_checked_section(section, entries, folder))
    return values


def _checked_section(section: str, entries: Any, folder: str) -> dict[str, Any]:
    if entries is None:
        return {}
    rules = rules_of(_SECTIONS[section])
    if not isinstance(entries, dict):
        problem = f"must be a mapping of its keys {', '.join(rules)}"
        raise _no_field(problem, section, value=entries)
    values = {}
    for key, value in entries.items():
        if key not in rules:
            raise _no_field(_unknown_key(section, key), section, key, value=value)
        try:
            checked = rules[key].check(value)
        except ValueError as error:
            problem = str(error) + _quoted_hint(value, rules[key].kind)
            raise rules[key].error(problem, field=f"{section}.{key}", value=value) from None
        values[key] = _anchored(checked, folder) if rules[key].of_kind.names_path(checked) else checked
    return values


def _no_field(problem: str, section: str, key: str = "", *, value: Any) -> ConfigError:
    """An error about something that is no field; without its value where that may be meant to be a secret."""
    close = nearest_name(key, _RULES)
    is_secret = section == SERVER or (close is not None and _RULES[close].of_kind.is_secret)
    field = f"{section}.{key}" if key else section
    return ConfigError(problem, field=field) if is_secret else ConfigError(problem, field=field, value=value)


def _anchored(path: str, folder: str) -> str:
    return os.path.normpath(os.path.join(folder, path)) if path.startswith(("./", "../")) else path


def _quoted_hint(value: Any, kind: str) -> str:
    return " (it is a string)" if isinstance(value, str) and kind in ("int", "float", "bool") else ""


def _unknown_section(name: str) -> str:
    if name in _SECTION_OF:
        return f"unknown section; the key {name} belongs in {_SECTION_OF[name]}.{name}"
    return f"unknown section; the sections are {', '.join(_SECTIONS)}{nearest(name, _SECTIONS)}"


def _unknown_key(section: str, key: str) -> str:
    if key in _SECTION_OF:
        return f"unknown key in {section}; it belongs in {_SECTION_OF[key]}.{key}"
    close = nearest_name(key, rules_of(_SECTIONS[section])) or nearest_name(key, _RULES)
    if close is None:
        return f"unknown key; {section} has {', '.join(rules_of(_SECTIONS[section]))}"
    return f"unknown key; the nearest is {_SECTION_OF[close]}.{close}"


def _article(value: Any) -> str:
    names: dict[type, str] = {list: "a list", str: "a string", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def dump_yaml(
    config: EngineConfig, sources: Mapping[str, str] | None = None, *, server: ServerConfig | None = None
) -> str:
    """The configuration as YAML that loads to an equal one. With `sources`, a comment tells where a value is from.

    A secret is no part of it: a comment says that there is one.
    """
    sections = {name: getattr(config, name) for name in SECTIONS} | ({SERVER: server} if server is not None else {})
    lines = []
    for name, section in sections.items():
        lines.append(f"{name}:")
        lines += [_dumped_line(section, field, rule, sources) for field, rule in rules_of(type(section)).items()]
    return "\n".join(lines) + "\n"


def _dumped_line(section: Any, field: str, rule: Rule, sources: Mapping[str, str] | None) -> str:
    value = getattr(section, field)
    comment = f"  # {sources[field]}" if sources is not None else ""
    if value is not None and rule.of_kind.is_secret:
        return f"  # {field} is set, and not shown{comment.replace('  # ', ': ')}"
    plain = list(value) if isinstance(value, tuple) else value
    braced = yaml.safe_dump({field: plain}, default_flow_style=True, width=1 << 20, allow_unicode=True)
    return f"  {braced.strip()[1:-1]}{comment}"


# ---- command line ----


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_config_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(RULES)) -> None:
    """Adds a flag for each of the named fields; a boolean one also has a --no- form. `config_flags` reads them back.

    names: the engine's fields alone by default; those of the server are `SERVER_RULES`.
    """
    for section, kind in _SECTIONS.items():
        chosen = {name: rule for name, rule in rules_of(kind).items() if name in names}
        group = parser.add_argument_group(f"configuration: {section}") if chosen else parser
        for name, rule in chosen.items():
            _add_flag(group, name, rule)


def _add_flag(group: argparse._ActionsContainer, name: str, rule: Rule) -> None:
    text = rule.help.replace("%", "%%")
    dest, flag = _FLAG_PREFIX + name, flag_of(name)
    if rule.kind == "bool":
        opposite = "--no-" + flag.removeprefix("--")
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, action="store_const", const="true", help=text)
        group.add_argument(
            opposite, dest=dest, default=argparse.SUPPRESS, action="store_const", const="false", help=argparse.SUPPRESS
        )
        return
    flags = [flag, *([rule.short_flag] if rule.short_flag else [])]
    metavar = "|".join(map(str, rule.choices)) if rule.choices else rule.of_kind.metavar
    group.add_argument(*flags, dest=dest, default=argparse.SUPPRESS, metavar=metavar, help=text)


def config_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Field name to the text given for it, of the flags that `add_config_flags` added."""
    given = vars(arguments)
    return {key.removeprefix(_FLAG_PREFIX): given[key] for key in given if key.startswith(_FLAG_PREFIX)}
