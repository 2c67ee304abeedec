"""The shape of the configuration: every setting, its type, its limits and its default.

`loading.py` fills these from TOML and the command line; `tools.gen` derives
`schemas/config.schema.json` and `docs/configuration.md` from them. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

Encoding = Literal["json", "msgpack"]
OnFull = Literal["auto", "pause", "drop"]


def doc(text: str) -> Meta:
    """What a setting means: one line, for the JSON Schema and `docs/configuration.md`."""
    return Meta(description=text)


def form(pattern: str, allowed: str) -> Meta:
    """A string of the form `pattern` (an unanchored search), which `allowed` says in words."""
    return Meta(pattern=pattern, extra={"allowed": allowed})


PositiveSeconds = Annotated[float, Meta(gt=0, le=3600)]
HeartbeatSeconds = Annotated[float, Meta(ge=1, le=3600)]
SummarySeconds = Annotated[float, Meta(ge=1, le=3600)]
InterfaceName = Annotated[
    str, form(r"^(?!\.\.?$)[^\s/:\x00-\x1f]{1,15}$", "the name of a network interface")
]
SyscallName = Annotated[
    str, form(r"^(\*|[a-z_][a-z0-9_]{0,31})$", 'the name of a system call, or "*" for all')
]
RingBytes = Annotated[int, Meta(ge=4096, le=1 << 30)]
CriticalBytes = Annotated[int, Meta(ge=1 << 16, le=1 << 30)]
MANY = Meta(max_length=512)  # two lists share a map of 1024
BudgetBytes = Annotated[int, Meta(ge=1 << 16, le=1 << 32)]
Pid = Annotated[int, Meta(ge=1, le=1 << 22)]
Uid = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
DnsName = Annotated[
    str, form(r"^(\.|\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?)$", "a domain name, or `.`")
]
Comm = Annotated[str, Meta(min_length=1, max_length=15)]
CgroupId = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
PathPrefix = Annotated[
    str,
    Meta(min_length=1, max_length=255),
    form("^/", "an absolute path of at most 255 bytes"),
]
ExePath = Annotated[
    str, Meta(min_length=1, max_length=4095), form("^/", "an absolute path of a file")
]
Text = Annotated[str, Meta(min_length=1)]
StateFile = Annotated[
    str, Meta(max_length=4095), form("^(/|$)", "an absolute path, or empty for none")
]
# struct sockaddr_un has room for 107 bytes and the NUL.
SocketPath = Annotated[
    str, Meta(max_length=107), form("^(/|$)", "an absolute path, or empty for none")
]
ListenAddress = Annotated[
    str,
    Meta(max_length=64),
    form(r"^($|[0-9.]+:[0-9]+$|\[[0-9a-fA-F:.]+\]:[0-9]+$)", "ADDRESS:PORT, or empty for none"),
]
Headers = Annotated[
    str,
    Meta(max_length=4095),
    form("^(auto|off|/.*)$", "`auto`, `off`, or an absolute path"),
]
HostName = Annotated[
    str, form("^[A-Za-z0-9._-]{1,253}$", "a name of letters, digits, '.', '_' and '-'")
]
EnvName = Annotated[str, form("^[A-Za-z_][A-Za-z0-9_]*$", "the name of an environment variable")]
FileMode = Annotated[str, form("^0[0-7]{3}$", 'an octal mode such as "0640"')]


class Section(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of every section: unknown keys are errors."""


class Rings(Section, frozen=True, kw_only=True):
    """Ring buffers between the kernel and the reader. Sizes are powers of two."""

    transport: Annotated[
        Literal["auto", "perf"],
        doc(
            "`auto`: ring buffers, and perf buffers where the kernel refuses those. `perf`: perf "
            "buffers in any case. Each CPU has its own then, of the largest power of two that lets "
            "those of all CPUs together keep to the sizes below."
        ),
    ] = "auto"

    critical_bytes: Annotated[
        CriticalBytes, doc("Ring of `process.*`: a power of two, a multiple of the page size.")
    ] = 4 << 20
    bulk_bytes: Annotated[
        RingBytes,
        doc("Ring of `file.*`, `net.*`, `syscall.*`: so, too. It fills while a sink is down."),
    ] = 16 << 20
    bulk_rings: Annotated[
        int,
        Meta(ge=0, le=64),
        doc(
            "Ring buffers that `bulk_bytes` are divided among, each for some of the CPUs, as CPUs "
            "wait for each other where they share one; rounded up to a power of two. 0: one for "
            "each eight CPUs. Of less than 64 KiB there are none."
        ),
    ] = 0
    poll_interval_ms: Annotated[
        int, Meta(ge=1, le=1000), doc("How often the rings are looked at between wake-ups.")
    ] = 10
    drain_records: Annotated[
        int, Meta(ge=1, le=65536), doc("Most records read in one turn of the event loop.")
    ] = 512


