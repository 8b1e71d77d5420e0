"""Command lines of dataclasses.

There is an option for each field. `--config FILE.yaml` sets options as well, and the command line wins. Every command
of the project gets its parser here. Torch is not imported, so that `--help` and a mistake are answered at once. Values
are read as `trl.TrlParser` reads them, and a test compares the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import yaml

from rlg import config_files
from rlg.cli import Parser, fail_cleanly
from rlg.io.parsing import check_type, read_yaml
from rlg.io.spellings import canonical_keys

ConfigT = TypeVar("ConfigT")
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_CONFIG, _DRY_RUN = "config", "dry_run"


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    place: int | None = None,
    repeat: bool = False,
    may_be_empty: bool = False,
    group: str | None = None,
    excludes: str | None = None,
    file_only: bool = False,
) -> Any:
    """A field of a command's dataclass.

    place: position on the command line; the option then has no name. repeat: a tuple whose items are given one by one,
    each after the name. group: the title in --help. excludes: options with the same word exclude each other.
    file_only: the option is read only from YAML.
    """
    known = dict(choices=choices, metavar=metavar, place=place, repeat=repeat, group=group, excludes=excludes)
    known |= {"may_be_empty": may_be_empty, "file_only": file_only, "help": help}
    given = {name: value for name, value in known.items() if value is not None and value is not False}
    return dataclasses.field(default=default, metadata=given)


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigT]):
    """The parts of a command's parser."""

    prog: str  # name in the usage line
    kind: type[ConfigT]  # dataclass of the options
    doc: str | None  # the module's docstring; --help shows its first line
    hidden: tuple[str, ...] = ()  # options that --help does not show; the command refuses them with a reason

    def parse(self, argv: Sequence[str] | None = None) -> ConfigT:
        """Parse the options with the function `parse`."""
        return parse(self.kind, argv, (self.doc or "").split("\n")[0], self.prog, self.hidden)

    def parser(self) -> Parser:
        """The command's parser."""
        return build(self.kind, (self.doc or "").split("\n")[0], self.prog, self.hidden)

    def answer(self, argv: Sequence[str] | None = None) -> None:
        """Answer --help and mistakes at once.

        A module calls this before it imports slow packages.
        """
        with fail_cleanly():
            self.parse(argv)


def parse(
    kind: type[ConfigT],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    hidden: Sequence[str] = (),
) -> ConfigT:
    """A config from `--config FILE.yaml` and the command line, which wins.

    Raises ValueError for a value that makes no sense. An unknown or missing option ends the command. If the dataclass
    has no field `dry_run`, `--dry_run` prints the options and ends the command. A field `config` gets the path of the
    file.
    """
    parser = build(kind, description, prog, hidden)
    file, rest = split(sys.argv[1:] if argv is None else argv)
    given = vars(parser.parse_args(rest))
    stop_here = _DRY_RUN not in _fields(kind) and given.pop(_DRY_RUN, False)
    given = {name: tuple(value) if _is_tuple(kind, name) else value for name, value in given.items()}
    values = (_from_file(parser, kind, file) if file is not None else {}) | given
    if _CONFIG in _fields(kind):
        values[_CONFIG] = file
    _require(parser, kind, values)
    config = kind(**values)
    check(config)
    if stop_here:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config


def check(config: Any) -> None:
    """Raise ValueError for values that a config must not have.

    These are numbers that are not finite, texts that are no choice, and options that exclude each other.
    """
    groups: dict[str, str] = {}
    for name, field in _fields(type(config)).items():
        value = getattr(config, name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{name} must be finite, got {each}")
            choices = field.metadata.get("choices")
            if choices and each is not None and each not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {each!r}")
        group = field.metadata.get("excludes")
        if group and value is not None and value is not False:
            if group in groups:
                raise ValueError(f"--{groups[group]} and --{name} exclude each other; give one of them")
            groups[group] = name


def as_yaml(config: Any) -> str:
    """The options of a config as YAML.

    A command with this file as `--config` does the same again.
    """
    names = [name for name in _file_options(type(config)) if name != _DRY_RUN]
    row = {name: _plain(getattr(config, name)) for name in names}
    return yaml.safe_dump(row, sort_keys=False, allow_unicode=True)


def split(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of --config, and all other arguments.

    Raises ValueError for a file that does not exist.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(list(argv))
    return config_files.find(found.config) if found.config is not None else None, rest


def build(
    kind: type[Any], description: str | None = None, prog: str | None = None, hidden: Sequence[str] = ()
) -> Parser:
    """A parser with an option for each field.

    Options that are not given are not in its result.
    """
    parser = Parser(prog=prog or Path(sys.argv[0]).name, description=description, argument_default=argparse.SUPPRESS)
    told = "a YAML file of options, or the name of one that ships (see rlg configs); the command line wins"
    parser.add_argument("--config", metavar="FILE", help=told)
    fields, hints = _fields(kind), get_type_hints(kind)
    groups: dict[str | None, Any] = {None: parser}
    placed = sorted((f.metadata["place"], name) for name, f in fields.items() if "place" in f.metadata)
    named = [name for name, f in fields.items() if not {"place", "file_only"} & f.metadata.keys() and name != _CONFIG]
    for name in [*(name for _, name in placed), *named]:
        title = fields[name].metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], fields[name], hints[name], flags_alone=bool(placed))
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    if _DRY_RUN not in fields:
        parser.add_argument(f"--{_DRY_RUN}", action="store_true", help="print the options that hold, and exit")
    return parser


