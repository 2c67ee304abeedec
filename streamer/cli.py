"""The command `streamer`: reads its arguments, calls what does the work, prints the result.

Everything beyond argparse is imported by the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from streamer import __version__
from streamer.errors import ConfigError, StreamerError

if TYPE_CHECKING:
    from streamer.agent.reloading import Reread
    from streamer.config.loading import Overrides
    from streamer.config.settings import Limits, Settings
    from streamer.privilege.files import Opener

DEFAULT_CONFIG = Path("/etc/streamer/streamer.toml")
"""Read where it is there and no other is named."""
INTERRUPTED = 130
"""Exit code of Ctrl-C, as of a program that SIGINT ended."""
_JUDGES = ("check", "status", "verify")
"""Commands whose exit code says whether all is well."""
DEFECT = 1
UNEXPLAINED = 1
"""Exit code of `verify` when something is missing that nothing explains."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FOREVER = 1e10
_FOUND_LATE = {
    "filters.exes": "exe",
    "filters.exclude_exes": "exclude_exe",
    "sinks": "sink",
    "user": None,
}
"""Settings of which mistakes are found after reading, with the options that replace them.

Without an option it is in the file, or, without a file, the default that does not fit the host."""
_TARGETS = {"interface": "interfaces", "syscall": "syscalls"}
_LISTS = {
    "pid": "pids",
    "uid": "uids",
    "comm": "comms",
    "exe": "exes",
    "path": "path_prefixes",
    "port": "ports",
    "cgroup": "cgroups",
}