class Kernel(Section, frozen=True, kw_only=True):
    """How the kernel is observed."""

    headers: Annotated[
        Headers,
        doc(
            "Where the layouts of the kernel's structs are read from if the kernel has no BTF and "
            "`btf` names none: a directory of the headers of this very kernel, which bcc compiles; "
            "`auto`: where they are installed; `off`: nowhere."
        ),
    ] = "auto"
    connections: Annotated[
        int,
        Meta(ge=1024, le=1 << 22),
        doc(
            "Room for the owners of connections that cannot be kept with their sockets: of those "
            "that another process accepts than listens, of sockets whose user has used up their "
            "memory, and on kernels before 5.11 of all."
        ),
    ] = 65536
    open_latency: Annotated[
        bool,
        doc(
            "Whether `file.open` says how long the call took: that needs a hook at its start too, "
            "Linux 5.12 and BTF of the kernel's own. Else `latency_ns` is 0."
        ),
    ] = False
    drops_per_second: Annotated[
        int,
        Meta(ge=1, le=1 << 20),
        doc(
            "`net.drop`: how many drops of one reason each CPU reports in a second. The next one "
            "stands for those that it left out: they are in its `weight`."
        ),
    ] = 100
    unspecified_drops: Annotated[
        bool,
        doc(
            "Whether `net.drop` reports packets that the kernel freed without a reason, too: some "
            "were dropped, and most of them were not."
        ),
    ] = False
    udp_seconds: Annotated[
        int,
        Meta(ge=1, le=86400),
        doc(
            "`net.udp`: how long a socket is in use before what went through it is reported, and "
            "again, with its next datagram. A close is always reported."
        ),
    ] = 60
    udp_sockets: Annotated[
        int,
        Meta(ge=1024, le=1 << 22),
        doc(
            "Room for UDP sockets on kernels before 5.11, and for those that have no room of "
            "their own. A socket that found none makes no `net.udp`."
        ),
    ] = 16384
    dns_ports: Annotated[
        tuple[Port, ...],
        Meta(min_length=1, max_length=4),
        doc("`net.dns`: the ports at which servers are asked; at most four."),
    ] = (53,)
    dns_timeout_seconds: Annotated[
        int,
        Meta(ge=1, le=300),
        doc("`net.dns`: how long a response may take before the query is reported as unanswered."),
    ] = 10
    dns_per_second: Annotated[
        int,
        Meta(ge=1, le=1 << 20),
        doc(
            "`net.dns`: how many exchanges of one user, service or container are reported in a "
            "second. The next one stands for those that were left out: they are in its `weight`."
        ),
    ] = 2000
    dns_queries: Annotated[
        int,
        Meta(ge=64, le=1 << 16),
        doc(
            "`net.dns`: room for queries that wait for their response; an eighth of it is what one "
            "user, service or container can have. A query that finds none is counted as lost."
        ),
    ] = 4096
    dns_redact: Annotated[
        tuple[DnsName, ...],
        MANY,
        doc(
            "`net.dns`: names below which all is secret, such as `corp.example`: what is in front "
            'of them becomes `<redacted:dns>`, in queries and answers. `"."`: all names.'
        ),
    ] = ()
    interfaces: Annotated[
        tuple[InterfaceName, ...],
        Meta(max_length=16),
        doc("Network interfaces to observe (`xdp.*`, `net.flow`): no others are touched."),
    ] = ()
    syscalls: Annotated[
        tuple[SyscallName, ...],
        Meta(max_length=64),
        doc(
            'System calls to time (`syscall.*`), by name; `"*"` times all, and makes each of every '
            "process slower. See docs/syscalls.md."
        ),
    ] = ()
    syscall_slow_ms: Annotated[
        int,
        Meta(ge=0, le=86_400_000),
        doc(
            "From which duration on a call is reported as `syscall.slow`, in milliseconds; 0: "
            'never. With `"*"` those that are there to wait, such as poll, are only where they '
            "are named as well."
        ),
    ] = 1000
    syscall_cgroups: Annotated[
        int,
        Meta(ge=0, le=16384),
        doc(
            "Room for counts of system calls by cgroup (`syscall.latency`): how many pairs of "
            "the two; the oldest makes way. 0: none are kept."
        ),
    ] = 0
    syscall_tasks: Annotated[
        int,
        Meta(ge=1024, le=1 << 22),
        doc(
            "Room for tasks whose system calls are timed, on kernels before 5.12 and where the "
            "types come from a BTF file; others keep it with the task."
        ),
    ] = 16384
    profile_hz: Annotated[
        int,
        Meta(ge=0, le=1000),
        doc("How often a second each CPU is looked at for `profile.sample`; 0: never."),
    ] = 0
    profile_stacks: Annotated[
        int,
        Meta(ge=1024, le=1 << 18),
        doc(
            "Room for the different stacks of one `summary_seconds`, for which `profile.sample` "
            "takes 2.3 KiB of the kernel's memory each."
        ),
    ] = 16384
    flows: Annotated[
        int,
        Meta(ge=64, le=1 << 20),
        doc(
            "Flows (`net.flow`) that are kept at a time, of all interfaces together, in 620 "
            "bytes of kernel memory each. Beyond them the one that is idle for longest is reported "
            "and makes way."
        ),
    ] = 65536
    flow_idle_seconds: Annotated[
        float,
        Meta(ge=1, le=86400),
        doc("Without a packet for so long, a flow is reported and forgotten."),
    ] = 30
    flow_active_seconds: Annotated[
        float, Meta(ge=1, le=86400), doc("A flow that goes on is reported so often.")
    ] = 60
    sample: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=1 << 20)]],
        doc("Kinds of which only one in so many events is reported, its `weight` that number."),
    ] = field(default_factory=dict)


