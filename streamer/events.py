"""GENERATED from bpf/events.h by `make gen`: do not edit.

One Struct per kind of event, as it is published, and the layout table of its record.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from streamer.layout import FieldInfo, FieldLayout, KindInfo, ProgramInfo, RecordLayout

SCHEMA_VERSION = 1
"""The published `schema`: raised when a field changes its meaning."""


class Event(Struct, tag_field="event", gc=False):
    """What every event begins with."""

    schema: Annotated[int, Meta(description="version of the meaning of the fields")]
    id: Annotated[str, Meta(description="unique and stable id: run, stream, cpu, seq")]
    time_ns: Annotated[int, Meta(description="when it happened, nanoseconds since the epoch")]
    boot_ns: Annotated[int, Meta(description="nanoseconds since boot, suspend included, when the event happened")]
    host: Annotated[str, Meta(description="name of the host")]
    boot_id: Annotated[str, Meta(description="the kernel's random id of this boot")]
    stream: Annotated[str, Meta(description="ring that carried it: critical or bulk")]
    seq: Annotated[int, Meta(description="sequence number in this stream on this CPU; a missing number is a lost event")]
    cgroup_id: Annotated[int, Meta(description="id of the task's cgroup in the unified (v2) hierarchy")]
    cpu: Annotated[int, Meta(description="CPU that wrote the record")]
    pid: Annotated[int, Meta(description="process id (thread group id) in the initial pid namespace")]
    tid: Annotated[int, Meta(description="thread id in the initial pid namespace")]
    ppid: Annotated[int, Meta(description="process id of the parent")]
    uid: Annotated[int, Meta(description="real user id")]
    gid: Annotated[int, Meta(description="real group id")]
    comm: Annotated[str, Meta(description="name of the task, at most 15 bytes")]
    truncated: Annotated[bool, Meta(description="whether a string was cut at its limit or could not be read to its end")]
    invalid_utf8: Annotated[bool, Meta(description="whether bytes that are not UTF-8 were replaced by U+FFFD")]


class ProcessExec(Event, tag="process.exec", gc=False):
    """A process executed a new program."""

    start_time_ns: Annotated[int, Meta(description="when the process started, ns since the epoch")]
    euid: Annotated[int, Meta(description="effective user id after the exec")]
    auid: Annotated[int, Meta(description="audit (login) user id; 4294967295 when none was set")]
    argc: Annotated[int, Meta(description="number of arguments, also when `argv` was cut")]
    exe: Annotated[str, Meta(description="absolute path of the file that runs: the interpreter, for a script")]
    argv: Annotated[list[str], Meta(description="the arguments")]
    cmdline: Annotated[str, Meta(description="the arguments joined by single spaces")]
    cwd: Annotated[str, Meta(description="working directory")]
    parent_exe: Annotated[str, Meta(description="absolute path of the parent's executable; empty for a kernel thread")]
    parent_comm: Annotated[str, Meta(description="name of the parent")]


class ProcessFork(Event, tag="process.fork", gc=False):
    """A process created a child process (new threads are not reported). `pid` is the parent."""

    child_start_time_ns: Annotated[int, Meta(description="when the child started, ns since the epoch")]
    child_pid: Annotated[int, Meta(description="process id of the child")]


class ProcessExit(Event, tag="process.exit", gc=False):
    """The last thread of a process ended."""

    start_time_ns: Annotated[int, Meta(description="when the process started, ns since the epoch")]
    duration_ns: Annotated[int, Meta(description="how long the process lived")]
    exit_code: Annotated[int, Meta(description="argument of exit(), 0 to 255; 0 when a signal ended the process")]
    signal: Annotated[int, Meta(description="signal that ended the process; 0 when it exited")]
    core_dumped: Annotated[bool, Meta(description="whether a core was dumped")]


class FileOpen(Event, tag="file.open", gc=False):
    """A call of open, creat, openat or openat2 returned."""

    latency_ns: Annotated[int, Meta(description="time the system call took")]
    fd: Annotated[int, Meta(description="file descriptor; -1 when the open failed")]
    errno: Annotated[int, Meta(description="error number; 0 when the open succeeded")]
    flags: Annotated[int, Meta(description="open flags as passed (O_*)")]
    mode: Annotated[int, Meta(description="permissions asked for a new file; 0 when none could be created")]
    path: Annotated[str, Meta(description="absolute path: as opened, symbolic links resolved; of a failed open, as asked, resolved against cwd or dirfd")]


class NetConnect(Event, tag="net.connect", gc=False):
    """An outbound TCP connection was established or failed."""

    latency_ns: Annotated[int, Meta(description="time from the call (or SYN) to the result")]
    errno: Annotated[int, Meta(description="error number, such as 111 (ECONNREFUSED); 0 when connected")]
    netns: Annotated[int, Meta(description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(description="local port; 0 when none was bound")]
    remote_port: Annotated[int, Meta(description="remote port")]
    ip_version: Annotated[int, Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[str, Meta(description="always outbound")]
    local_addr: Annotated[str, Meta(description="local address")]
    remote_addr: Annotated[str, Meta(description="remote address")]


class NetAccept(Event, tag="net.accept", gc=False):
    """A process accepted an inbound TCP connection."""

    fd: Annotated[int, Meta(description="file descriptor of the accepted connection")]
    netns: Annotated[int, Meta(description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(description="local port")]
    remote_port: Annotated[int, Meta(description="remote port")]
    ip_version: Annotated[int, Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[str, Meta(description="always inbound")]
    local_addr: Annotated[str, Meta(description="local address")]
    remote_addr: Annotated[str, Meta(description="remote address")]


class NetClose(Event, tag="net.close", gc=False):
    """An established TCP connection ended."""

    duration_ns: Annotated[int, Meta(description="time from established to closed; 0 when it was established before the agent started")]
    bytes_sent: Annotated[int, Meta(description="payload bytes sent, retransmissions not counted twice")]
    bytes_received: Annotated[int, Meta(description="payload bytes received in order")]
    errno: Annotated[int, Meta(description="error pending on the socket, such as 104 (ECONNRESET); 0 for an orderly close")]
    netns: Annotated[int, Meta(description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(description="local port")]
    remote_port: Annotated[int, Meta(description="remote port")]
    ip_version: Annotated[int, Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[str, Meta(description="who opened it; unknown when established before the agent started")]
    local_addr: Annotated[str, Meta(description="local address")]
    remote_addr: Annotated[str, Meta(description="remote address")]


HEADER: dict[str, int] = {"boot_ns": 0, "seq": 8, "size": 24, "kind": 28, "cpu": 30, "skipped": 52, "flags": 55, "header_size": 72}
"""Where the reader finds what it needs of a record's header."""