class Plan(NamedTuple):
    """What a command line and its file come to: the arguments of `run_service`."""

    settings: Settings
    kinds: frozenset[str]
    limits: Limits


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse alone would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        # A URL in the wrong place is repeated by argparse, but a password in it must not be.
        safe = re.sub(r"//\S*@", "//…@", message)
        raise ConfigError(f"{safe} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the process's arguments) names.

    Returns the exit code: 0 done, 2 bad configuration, 3 missing privilege or kernel support,
    4 no sink is left, 130 interrupted. Errors are one line on standard error.
    """
    _fill_standard_descriptors()
    try:
        arguments = parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        code = command(arguments)
        print(end="", flush=True)  # here, where a closed pipe is expected
        return code
    except StreamerError as error:
        return _failed(error)
    except BrokenPipeError:
        return _closed_pipe(arguments.named)
    except KeyboardInterrupt:
        return INTERRUPTED


def script() -> NoReturn:
    """The command as a process: ends at once when `main` has ended.

    Python, and the event loop's library, would wait for threads that look up a name.
    """
    try:
        code = main()
    except Exception as error:
        from streamer.terminal.console import say
        from streamer.terminal.log import traceback_of

        say(f"streamer: a defect ended it\n{traceback_of(error)}")
        code = DEFECT
    with suppress(OSError):
        print(end="", flush=True)
    os._exit(code)


def _fill_standard_descriptors() -> None:
    """Open what was closed (`>&-`), so that no other file gets the number of a standard one."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # For stdout one that cannot be written to: what goes there is not delivered.
            os.open(os.devnull, flags)


def _failed(error: StreamerError) -> int:
    from streamer.terminal.console import say
    from streamer.terminal.lines import printable, shortened
    from streamer.terminal.log import ERROR_IN_JOURNAL, is_journal

    severity = ERROR_IN_JOURNAL if is_journal(2) else ""
    say(f"{severity}streamer: {printable(shortened(str(error)))}")
    return error.exit_code


def _closed_pipe(command: str) -> int:
    """End quietly: nobody reads on, and Python's flush at exit must not complain either.

    With 1 where 0 would say that nothing is wrong, which was not said to the end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if command in _JUDGES else 0


def plan(arguments: argparse.Namespace, opened: Callable[[str], int] | None = None) -> Plan:
    """What `run` with these arguments would do. `opened` gives a descriptor of the file.

    Raises:
        ConfigError: the file or an argument cannot be used.
    """
    from streamer.config.selection import select
    from streamer.config.settings import Limits
    from streamer.events.catalogue import SELECTABLE
    from streamer.kernel.targets import without_target

    settings = _settings(arguments, opened)
    limits = Limits(
        duration_seconds=getattr(arguments, "duration", None),
        max_events=getattr(arguments, "max_events", None),
        status=not getattr(arguments, "no_status", False),
    )
    where = "--events" if arguments.events else f"{_config_of(arguments)}: events"
    missing = without_target(settings.kernel)
    return Plan(settings, select(settings.events, SELECTABLE, where, missing), limits)


def _settings(
    arguments: argparse.Namespace, opened: Callable[[str], int] | None = None
) -> Settings:
    from streamer.config.loading import load

    given = {} if opened is None else {"opened": opened}
    return load(_config_of(arguments), _overrides(arguments), **given)


def _config_of(arguments: argparse.Namespace) -> Path | None:
    named: Path | None = arguments.config
    return named if named is not None or not DEFAULT_CONFIG.exists() else DEFAULT_CONFIG


def _overrides(arguments: argparse.Namespace) -> Overrides:
    from streamer.config.loading import Overrides

    given: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if value is not None
    }
    names = _LISTS | {f"exclude_{name}": f"exclude_{key}" for name, key in _LISTS.items()}
    return Overrides(
        settings={name: given[name] for name in ("events", "host", "log_level") if name in given},
        kernel=_kernel(given),
        filters={key: tuple(given[name]) for name, key in names.items() if name in given},
        sinks=tuple(given.get("sink", ())),
        encoding=given.get("encoding"),
        color=given.get("color"),
    )


def _kernel(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: tuple(given[name]) for name, key in _TARGETS.items() if name in given
    }
    if "profile_hz" in given:
        found["profile_hz"] = given["profile_hz"]
    return found


def _run(arguments: argparse.Namespace) -> int:
    from streamer.agent import signals

    arguments.config = _config_of(arguments)
    signals.hold()  # before anything that takes long; `run_service` handles them
    chosen = plan(arguments)
    if arguments.dry_run:
        from streamer.agent.dry_run import dry_run

        with _named(arguments):
            text, code = dry_run(chosen.settings, chosen.kinds)
        print(text)
        return code
    from streamer.agent.run import run_service

    with _named(arguments):
        return run_service(chosen.settings, chosen.kinds, chosen.limits, reread=_reread(arguments))


@contextmanager
def _named(arguments: argparse.Namespace) -> Iterator[None]:
    """Of a mistake that only the host shows, such as a file that is not there: say where it is."""
    try:
        yield
    except ConfigError as error:
        for key, option in _FOUND_LATE.items():
            if str(error).startswith(key):
                given = option and getattr(arguments, option, None)
                otherwise = "command line" if option else None
                where = (None if given else _config_of(arguments)) or otherwise
                raise ConfigError(f"{where}: {error}" if where else str(error)) from None
        raise


def _reread(arguments: argparse.Namespace) -> Reread | None:
    """How the configuration is read again, if it is in a file that can be."""
    from streamer.agent.reloading import Reread
    from streamer.privilege.files import own_descriptor, regular

    path: Path | None = arguments.config
    # A pipe has been read to its end.
    if path is None or not path.is_file() or own_descriptor(str(path)) is not None:
        return None

    def read(opener: Opener) -> tuple[Settings, frozenset[str]]:
        chosen = plan(arguments, lambda name: regular(opener.open(name)))
        return chosen.settings, chosen.kinds

    return Reread(str(path), read)


def _profile(arguments: argparse.Namespace) -> int:
    import msgspec

    from streamer.agent.profile import run_profile
    from streamer.config.settings import Limits, Settings

    settings = msgspec.structs.replace(_settings(arguments), sinks=Settings().sinks)
    limits = Limits(duration_seconds=arguments.duration, status=False)
    return run_profile(settings, limits, arguments.output)


def _check(arguments: argparse.Namespace) -> int:
    chosen = plan(arguments)
    from streamer.agent.check import report
    from streamer.kernel.trials import have_own_mounts
    from streamer.terminal.checked import check_code, check_text
    from streamer.terminal.tables import json_text

    with _named(arguments):
        found = report(chosen.settings, chosen.kinds, apart=have_own_mounts())
    print(json_text(found) if arguments.json else check_text(found))
    return check_code(found)


def _status(arguments: argparse.Namespace) -> int:
    import msgspec

    from streamer.operation.control import ask
    from streamer.operation.look import Look
    from streamer.terminal.status import status_code, status_text
    from streamer.terminal.tables import json_text

    found = msgspec.json.decode(ask(_control_socket(arguments), "status"), type=Look)
    print(json_text(found) if arguments.json else status_text(found))
    return status_code(found)


def _top(arguments: argparse.Namespace) -> int:
    if not (os.isatty(0) and os.isatty(1)):
        raise ConfigError("streamer top needs a terminal; `streamer status` does not")
    import msgspec

    from streamer.kernel.cgroups import cgroup_root
    from streamer.operation.control import ask
    from streamer.operation.look import TopLook
    from streamer.terminal.containers import Containers
    from streamer.terminal.top import Top

    path = _control_socket(arguments)
    decoder = msgspec.json.Decoder(TopLook)
    decoder.decode(ask(path, "top"))  # that there is none is said in a line, and not on a screen
    app = Top(lambda: decoder.decode(ask(path, "top")), Containers(cgroup_root()))
    app.run()
    return app.return_code or 0


def _control_socket(arguments: argparse.Namespace) -> str:
    from streamer.config.loading import load

    path: str = arguments.socket or load(_config_of(arguments)).control.socket
    if not path:
        raise ConfigError(f"{_config_of(arguments)}: control.socket is empty: there is none to ask")
    return path


def _events(arguments: argparse.Namespace) -> int:
    from streamer.events.catalogue import PUBLISHED
    from streamer.terminal import tables as text

    known = PUBLISHED
    chosen = [text.named(known, kind) for kind in arguments.kinds] or list(known.values())
    if arguments.json:
        print(text.json_text(text.kinds_data(chosen)))
    elif arguments.kinds:
        print("\n\n".join(map(text.kind_text, chosen)))
    else:
        print(text.kinds_text(chosen))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from streamer.config.reference import schema
    from streamer.events.catalogue import PUBLISHED
    from streamer.events.schema import any_of, of_kind
    from streamer.terminal import tables as text

    if arguments.name == "config":
        print(text.json_text(schema()))
        return 0
    if arguments.name == "verify":
        from streamer.verify.report import VerifyReport

        print(text.json_text(of_kind("verify", VerifyReport)))
        return 0
    if arguments.name == "check":
        from streamer.kernel.report import CheckReport

        print(text.json_text(of_kind("check", CheckReport)))
        return 0
    if arguments.name == "status":
        from streamer.operation.look import Look

        print(text.json_text(of_kind("status", Look)))
        return 0
    known = PUBLISHED
    chosen = [text.named(known, arguments.name)] if arguments.name else known.values()
    print(text.json_text(any_of([info.struct for info in chosen])))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from streamer.terminal.tables import json_text
    from streamer.verify.command import Options, verify
    from streamer.verify.start import parse_start
    from streamer.verify.text import report_text

    options = Options(
        start=parse_start(arguments.start),
        follow=arguments.follow,
        seconds=arguments.duration,
        ended=arguments.ended,
        progress=not arguments.no_progress,
    )
    found = verify(arguments.sources, options)
    print(json_text(found) if arguments.json else report_text(found))
    return 0 if found.ok else UNEXPLAINED


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its result has the function to call as `command`."""
    top = _Parser(
        prog="streamer",
        description="Streams Linux kernel events to the terminal, files, Kafka and MQTT.",
        epilog="example:\n  streamer run --duration 10s",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"streamer {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_profile(commands)
    _add_status(commands)
    _add_top(commands)
    _add_check(commands)
    _add_events(commands)
    _add_schema(commands)
    _add_verify(commands)
    return top


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[:1].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an option added later must not change what a script means
    )
    parser.set_defaults(command=run, named=name)
    return parser


def _add_run(commands: Any) -> None:
    example = (
        "streamer run --events 'default,file.*' --exclude-comm node_exporter \\\n"
        "      --sink stdout: --sink 'kafka://127.0.0.1:19092/events?linger_ms=5'"
    )
    parser = _command(commands, "run", _run, "stream events until Ctrl-C", example)
    _add_source(parser)
    _add_output(parser)
    _add_filters(parser)
    parser.add_argument(
        "--duration", type=_duration, metavar="TIME", help="end after 10s, 5m, 1h, …"
    )
    parser.add_argument(
        "--max-events",
        type=_count,
        metavar="N",
        help="end after N events (beside those of the stream itself)",
    )
    parser.add_argument("--host", metavar="NAME", help="name of this host in the events")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be attached and published, and end: 0 if all would be observed in "
        "full, 1 if a part, 3 if nothing",
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, help="least severity that is logged")