LEVELS = 3
"""Levels of pressure above 0, at which nothing is shed."""

Rate = Annotated[int, Meta(ge=1, le=1 << 20)]
THREE = Meta(min_length=LEVELS, max_length=LEVELS)
Rates = Annotated[
    tuple[Rate, ...], THREE, Meta(extra={"allowed": "three integers from 1 to 1048576"})
]
Share = Annotated[float, Meta(gt=0, le=1)]
Shares = Annotated[
    tuple[Share, ...], THREE, Meta(extra={"allowed": "three numbers above 0, of at most 1"})
]

SHED_BY_DEFAULT: Mapping[str, Rates] = {
    "file.open": (4, 16, 64),
    "syscall.slow": (4, 16, 64),
    "net.retransmit": (4, 16, 64),
    **dict.fromkeys(
        ("net.connect", "net.accept", "net.close", "net.drop", "net.udp", "net.flow", "net.dns"),
        (2, 8, 32),
    ),
    **dict.fromkeys(("net.listen", "net.bind"), (1, 1, 1)),
}
"""Of each kind in the bulk ring, one in how many is reported at the levels 1, 2 and 3."""


class SheddingSection(Section, frozen=True, kw_only=True):
    """What is left out by sampling while the sinks cannot keep up: see docs/shedding.md.

    Each of the four measures says a level of pressure, 1, 2 or 3, from its three values on; the
    highest holds. It falls once all are below four fifths of them.
    """

    enabled: Annotated[bool, doc("Whether anything is shed.")] = False
    rates: Annotated[
        dict[str, Rates],
        doc(
            "Kinds of the bulk ring, with one in how many events is reported at the levels 1, 2 "
            "and 3. What is not named here has the rates of docs/shedding.md; `[1, 1, 1]` is never "
            "shed. They multiply `kernel.sample`."
        ),
    ] = field(default_factory=dict)
    budget: Annotated[Shares, doc("Shares of a sink's `budget_bytes` that it holds.")] = (
        0.5,
        0.7,
        0.85,
    )
    spool: Annotated[Shares, doc("Shares of the spool's `max_bytes` that are used.")] = (
        0.5,
        0.7,
        0.85,
    )
    lag_seconds: Annotated[
        tuple[PositiveSeconds, ...],
        THREE,
        Meta(extra={"allowed": "three numbers above 0, of at most 3600"}),
        doc(
            "How long a batch has been under way to a sink. It counts where the sink holds an "
            "eighth of its budget."
        ),
    ] = (5.0, 15.0, 30.0)
    ring: Annotated[Shares, doc("Shares of a ring that hold what was not read yet.")] = (
        0.5,
        0.7,
        0.85,
    )

    @property
    def rates_in_force(self) -> Mapping[str, Rates]:
        """Of each kind that can be shed, its rates at the levels 1, 2 and 3; none if it is off."""
        rates = {**SHED_BY_DEFAULT, **self.rates} if self.enabled else {}
        return {kind: one for kind, one in rates.items() if max(one) > 1}