_ENVELOPE = (
    FieldLayout("schema", "const", 0, 'schema'),
    FieldLayout("id", "id", 0, None),
    FieldLayout("time_ns", "time", 0, None),
    FieldLayout("boot_ns", "ns", 0, None),
    FieldLayout("host", "const", 0, 'host'),
    FieldLayout("boot_id", "const", 0, 'boot_id'),
    FieldLayout("stream", "const", 0, 'stream'),
    FieldLayout("seq", "ns", 8, None),
    FieldLayout("cgroup_id", "u64", 16, None),
    FieldLayout("cpu", "u16", 30, None),
    FieldLayout("pid", "u32", 32, None),
    FieldLayout("tid", "u32", 36, None),
    FieldLayout("ppid", "u32", 40, None),
    FieldLayout("uid", "u32", 44, None),
    FieldLayout("gid", "u32", 48, None),
    FieldLayout("comm", "cstr", 56, 16),
    FieldLayout("truncated", "flag", 55, 1),
    FieldLayout("invalid_utf8", "invalid_utf8", 0, None),
)

RECORDS: dict[int, RecordLayout] = {
    1: RecordLayout("process.exec", ProcessExec, 120, (
        *_ENVELOPE,
        FieldLayout("start_time_ns", "boottime", 72, None),
        FieldLayout("euid", "u32", 80, None),
        FieldLayout("auid", "u32", 84, None),
        FieldLayout("argc", "u32", 88, None),
        FieldLayout("exe", "str", 92, None),
        FieldLayout("argv", "argv", 94, None),
        FieldLayout("cmdline", "line", 94, None),
        FieldLayout("cwd", "str", 96, None),
        FieldLayout("parent_exe", "str", 98, None),
        FieldLayout("parent_comm", "cstr", 104, 16),
    )),
    2: RecordLayout("process.fork", ProcessFork, 88, (
        *_ENVELOPE,
        FieldLayout("child_start_time_ns", "boottime", 72, None),
        FieldLayout("child_pid", "u32", 80, None),
    )),
    3: RecordLayout("process.exit", ProcessExit, 104, (
        *_ENVELOPE,
        FieldLayout("start_time_ns", "boottime", 72, None),
        FieldLayout("duration_ns", "ns", 80, None),
        FieldLayout("exit_code", "u32", 88, None),
        FieldLayout("signal", "u32", 92, None),
        FieldLayout("core_dumped", "bool", 96, None),
    )),
    16: RecordLayout("file.open", FileOpen, 104, (
        *_ENVELOPE,
        FieldLayout("latency_ns", "ns", 72, None),
        FieldLayout("fd", "s32", 80, None),
        FieldLayout("errno", "u32", 84, None),
        FieldLayout("flags", "u32", 88, None),
        FieldLayout("mode", "u32", 92, None),
        FieldLayout("path", "str", 96, None),
    )),
    32: RecordLayout("net.connect", NetConnect, 128, (
        *_ENVELOPE,
        FieldLayout("latency_ns", "ns", 72, None),
        FieldLayout("errno", "u32", 80, None),
        FieldLayout("netns", "u32", 84, None),
        FieldLayout("local_port", "u16", 88, None),
        FieldLayout("remote_port", "u16", 90, None),
        FieldLayout("ip_version", "u8", 92, None),
        FieldLayout("direction", "names", 93, ('unknown', 'outbound', 'inbound')),
        FieldLayout("local_addr", "ip", 96, 92),
        FieldLayout("remote_addr", "ip", 112, 92),
    )),
    33: RecordLayout("net.accept", NetAccept, 120, (
        *_ENVELOPE,
        FieldLayout("fd", "u32", 72, None),
        FieldLayout("netns", "u32", 76, None),
        FieldLayout("local_port", "u16", 80, None),
        FieldLayout("remote_port", "u16", 82, None),
        FieldLayout("ip_version", "u8", 84, None),
        FieldLayout("direction", "names", 85, ('unknown', 'outbound', 'inbound')),
        FieldLayout("local_addr", "ip", 88, 84),
        FieldLayout("remote_addr", "ip", 104, 84),
    )),
    34: RecordLayout("net.close", NetClose, 144, (
        *_ENVELOPE,
        FieldLayout("duration_ns", "ns", 72, None),
        FieldLayout("bytes_sent", "u64", 80, None),
        FieldLayout("bytes_received", "u64", 88, None),
        FieldLayout("errno", "u32", 96, None),
        FieldLayout("netns", "u32", 100, None),
        FieldLayout("local_port", "u16", 104, None),
        FieldLayout("remote_port", "u16", 106, None),
        FieldLayout("ip_version", "u8", 108, None),
        FieldLayout("direction", "names", 109, ('unknown', 'outbound', 'inbound')),
        FieldLayout("local_addr", "ip", 112, 108),
        FieldLayout("remote_addr", "ip", 128, 108),
    )),
}
"""The layout of each kind's records, by number."""