def _add(parser: Any, field: dataclasses.Field[Any], hint: Any, flags_alone: bool) -> None:
    """Add a field's option.

    flags_alone: a switch takes no value, because a word without a name could be taken for it.
    """
    name, kind, known = field.name, _without_none(hint), field.metadata
    options: dict[str, Any] = {"help": _help(field), "type": kind}
    options |= {key: known[key] for key in ("choices", "metavar") if key in known}
    if get_origin(kind) in (list, tuple):
        repeated = {"action": "append"} if known.get("repeat") else {"nargs": "*" if "may_be_empty" in known else "+"}
        options |= {"type": get_args(kind)[0], **repeated}
    elif kind is bool and flags_alone:
        options = {"help": options["help"], "action": "store_true"}
    elif kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    if "place" in known:
        optional = {"nargs": "?"} if field.default is not dataclasses.MISSING else {}
        parser.add_argument(name, **options | optional)
        return
    parser.add_argument(f"--{name}", **options)
    if field.default is True:
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"turn --{name} off")


def _help(field: dataclasses.Field[Any]) -> str:
    """The help of an option, with its default.

    The default is left out if the text mentions one.
    """
    text = field.metadata.get("help", "").replace("%", "%%")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    told = "default" in text or default in (None, dataclasses.MISSING, (), []) or default is False
    return text if told else f"{text} (default: {_shown(default)})"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_none(hint: Any) -> Any:
    inner = [each for each in get_args(hint) if each is not type(None)]
    return inner[0] if type(None) in get_args(hint) else hint


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in _TRUE


def _fields(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind)}


def _is_tuple(kind: type[Any], name: str) -> bool:
    return get_origin(_without_none(get_type_hints(kind)[name])) is tuple


def _file_options(kind: type[Any]) -> list[str]:
    """Options that a YAML file may hold."""
    return [name for name, field in _fields(kind).items() if "place" not in field.metadata and name != _CONFIG]


def _require(parser: Parser, kind: type[Any], values: dict[str, Any]) -> None:
    """End the command where a field without a default was not given."""
    ends = (dataclasses.MISSING, dataclasses.MISSING)
    lacking = [n for n, f in _fields(kind).items() if (f.default, f.default_factory) == ends and n not in values]
    if lacking:
        parser.error(f"the following arguments are required: {', '.join(f'--{name}' for name in lacking)}")


def _from_file(parser: Parser, kind: type[Any], file: Path) -> dict[str, Any]:
    """The options of a YAML file, converted to their fields' types.

    A text that cannot be converted ends the command.
    """
    return {name: _typed(parser, name, value, hint) for name, value, hint in _rows(kind, file)}


def read_values(kind: type[Any], file: Path) -> dict[str, Any]:
    """The options of a YAML file, by their field's names.

    A text is not converted yet, as on a command line. Raises ValueError for a value of another type.
    """
    return {name: value for name, value, _ in _rows(kind, file)}


def _rows(kind: type[Any], file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Each option of a YAML file as `(name, value, type)`.

    Raises ValueError as `read_values` does.
    """
    names = _file_options(kind)
    row, hints = canonical_keys(read_yaml(file), names, str(file)), get_type_hints(kind)
    if "env" in row:
        raise ValueError(f"{file}: env is not read here; set the variables where the command is started")
    for name, value in row.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f", did you mean {near[0]}?" if near else " (is it a config of another command?)"
            raise ValueError(f"{file}: unknown option {name}{hint}; see --help")
        kind_of = _without_none(hints[name])
        if get_origin(kind_of) is tuple and value is not None:
            value = _as_words(value, get_args(kind_of)[0])
        if not isinstance(value, str) or get_origin(kind_of) is list:
            check_type(f"{file}: {name}", value, hints[name])
        yield name, value, kind_of


def _as_words(value: Any, kind: Any) -> Any:
    """A value of YAML in the form of the command line.

    One item stands for a list with it. A number becomes a text where a text is needed.
    """
    items = value if isinstance(value, list) else [value]
    return [str(item) if kind is str and type(item) in (int, float) else item for item in items]


def _typed(parser: Parser, name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple and value is not None:
        return tuple(_typed(parser, name, each, get_args(kind)[0]) for each in value)
    if not isinstance(value, str):
        return value
    try:
        return _boolean(value) if kind is bool else kind(value)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --{name}: {error}")
    except ValueError:
        parser.error(f"argument --{name}: invalid {kind.__name__} value: {value!r}")


def _plain(value: Any) -> Any:
    """A value in YAML's types."""
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Path) else value