class Filters(Section, frozen=True, kw_only=True):
    """Which events the kernel keeps. An empty list keeps all; `exclude_*` wins over its twin.

    Ports are local or remote ones, and apply to `net.*`; `exclude_ports` are those of the service
    alone, because a client chooses its own. Path prefixes apply to `file.*`, to paths as the
    process's mount namespace has them: in one of his own, a user gives files other paths.

    What a process is, it may choose. It takes any name (`exclude_comms`), and who may run an
    executable can run code of his own in it, with a preloaded library or a debugger
    (`exclude_exes`). Only `exclude_cgroups` and `exclude_uids` hold against a user who wants to
    hide, as long as he may not enter those cgroups. What cannot be judged is kept: a connection
    whose owner is not known, a path that was cut or that asks for something through `..`.
    """

    pids: Annotated[tuple[Pid, ...], MANY, doc("Keep these process ids only.")] = ()
    exclude_pids: Annotated[tuple[Pid, ...], MANY, doc("Leave out these process ids.")] = ()
    uids: Annotated[tuple[Uid, ...], MANY, doc("Keep these real user ids only.")] = ()
    exclude_uids: Annotated[tuple[Uid, ...], MANY, doc("Leave out these real user ids.")] = ()
    comms: Annotated[
        tuple[Comm, ...], MANY, doc("Keep tasks of these names only (at most 15 bytes each).")
    ] = ()
    exclude_comms: Annotated[
        tuple[Comm, ...],
        MANY,
        doc("Leave out tasks of these names. Any process can take any name: no protection."),
    ] = ()
    exes: Annotated[
        tuple[ExePath, ...],
        MANY,
        doc(
            "Keep processes that run one of these files only, whatever path they ran it by. "
            "Kernels before 6.16 do not say what it was at the end: they keep every "
            "`process.exit`."
        ),
    ] = ()
    exclude_exes: Annotated[
        tuple[ExePath, ...],
        MANY,
        doc("Leave out processes that run one of these files (by device and inode, at the start)."),
    ] = ()
    cgroups: Annotated[
        tuple[CgroupId, ...],
        MANY,
        doc(
            "Keep these cgroups and all below them only, by id: the inode number of a cgroup v2 "
            "directory."
        ),
    ] = ()
    exclude_cgroups: Annotated[
        tuple[CgroupId, ...], MANY, doc("Leave out these cgroups and all below them.")
    ] = ()
    ports: Annotated[tuple[Port, ...], MANY, doc("Keep connections of these ports only.")] = ()
    exclude_ports: Annotated[
        tuple[Port, ...], MANY, doc("Leave out connections to these ports, seen from either end.")
    ] = ()
    path_prefixes: Annotated[
        tuple[PathPrefix, ...], MANY, doc("Keep files whose path begins with one of these only.")
    ] = ()
    exclude_path_prefixes: Annotated[
        tuple[PathPrefix, ...],
        MANY,
        doc(
            "Leave out files whose path begins with one of these, in the initial mount namespace: "
            "opened ones that are in a directory, and ones that are not there."
        ),
    ] = ()