_ENVELOPE_INFO = (
    FieldInfo("schema", "integer", "version of the meaning of the fields"),
    FieldInfo("id", "string", "unique and stable id: run, stream, cpu, seq"),
    FieldInfo("time_ns", "integer", "when it happened, nanoseconds since the epoch"),
    FieldInfo("boot_ns", "integer", "nanoseconds since boot, suspend included, when the event happened"),
    FieldInfo("host", "string", "name of the host"),
    FieldInfo("boot_id", "string", "the kernel's random id of this boot"),
    FieldInfo("stream", "string", "ring that carried it: critical or bulk"),
    FieldInfo("seq", "integer", "sequence number in this stream on this CPU; a missing number is a lost event"),
    FieldInfo("cgroup_id", "integer", "id of the task's cgroup in the unified (v2) hierarchy"),
    FieldInfo("cpu", "integer", "CPU that wrote the record"),
    FieldInfo("pid", "integer", "process id (thread group id) in the initial pid namespace"),
    FieldInfo("tid", "integer", "thread id in the initial pid namespace"),
    FieldInfo("ppid", "integer", "process id of the parent"),
    FieldInfo("uid", "integer", "real user id"),
    FieldInfo("gid", "integer", "real group id"),
    FieldInfo("comm", "string", "name of the task, at most 15 bytes"),
    FieldInfo("truncated", "boolean", "whether a string was cut at its limit or could not be read to its end"),
    FieldInfo("invalid_utf8", "boolean", "whether bytes that are not UTF-8 were replaced by U+FFFD"),
)