def _add_source(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--events",
        action="append",
        metavar="GLOB,…",
        help="kinds to stream: globs of what `streamer events` lists, or `default`; a leading "
        "`!` (or `-`, written --events=-GLOB) takes kinds away",
    )
    parser.add_argument(
        "--interface",
        action="append",
        metavar="NAME",
        help="network interface to observe (xdp.counters, net.flow); may be repeated",
    )
    parser.add_argument(
        "--syscall",
        action="append",
        metavar="NAME",
        help="system call to time (syscall.*), or '*' for all; may be repeated",
    )
    parser.add_argument(
        "--profile-hz",
        type=_integer,
        metavar="N",
        help="look at each CPU so often a second (profile.sample)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--sink",
        action="append",
        metavar="URL",
        help="stdout:, file:PATH, kafka://HOST:PORT/TOPIC, mqtt://[USER@]HOST:PORT/TOPIC; kafkas "
        "and mqtts with TLS; ?key=value sets more; may be repeated",
    )
    group.add_argument(
        "--encoding", choices=("json", "msgpack"), help="encoding, for every sink without its own"
    )
    group.add_argument("--color", choices=("auto", "always", "never"), help="colour on a terminal")
    group.add_argument("--no-status", action="store_true", help="no status line on a terminal")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    title = "filters, applied in the kernel; each may be repeated"
    group = parser.add_argument_group(title)
    filters: tuple[tuple[str, Callable[[str], int | str], str, str], ...] = (
        ("pid", _integer, "N", "events of this process id"),
        ("uid", _uid, "N|NAME", "events of this real user"),
        ("comm", str, "NAME", "events of tasks of this name"),
        ("exe", os.path.abspath, "FILE", "events of processes that run this file"),
        ("path", str, "PREFIX", "files whose path begins so"),
        ("port", _integer, "N", "connections of this local or remote port"),
        ("cgroup", _cgroup, "ID|PATH", "events of this cgroup (v2) and all below it"),
    )
    for name, convert, metavar, text in filters:
        for option, verb in ((f"--{name}", "keep only"), (f"--exclude-{name}", "leave out")):
            group.add_argument(
                option, action="append", type=convert, metavar=metavar, help=f"{verb} {text}"
            )