class TimingSection(Section, frozen=True, kw_only=True):
    """How precise published times and durations are. See docs/security_review.md.

    As they are, they tell whoever reads the stream how long each thing took, to the nanosecond,
    which can tell him another's secrets: whether a file was in the cache, how much of a password
    was right. Coarse ones are multiples of a resolution. What stays is that something happened,
    in which order, and how often.
    """

    resolution_us: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        doc(
            "Of what all times and durations are multiples, in microseconds; what takes less "
            "reads as one. Events come up to so much later. 0: times are as measured, for "
            "readers that may know all of the host."
        ),
    ] = 0
    jitter: Annotated[
        bool,
        doc(
            "Whether times round up or down at places that a secret key draws, the same for the "
            "same time. Without it they round down, and who can choose when something happens "
            "can measure it all the same."
        ),
    ] = True


class SpoolSection(Section, frozen=True, kw_only=True):
    """The disk spool of the sinks that have `spool`: see docs/spool.md."""

    directory: Annotated[
        Text,
        form("^/", "an absolute path"),
        doc(
            "Where it is. The directory is made with mode 0700, and has to belong to whoever "
            "starts the agent; its parent, too, or to root."
        ),
    ] = "/var/lib/streamer/spool"
    max_bytes: Annotated[
        int,
        Meta(ge=1 << 20, le=1 << 44),
        doc("Most bytes on disk. What is over it makes way, the oldest of `bulk` first, as loss."),
    ] = 1 << 30


class Tls(Section, frozen=True, kw_only=True):
    """TLS towards a broker. Without `ca_file` the system's certificates are trusted."""

    ca_file: Annotated[Text | None, doc("PEM file of the authorities to trust.")] = None
    cert_file: Annotated[Text | None, doc("PEM file of the client's certificate.")] = None
    key_file: Annotated[
        Text | None, doc("PEM file of its key, where `cert_file` does not hold it.")
    ] = None
    key_password_env: Annotated[
        EnvName | None, doc("Environment variable that holds the password of the key.")
    ] = None
    key_password_file: Annotated[Text | None, doc("File that holds the password of the key.")] = (
        None
    )
    verify_hostname: Annotated[
        bool, doc("Whether the certificate must be for the broker's host name.")
    ] = True


class Sasl(Section, frozen=True, kw_only=True):
    """SASL towards Kafka. The password comes from an environment variable or a file."""

    mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], doc("How the password is proved.")
    ] = "SCRAM-SHA-512"
    username: Annotated[Text, doc("User name.")]
    password_env: Annotated[
        EnvName | None, doc("Environment variable that holds the password.")
    ] = None
    password_file: Annotated[Text | None, doc("File that holds the password.")] = None
    allow_cleartext: Annotated[
        bool, doc("Whether `PLAIN` may send the password over a connection without TLS.")
    ] = False


ONLY_BUDGET = 32 << 20
"""Budget in bytes of a sink that has no other beside it, unless configured."""
SHARED_BUDGET = 48 << 20
"""What several sinks have together, those that are given none of their own."""


def with_budgets(sinks: tuple[AnySink, ...]) -> tuple[AnySink, ...]:
    """The sinks, each with the budget that it was given, or its share."""
    share = SHARED_BUDGET // len(sinks) if len(sinks) > 1 else ONLY_BUDGET
    return tuple(
        msgspec.structs.replace(sink, budget_bytes=sink.budget_bytes or share) for sink in sinks
    )


SpoolMode = Literal["off", "spill", "wal"]
SPOOL = doc(
    "What goes to disk: nothing; with `spill` what is over the budget, and what is left at the "
    "end; with `wal` everything, before it is sent."
)


class SinkCommon(Section, tag_field="type", omit_defaults=True, frozen=True, kw_only=True):
    """What every sink has. `on_full = "auto"` pauses reading for an only sink, and drops (and
    accounts) for one of several, so that a dead sink does not stall the others.
    """

    encoding: Annotated[Encoding, doc("How events are encoded.")] = "json"
    budget_bytes: Annotated[
        BudgetBytes | None,
        doc(
            "Most bytes held for the sink before reading pauses or events drop. Without it, an "
            "only sink has 32 MiB, and several share 48 MiB evenly: so the agent stays below "
            "150 MB."
        ),
    ] = None
    on_full: Annotated[
        OnFull,
        doc(
            "What a full budget does: `pause` reading, or `drop` and account; "
            "`auto` pauses for an only sink, and drops for one of several."
        ),
    ] = "auto"

    @property
    def budget(self) -> int:
        """Its budget in bytes: that of an only sink, if none was given."""
        return self.budget_bytes or ONLY_BUDGET

    @property
    def name(self) -> str:
        """What tells it from the other sinks of a run: its URL without options and secrets.

        Of one that there can be once, its type.
        """
        return str(self.__struct_config__.tag)