KINDS: dict[str, KindInfo] = {
    "process.exec": KindInfo("process.exec", ProcessExec, "critical", "A process executed a new program.", (
        *_ENVELOPE_INFO,
        FieldInfo("start_time_ns", "integer", "when the process started, ns since the epoch"),
        FieldInfo("euid", "integer", "effective user id after the exec"),
        FieldInfo("auid", "integer", "audit (login) user id; 4294967295 when none was set"),
        FieldInfo("argc", "integer", "number of arguments, also when `argv` was cut"),
        FieldInfo("exe", "string", "absolute path of the file that runs: the interpreter, for a script"),
        FieldInfo("argv", "array of strings", "the arguments"),
        FieldInfo("cmdline", "string", "the arguments joined by single spaces"),
        FieldInfo("cwd", "string", "working directory"),
        FieldInfo("parent_exe", "string", "absolute path of the parent's executable; empty for a kernel thread"),
        FieldInfo("parent_comm", "string", "name of the parent"),
    ), ('on_exec',)),
    "process.fork": KindInfo("process.fork", ProcessFork, "critical", "A process created a child process (new threads are not reported). `pid` is the parent.", (
        *_ENVELOPE_INFO,
        FieldInfo("child_start_time_ns", "integer", "when the child started, ns since the epoch"),
        FieldInfo("child_pid", "integer", "process id of the child"),
    ), ('on_fork',)),
    "process.exit": KindInfo("process.exit", ProcessExit, "critical", "The last thread of a process ended.", (
        *_ENVELOPE_INFO,
        FieldInfo("start_time_ns", "integer", "when the process started, ns since the epoch"),
        FieldInfo("duration_ns", "integer", "how long the process lived"),
        FieldInfo("exit_code", "integer", "argument of exit(), 0 to 255; 0 when a signal ended the process"),
        FieldInfo("signal", "integer", "signal that ended the process; 0 when it exited"),
        FieldInfo("core_dumped", "boolean", "whether a core was dumped"),
    ), ('on_exit',)),
    "file.open": KindInfo("file.open", FileOpen, "bulk", "A call of open, creat, openat or openat2 returned.", (
        *_ENVELOPE_INFO,
        FieldInfo("latency_ns", "integer", "time the system call took"),
        FieldInfo("fd", "integer", "file descriptor; -1 when the open failed"),
        FieldInfo("errno", "integer", "error number; 0 when the open succeeded"),
        FieldInfo("flags", "integer", "open flags as passed (O_*)"),
        FieldInfo("mode", "integer", "permissions asked for a new file; 0 when none could be created"),
        FieldInfo("path", "string", "absolute path: as opened, symbolic links resolved; of a failed open, as asked, resolved against cwd or dirfd"),
    ), ('on_open_enter', 'on_creat_enter', 'on_openat_enter', 'on_openat2_enter', 'on_open_exit', 'on_creat_exit', 'on_openat_exit', 'on_openat2_exit')),
    "net.connect": KindInfo("net.connect", NetConnect, "bulk", "An outbound TCP connection was established or failed.", (
        *_ENVELOPE_INFO,
        FieldInfo("latency_ns", "integer", "time from the call (or SYN) to the result"),
        FieldInfo("errno", "integer", "error number, such as 111 (ECONNREFUSED); 0 when connected"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port; 0 when none was bound"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "integer", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "string", "always outbound"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
    ), ('on_sock_state', 'on_sock_state_twin', 'on_connect_enter', 'on_connect_exit')),
    "net.accept": KindInfo("net.accept", NetAccept, "bulk", "A process accepted an inbound TCP connection.", (
        *_ENVELOPE_INFO,
        FieldInfo("fd", "integer", "file descriptor of the accepted connection"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "integer", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "string", "always inbound"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
    ), ('on_accept_exit', 'on_accept4_exit')),
    "net.close": KindInfo("net.close", NetClose, "bulk", "An established TCP connection ended.", (
        *_ENVELOPE_INFO,
        FieldInfo("duration_ns", "integer", "time from established to closed; 0 when it was established before the agent started"),
        FieldInfo("bytes_sent", "integer", "payload bytes sent, retransmissions not counted twice"),
        FieldInfo("bytes_received", "integer", "payload bytes received in order"),
        FieldInfo("errno", "integer", "error pending on the socket, such as 104 (ECONNRESET); 0 for an orderly close"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "integer", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "string", "who opened it; unknown when established before the agent started"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
    ), ('on_sock_state', 'on_sock_state_twin', 'on_accept_exit', 'on_accept4_exit')),
}
"""What each kind is, for people."""

PROGRAMS: dict[str, ProgramInfo] = {
    "on_exec": ProgramInfo("on_exec", ('process.exec',), ""),
    "on_fork": ProgramInfo("on_fork", ('process.fork',), ""),
    "on_exit": ProgramInfo("on_exit", ('process.exit',), ""),
    "on_open_enter": ProgramInfo("on_open_enter", ('file.open',), "opens by open()"),
    "on_creat_enter": ProgramInfo("on_creat_enter", ('file.open',), "opens by creat()"),
    "on_openat_enter": ProgramInfo("on_openat_enter", ('file.open',), "opens by openat()"),
    "on_openat2_enter": ProgramInfo("on_openat2_enter", ('file.open',), "opens by openat2()"),
    "on_open_exit": ProgramInfo("on_open_exit", ('file.open',), "opens by open()"),
    "on_creat_exit": ProgramInfo("on_creat_exit", ('file.open',), "opens by creat()"),
    "on_openat_exit": ProgramInfo("on_openat_exit", ('file.open',), "opens by openat()"),
    "on_openat2_exit": ProgramInfo("on_openat2_exit", ('file.open',), "opens by openat2()"),
    "on_sock_state": ProgramInfo("on_sock_state", ('net.connect', 'net.close'), ""),
    "on_sock_state_twin": ProgramInfo("on_sock_state_twin", ('net.connect', 'net.close'), "changes of state that interrupt another one"),
    "on_connect_enter": ProgramInfo("on_connect_enter", ('net.connect',), "connects that fail before a SYN is sent (no route, no free port)"),
    "on_connect_exit": ProgramInfo("on_connect_exit", ('net.connect',), "connects that fail before a SYN is sent (no route, no free port)"),
    "on_accept_exit": ProgramInfo("on_accept_exit", ('net.accept', 'net.close'), "connections taken by accept(), and their owner at the close,"),
    "on_accept4_exit": ProgramInfo("on_accept4_exit", ('net.accept', 'net.close'), "connections taken by accept4(), and their owner at the close,"),
}
"""The BPF programs, and what is not observed without each."""

CONTRACT: dict[str, tuple[tuple[str, int, int], ...]] = {
    "event_header": (('boot_ns', 0, 8), ('seq', 8, 8), ('cgroup_id', 16, 8), ('size', 24, 4), ('kind', 28, 2), ('cpu', 30, 2), ('pid', 32, 4), ('tid', 36, 4), ('ppid', 40, 4), ('uid', 44, 4), ('gid', 48, 4), ('skipped', 52, 2), ('stream', 54, 1), ('flags', 55, 1), ('comm', 56, 16)),
    "settings": (('enabled_kinds', 0, 8), ('wakeup_bytes', 8, 16), ('filter_pid', 24, 1), ('filter_uid', 25, 1), ('filter_comm', 26, 1), ('filter_cgroup', 27, 1), ('filter_port', 28, 1), ('filter_path', 29, 1), ('pad', 30, 2)),
    "kind_counters": (('produced', 0, 8), ('filtered', 8, 8), ('lost', 16, 8)),
    "cpu_counters": (('seq', 0, 16), ('skipped', 16, 16), ('kinds', 32, 1536), ('pad', 1568, 32)),
    "reader_state": (('wake', 0, 8),),
    "path_prefix": (('bits', 0, 4), ('path', 4, 256)),
    "process_exec": (('header', 0, 72), ('start_boot_ns', 72, 8), ('euid', 80, 4), ('auid', 84, 4), ('argc', 88, 4), ('exe_len', 92, 2), ('argv_len', 94, 2), ('cwd_len', 96, 2), ('parent_exe_len', 98, 2), ('pad', 100, 4), ('parent_comm', 104, 16), ('data', 120, 28672)),
    "process_fork": (('header', 0, 72), ('child_start_boot_ns', 72, 8), ('child_pid', 80, 4), ('pad', 84, 4)),
    "process_exit": (('header', 0, 72), ('start_boot_ns', 72, 8), ('duration_ns', 80, 8), ('exit_code', 88, 4), ('signal', 92, 4), ('core_dumped', 96, 1), ('pad', 97, 7)),
    "file_open": (('header', 0, 72), ('latency_ns', 72, 8), ('fd', 80, 4), ('errno', 84, 4), ('flags', 88, 4), ('mode', 92, 4), ('path_len', 96, 2), ('pad', 98, 6), ('data', 104, 8192)),
    "net_connect": (('header', 0, 72), ('latency_ns', 72, 8), ('errno', 80, 4), ('netns', 84, 4), ('local_port', 88, 2), ('remote_port', 90, 2), ('ip_version', 92, 1), ('direction', 93, 1), ('pad', 94, 2), ('local_addr', 96, 16), ('remote_addr', 112, 16)),
    "net_accept": (('header', 0, 72), ('fd', 72, 4), ('netns', 76, 4), ('local_port', 80, 2), ('remote_port', 82, 2), ('ip_version', 84, 1), ('direction', 85, 1), ('pad', 86, 2), ('local_addr', 88, 16), ('remote_addr', 104, 16)),
    "net_close": (('header', 0, 72), ('duration_ns', 72, 8), ('bytes_sent', 80, 8), ('bytes_received', 88, 8), ('errno', 96, 4), ('netns', 100, 4), ('local_port', 104, 2), ('remote_port', 106, 2), ('ip_version', 108, 1), ('direction', 109, 1), ('pad', 110, 2), ('local_addr', 112, 16), ('remote_addr', 128, 16)),
    "enum event_kind": (('process_exec', 1, 0), ('process_fork', 2, 0), ('process_exit', 3, 0), ('file_open', 16, 0), ('net_connect', 32, 0), ('net_accept', 33, 0), ('net_close', 34, 0)),
    "enum event_schema": (('SCHEMA_VERSION', 1, 0),),
    "enum event_stream": (('STREAM_CRITICAL', 0, 0), ('STREAM_BULK', 1, 0), ('STREAM_END', 2, 0)),
    "enum event_flags": (('FLAG_TRUNCATED', 1, 0),),
    "enum filter_mode": (('FILTER_OFF', 0, 0), ('FILTER_EXCLUDE', 1, 0), ('FILTER_INCLUDE', 2, 0)),
    "enum filter_verdict": (('VERDICT_KEEP', 1, 0), ('VERDICT_DROP', 2, 0)),
    "enum wake": (('WAKE_NEVER', 0, 0), ('WAKE_FULL', 1, 0), ('WAKE_ANY', 2, 0)),
}
"""Every shared struct: its members with offset and size in bytes."""