def _add_profile(commands: Any) -> None:
    example = "sudo streamer profile --duration 10s --output profile.svg"
    text = "sample what runs on the CPUs, and write it as a flame graph"
    parser = _command(commands, "profile", _profile, text, example)
    _add_config(parser)
    parser.add_argument(
        "--duration", type=_duration, default=10.0, metavar="TIME", help="10s unless given"
    )
    parser.add_argument(
        "--hz",
        type=_count,
        default=99,
        dest="profile_hz",
        metavar="N",
        help="samples on each CPU in a second; 99 unless given",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="FILE.svg: a flame graph; FILE.json: for speedscope; FILE.folded, and standard output "
        "unless given: folded stacks",
    )
    _add_filters(parser)


def _add_status(commands: Any) -> None:
    text = "say how the running agent is: rates, losses, rings, sinks, and what is observed"
    codes = (
        "exit codes: 0 it is ready, 1 it is not (it says why), 3 none answers,\n"
        "  2 the configuration or command line is wrong (docs/operation.md)"
    )
    parser = _command(commands, "status", _status, text, f"sudo streamer status\n\n{codes}")
    _add_socket(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_top(commands: Any) -> None:
    text = "watch the running agent: events a second by kind, process and container"
    _add_socket(_command(commands, "top", _top, text, "sudo streamer top"))


def _add_socket(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--socket", metavar="PATH", help="where it listens (control.socket)")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file (docs/configuration.md); {DEFAULT_CONFIG} if that is there",
    )


def _add_check(commands: Any) -> None:
    text = "say what this kernel offers, what would attach, what is lost and why"
    codes = (
        "exit codes: 0 all that was asked for is observed in full, 1 some of it, 3 nothing,\n"
        "  2 the configuration or command line is wrong (docs/check.md)"
    )
    example = "sudo streamer check --events '*'"
    parser = _command(commands, "check", _check, text, f"{example}\n\n{codes}")
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_events(commands: Any) -> None:
    text = "list the kinds of events, or the fields of some"
    parser = _command(commands, "events", _events, text, "streamer events process.exec")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="show the fields of this kind")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_schema(commands: Any) -> None:
    text = (
        "print the JSON Schema of events, a kind, the configuration, `check`, `status` or `verify`"
    )
    parser = _command(commands, "schema", _schema, text, "streamer schema net.connect")
    parser.add_argument(
        "name", nargs="?", metavar="KIND|config|check|status|verify", help="by default, any event"
    )