class StdoutSink(SinkCommon, tag="stdout", frozen=True, kw_only=True):
    """Events on standard output: readable on a terminal, NDJSON elsewhere."""

    encoding: Annotated[
        Encoding | Literal["auto"],
        doc("`auto` is readable on a terminal, and JSON elsewhere."),
    ] = "auto"  # type: ignore[assignment]
    color: Annotated[
        Literal["auto", "always", "never"],
        doc("Colour of the readable form; `auto` only on a terminal and without `NO_COLOR`."),
    ] = "auto"


class FileSink(SinkCommon, tag="file", frozen=True, kw_only=True):
    """Events appended to a file. Renamed or removed by others, it is made anew.

    Delivered are, with `fsync = "never"`, the events that are in a file that has a name: they
    survive the agent, and not a machine that loses power. With `interval` and `batch` they are on
    the disk. With `rotate_bytes` or `rotate_seconds` the agent renames a full file to `PATH.1`,
    the older ones to `PATH.2` and so on.
    """

    path: Annotated[Text, doc("The file; made when it is not there.")]
    mode: Annotated[FileMode, doc("Permissions of a file that is made.")] = "0640"
    rotate_bytes: Annotated[
        Annotated[int, Meta(ge=4096, le=1 << 40)] | None,
        doc("Size at which a file is full; it is larger by at most one batch."),
    ] = None
    rotate_seconds: Annotated[
        Annotated[int, Meta(ge=1, le=366 * 86400)] | None,
        doc(
            "A file is full at each multiple of this many seconds since 1970, when the next event "
            "comes: 86400 is midnight UTC."
        ),
    ] = None
    rotate_keep: Annotated[
        int, Meta(ge=1, le=100), doc("How many full files are kept; the oldest is removed.")
    ] = 7
    rotate_compress: Annotated[
        Literal["none", "gzip"], doc("Whether full files are compressed, to `PATH.1.gz` and so on.")
    ] = "none"
    fsync: Annotated[
        Literal["never", "interval", "batch"],
        doc(
            "When the disk is waited for: `never`, every `fsync_seconds`, or after each write. "
            "Until then events are held, and count against `budget_bytes`."
        ),
    ] = "never"
    fsync_seconds: Annotated[
        PositiveSeconds, doc("Longest wait of an event for the disk, with `interval`.")
    ] = 1.0

    @property
    def name(self) -> str:
        """See `SinkCommon`."""
        return f"file:{self.path}"

    @property
    def rotates(self) -> bool:
        """Whether the agent rotates the file itself."""
        return self.rotate_bytes is not None or self.rotate_seconds is not None


class KafkaSink(SinkCommon, tag="kafka", frozen=True, kw_only=True):
    """Events in Kafka: idempotent, acks=all, keyed by host.

    `topic` may contain `{category}` (`process`, `file`, `net`, `stream`) for a topic each.
    """

    spool: Annotated[SpoolMode, SPOOL] = "off"
    bootstrap: Annotated[
        tuple[Text, ...], Meta(min_length=1), doc("Brokers to begin with, each `host:port`.")
    ]
    topic: Annotated[
        str,
        Meta(min_length=1, max_length=249),
        doc("Topic: letters, digits, `.`, `_`, `-` and the placeholder `{category}`."),
    ] = "kernel-events"
    client_id: Annotated[Text, doc("Name shown in the brokers' logs and quotas.")] = "streamer"
    compression: Annotated[
        Literal["none", "gzip", "snappy", "lz4", "zstd"], doc("Codec of the record batches.")
    ] = "gzip"
    batch_bytes: Annotated[
        int,
        Meta(ge=1024, le=16 << 20),
        doc("Size at which a record batch is sent; with a backlog, up to four times as much."),
    ] = 512 << 10
    linger_ms: Annotated[
        int, Meta(ge=0, le=60000), doc("Longest wait for a record batch to fill.")
    ] = 50
    request_timeout_seconds: Annotated[
        PositiveSeconds, doc("Longest wait for an answer of a broker.")
    ] = 30.0
    tls: Annotated[Tls | None, doc("TLS, when the table is there, even if empty.")] = None
    sasl: Annotated[Sasl | None, doc("SASL, when the table is there.")] = None

    @property
    def name(self) -> str:
        """See `SinkCommon`."""
        scheme = "kafkas" if self.tls else "kafka"
        return f"{scheme}://{','.join(self.bootstrap)}/{self.topic}"


class MqttSink(SinkCommon, tag="mqtt", frozen=True, kw_only=True):
    """Events in MQTT v5 at QoS 1, several to a message.

    `topic` may contain `{category}` and `{host}`.
    """

    spool: Annotated[SpoolMode, SPOOL] = "off"
    host: Annotated[Text, doc("Host name or address of the broker.")]
    port: Annotated[Port, doc("Its port; 8883 is usual with TLS.")] = 1883
    topic: Annotated[
        str,
        Meta(min_length=1, max_length=1024),
        doc("Topic, with the placeholders `{category}` and `{host}`."),
    ] = "kernel/{host}/{category}"
    client_id: Annotated[
        Text | None, doc("Client identifier; without one it is made from the host's name.")
    ] = None
    username: Annotated[Text | None, doc("User name.")] = None
    password_env: Annotated[
        EnvName | None, doc("Environment variable that holds the password.")
    ] = None
    password_file: Annotated[Text | None, doc("File that holds the password.")] = None
    keepalive_seconds: Annotated[
        int, Meta(ge=5, le=65535), doc("Longest silence before the client pings.")
    ] = 30
    batch_events: Annotated[
        int,
        Meta(ge=1, le=10000),
        doc(
            "Most events in a message; with a backlog up to eight times as many, unless it is 1, "
            "and no more than 1 MiB."
        ),
    ] = 200
    linger_ms: Annotated[int, Meta(ge=0, le=60000), doc("Longest wait for a message to fill.")] = 50
    max_inflight: Annotated[
        int, Meta(ge=1, le=20), doc("Most messages sent and not acknowledged yet.")
    ] = 20
    timeout_seconds: Annotated[
        PositiveSeconds, doc("Longest wait for an answer of the broker.")
    ] = 30.0
    tls: Annotated[Tls | None, doc("TLS, when the table is there, even if empty.")] = None

    @property
    def name(self) -> str:
        """See `SinkCommon`."""
        scheme = "mqtts" if self.tls else "mqtt"
        return f"{scheme}://{self.host}:{self.port}/{self.topic}"


AnySink = StdoutSink | FileSink | KafkaSink | MqttSink


class MetricsSection(Section, frozen=True, kw_only=True):
    """Metrics for Prometheus, at `/metrics`, with `/healthz` and `/readyz`. See docs/operation.md.

    Every user of the host can ask. What they learn is how many events of each kind there were.
    """

    listen: Annotated[
        ListenAddress,
        doc('Address and port, such as `"127.0.0.1:9464"` or `"[::1]:9464"`; empty: none.'),
    ] = ""
    allow_remote: Annotated[
        bool,
        doc(
            "Whether `listen` may be an address that other hosts can reach, without encryption or "
            "a password."
        ),
    ] = False


class ControlSection(Section, frozen=True, kw_only=True):
    """How `streamer status` and `streamer top` ask a running agent."""

    socket: Annotated[
        SocketPath,
        doc(
            "Socket that only root, and who started the agent, can ask at; its directory is made "
            "if need be, and nobody else may write to it. Of several agents with one path the "
            "first has it. Empty: none."
        ),
    ] = "/run/streamer/control.sock"


def spool_mode(sink: AnySink) -> SpoolMode:
    """What of a sink goes to disk."""
    return sink.spool if isinstance(sink, KafkaSink | MqttSink) else "off"