def _add_verify(commands: Any) -> None:
    text = "check what a topic or file holds: what is missing, and whether the stream says why"
    codes = (
        "exit codes: 0 all that is missing is explained, 1 something is not,\n"
        "  2 the command line is wrong, or a source cannot be read (docs/verify.md)"
    )
    example = "streamer verify kafka://127.0.0.1:19092/kernel-events"
    parser = _command(commands, "verify", _verify, text, f"{example}\n\n{codes}")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="FILE (with those that it was rotated to; - is standard input), or the URL of a sink: "
        "kafka://HOST:PORT/TOPIC, mqtt://HOST:PORT/TOPIC; several are one stream",
    )
    parser.add_argument(
        "--from",
        dest="start",
        default="beginning",
        metavar="WHERE",
        help="beginning, end, an offset (of a file: a byte), a time with its zone, or 10m for so "
        "long ago",
    )
    parser.add_argument("--follow", action="store_true", help="read on at the end, until Ctrl-C")
    parser.add_argument(
        "--duration",
        type=_duration,
        metavar="TIME",
        help="end after 10s, 5m, 1h, …; of MQTT 10s unless given or --follow",
    )
    parser.add_argument(
        "--ended",
        action="store_true",
        help="no agent runs any more: what is not explained by now never will be",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-progress", action="store_true", help="no progress on a terminal")


def _duration(text: str) -> float:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :] or "s"
    known = number.replace(".", "", 1).isdecimal() and unit in _UNITS
    seconds = float(number) * _UNITS[unit] if known else 0.0
    if not 0 < seconds < _FOREVER:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, allowed: a time above 0 such as 500ms, 10s, 5m, 1h or 1d"
        )
    return seconds


def _count(text: str) -> int:
    number = _integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: an integer from 1")
    return number


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: an integer")
    return int(text)


def _uid(text: str) -> int:
    if text.isdecimal():
        return _integer(text)
    import pwd

    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, allowed: a user id or the name of a user"
        ) from None


def _cgroup(text: str) -> int:
    """A cgroup's id: that of the directory, whose inode number it is, or the number itself."""
    if text.isdecimal():
        return _integer(text)
    # Version 1 has no such file, and its inode numbers are no cgroup ids.
    if not os.path.exists(os.path.join(text, "cgroup.controllers")):
        found = repr(text) if os.path.exists(text) else f"{text!r}, which is not there"
        raise argparse.ArgumentTypeError(
            f"found {found}, allowed: an id or the directory of a cgroup (v2)"
        )
    return os.stat(text).st_ino