class Settings(Section, frozen=True, kw_only=True):
    """The whole configuration. Every setting has a default."""

    events: Annotated[
        tuple[Text, ...],
        doc(
            "Kinds to stream, as globs such as `net.*`; `default` is the default set, and a "
            "leading `-` or `!` takes kinds away. Empty means `default`."
        ),
    ] = ()
    host: Annotated[
        HostName | None, doc("Name of this host in the events; without one, the kernel's.")
    ] = None
    btf: Annotated[
        Text | None, doc("BTF file of the running kernel, where the kernel offers none.")
    ] = None
    rfc3339_time: Annotated[
        bool,
        doc(
            "Whether every event also has `time`: its `time_ns` in RFC 3339 with nine digits, for "
            "readers that round large numbers, such as jq before 1.7 and JavaScript."
        ),
    ] = False
    heartbeat_seconds: Annotated[
        HeartbeatSeconds, doc("Time between two `stream.heartbeat` events.")
    ] = 10.0
    summary_seconds: Annotated[
        SummarySeconds, doc("Time between two summaries of one kind, such as `xdp.counters`.")
    ] = 10.0
    grace_seconds: Annotated[
        PositiveSeconds, doc("Longest wait, when stopping, for the sinks to deliver the rest.")
    ] = 10.0
    user: Annotated[
        Text,
        doc("Who the process that reads events and talks to brokers becomes; it is never root."),
    ] = "nobody"
    workers: Annotated[
        int,
        Meta(ge=1, le=16),
        doc(
            "Processes that read bulk rings and publish, each for some of the CPUs: more than one "
            "where one core does not carry the events of a host. All are one run with one account. "
            "Each has connections of its own, and its part of each `budget_bytes`; so all sinks "
            "have to be Kafka or MQTT, without a spool. There are no more than `bulk_rings`, of "
            "which there are at least as many unless `bulk_bytes` is too small."
        ),
    ] = 1
    oom_score_adj: Annotated[
        Annotated[int, Meta(ge=-1000, le=1000)] | None,
        doc(
            "How much rather than others the agent's processes are ended when memory runs out: "
            "-1000 is never, 1000 first. Lowering it takes CAP_SYS_RESOURCE; without the setting "
            "they have -900 where that can be had, and what they were started with elsewhere."
        ),
    ] = None
    nice: Annotated[
        Annotated[int, Meta(ge=-20, le=19)] | None,
        doc(
            "Their priority among processes that want the same CPUs: -20 is the highest. Raising "
            "it takes CAP_SYS_NICE; without the setting they have -4 where that can be had, unless "
            "they were started with another one than 0."
        ),
    ] = None
    state_file: Annotated[
        StateFile,
        doc(
            "Where a run leaves a note for the next one, which is in its manifest: how it ended, "
            "and which losses it could not tell. Empty: nowhere."
        ),
    ] = "/var/lib/streamer/run.json"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], doc("Least severity that is logged.")
    ] = "info"
    rings: Annotated[Rings, doc("Ring buffers.")] = field(default_factory=Rings)
    kernel: Annotated[Kernel, doc("How the kernel is observed.")] = field(default_factory=Kernel)
    timing: Annotated[TimingSection, doc("Precision of published times.")] = field(
        default_factory=TimingSection
    )
    filters: Annotated[Filters, doc("Filters, applied in the kernel.")] = field(
        default_factory=Filters
    )
    metrics: Annotated[MetricsSection, doc("Metrics for Prometheus.")] = field(
        default_factory=MetricsSection
    )
    control: Annotated[ControlSection, doc("How a running agent is asked.")] = field(
        default_factory=ControlSection
    )
    spool: Annotated[SpoolSection, doc("Disk spool.")] = field(default_factory=SpoolSection)
    shedding: Annotated[
        SheddingSection, doc("What is left out while the sinks cannot keep up.")
    ] = field(default_factory=SheddingSection)
    sinks: Annotated[tuple[AnySink, ...], doc("Where events go. Without one, standard output.")] = (
        StdoutSink(),
    )

    @property
    def poll_interval_ms(self) -> int:
        """How often rings are looked at: not more often than published times are exact."""
        return max(self.rings.poll_interval_ms, -(-self.timing.resolution_us // 1000))


class Limits(Struct, frozen=True, kw_only=True):
    """When a run ends by itself, and whether it may draw a status line."""

    duration_seconds: float | None = None
    max_events: int | None = None
    status: bool = True
