"""GENERATED from bpf/events.h by `make gen`: do not edit.

One Struct per kind of event, as it is published, and the layout table of its record.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from streamer.events.clock import Timed
from streamer.events.dns import DnsAnswer
from streamer.events.layout import FieldInfo, FieldLayout, KindInfo, RecordLayout
from streamer.events.parsed import PARSED

SCHEMA_VERSION = 3
"""The published `schema`: raised when a field changes its meaning."""

Ring = Literal["critical", "bulk"]
"""The rings, in the order of their numbers."""

Count = Annotated[int, Meta(ge=0, le=4294967295)]


class Event(Timed, tag_field="event", gc=False):
    """What every event begins with."""

    schema: Annotated[int, Meta(ge=1, description="version of the meaning of the fields")]
    id: Annotated[str, Meta(description="unique and stable id: run, ring, cpu, seq")]
    time_ns: Annotated[int, Meta(ge=0, description="when it happened, nanoseconds since the epoch")]
    boot_ns: Annotated[int, Meta(ge=0, description="nanoseconds since boot, suspend included, when the event happened")]
    host: Annotated[str, Meta(description="name of the host")]
    boot_id: Annotated[str, Meta(description="the kernel's random id of this boot")]
    ring: Annotated[Ring, Meta(description="ring that carried it")]
    seq: Annotated[int, Meta(ge=1, description="sequence number in this ring on this CPU; a missing number is a lost event")]
    cpu: Annotated[int, Meta(ge=0, le=65535, description="CPU that wrote the record")]
    weight: Annotated[int, Meta(ge=1, le=1048576, description="how many events this one stands for: more than 1 when its kind is sampled")]
    truncated: Annotated[tuple[str, ...], Meta(description="names of the strings that were cut, or could not be read to their end; mostly empty")]
    incomplete: Annotated[bool, Meta(description="whether a read in the kernel failed, so that a field is 0 or empty that need not be")]
    invalid_utf8: Annotated[bool, Meta(description="whether bytes that are not UTF-8 were replaced by U+FFFD")]


class TaskEvent(Event, gc=False):
    """What every event of a task begins with."""

    start_boot_ns: Annotated[int, Meta(ge=0, description="when the process started, nanoseconds since boot: with `pid`, identifies it")]
    cgroup_id: Annotated[int, Meta(ge=0, description="id of the task's cgroup in the unified (v2) hierarchy")]
    pid: Annotated[int, Meta(ge=0, le=4194304, description="process id (thread group id) in the initial pid namespace")]
    tid: Annotated[int, Meta(ge=0, le=4194304, description="thread id in the initial pid namespace")]
    ppid: Annotated[int, Meta(ge=0, le=4194304, description="process id of the parent")]
    uid: Annotated[int, Meta(ge=0, le=4294967295, description="real user id")]
    gid: Annotated[int, Meta(ge=0, le=4294967295, description="real group id")]
    pidns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the process's pid namespace")]
    ns_pid: Annotated[int, Meta(ge=0, le=4194304, description="process id in that namespace")]
    comm: Annotated[str, Meta(max_length=15, description="name of the task, at most 15 bytes")]


class ProcessExec(TaskEvent, tag="process.exec", gc=False):
    """A process executed a new program."""

    start_time_ns: Annotated[int, Meta(ge=0, description="when the process started, ns since the epoch")]
    exe_inode: Annotated[int, Meta(ge=0, description="inode number of the file that runs")]
    exe_dev: Annotated[int, Meta(ge=0, le=4294967295, description="device of its file system, as stat() gives it")]
    exe_nlink: Annotated[int, Meta(ge=0, le=4294967295, description="hard links to it; 0 when it is deleted")]
    exe_mntns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the mount namespace that `exe` is a path in; 0 when its mount is in none")]
    cwd_mntns: Annotated[int, Meta(ge=0, le=4294967295, description="the same of `cwd`")]
    parent_exe_mntns: Annotated[int, Meta(ge=0, le=4294967295, description="the same of `parent_exe`")]
    euid: Annotated[int, Meta(ge=0, le=4294967295, description="effective user id after the exec")]
    auid: Annotated[int, Meta(ge=0, le=4294967295, description="audit (login) user id; 4294967295 when none was set")]
    argc: Annotated[int, Meta(ge=0, le=4294967295, description="number of arguments, also when `argv` was cut: to 16384 bytes, or fewer when the ring fills up")]
    exe: Annotated[str, Meta(description="absolute path of the file that runs: the interpreter, for a script")]
    argv: Annotated[list[str], Meta(description="the arguments")]
    cmdline: Annotated[str, Meta(description="the arguments joined by single spaces, as far as their first 4096 bytes go: `truncated` names it then, and `argv` has the rest")]
    cwd: Annotated[str, Meta(description="working directory")]
    parent_exe: Annotated[str, Meta(description="absolute path of the parent's executable; empty for a kernel thread")]
    filename: Annotated[str, Meta(description="path that was asked to be executed, as given: the script, for a script")]
    interp: Annotated[str, Meta(description="path of the interpreter that the script names, as given; empty for what is no script")]
    exe_mntns_initial: Annotated[bool, Meta(description="whether `exe_mntns` is the initial mount namespace")]
    cwd_mntns_initial: Annotated[bool, Meta(description="whether `cwd_mntns` is")]
    parent_exe_mntns_initial: Annotated[bool, Meta(description="whether `parent_exe_mntns` is")]
    exe_deleted: Annotated[bool, Meta(description="whether the file that runs has been deleted: `exe` is where it was")]
    exe_memfd: Annotated[bool, Meta(description="whether it is a memory file, in no directory at all")]
    parent_comm: Annotated[str, Meta(max_length=15, description="name of the parent")]


class ProcessFork(TaskEvent, tag="process.fork", gc=False):
    """A process created a child process (new threads are not reported). `pid` is who did it."""

    child_start_boot_ns: Annotated[int, Meta(ge=0, description="when the child started, nanoseconds since boot")]
    child_start_time_ns: Annotated[int, Meta(ge=0, description="the same, ns since the epoch")]
    child_pid: Annotated[int, Meta(ge=0, le=4194304, description="process id of the child")]
    child_ppid: Annotated[int, Meta(ge=0, le=4194304, description="process id of its parent: `ppid` and not `pid` after a clone with CLONE_PARENT")]
    child_pidns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the child's pid namespace")]
    child_ns_pid: Annotated[int, Meta(ge=0, le=4194304, description="process id of the child in that namespace")]


class ProcessExit(TaskEvent, tag="process.exit", gc=False):
    """The last thread of a process ended."""

    start_time_ns: Annotated[int, Meta(ge=0, description="when the process started, ns since the epoch")]
    duration_ns: Annotated[int, Meta(ge=0, description="how long the process lived")]
    exit_code: Annotated[int, Meta(ge=0, le=255, description="argument of exit(), 0 to 255; 0 when a signal ended the process")]
    signal: Annotated[int, Meta(ge=0, le=127, description="signal that ended the process; 0 when it exited")]
    core_dumped: Annotated[bool, Meta(description="whether a core was dumped")]


class FileOpen(TaskEvent, tag="file.open", gc=False):
    """A call of open, creat, openat or openat2 returned."""

    latency_ns: Annotated[int, Meta(ge=0, description="time the system call took; 0 unless `open_latency` is configured, which needs Linux 5.12 and BTF of the kernel's own")]
    inode: Annotated[int, Meta(ge=0, description="inode number of the file; 0 when the open failed")]
    dev: Annotated[int, Meta(ge=0, le=4294967295, description="device of its file system, as stat() gives it; 0 when the open failed")]
    fd: Annotated[int, Meta(ge=-1, le=2147483647, description="file descriptor; -1 when the open failed")]
    errno: Annotated[int, Meta(ge=0, le=4095, description="error number; 0 when the open succeeded")]
    flags: Annotated[int, Meta(ge=0, le=4294967295, description="open flags as passed (O_*)")]
    mode: Annotated[int, Meta(ge=0, le=4294967295, description="permissions asked for a new file; 0 when none could be created")]
    mntns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the mount namespace that `path` is a path in; 0 when its mount is in none")]
    path: Annotated[str, Meta(description="absolute path: as opened, symbolic links resolved; of a failed open, or of a file that is in no directory, as asked, behind cwd or dirfd")]
    mntns_initial: Annotated[bool, Meta(description="whether `mntns` is the initial mount namespace")]


class NetConnect(TaskEvent, tag="net.connect", gc=False):
    """An outbound TCP connection was established or failed."""

    latency_ns: Annotated[int, Meta(ge=0, description="time from the SYN to the result; 0 when no SYN was sent, or the SYN or the result was not seen")]
    errno: Annotated[int, Meta(ge=0, le=4095, description="error number, such as 111 (ECONNREFUSED); 0 when connected")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port; 0 when none was bound")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="remote port")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="always outbound")]
    owner_known: Annotated[bool, Meta(description="whether the task is the owner of the socket; where it is not known, pid is 0")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="remote address")]


class NetAccept(TaskEvent, tag="net.accept", gc=False):
    """A process accepted an inbound TCP connection."""

    fd: Annotated[int, Meta(ge=0, le=2147483647, description="file descriptor of the accepted connection")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="remote port")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="always inbound")]
    owner_known: Annotated[bool, Meta(description="always true: the task is the one that accepted")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="remote address")]


class NetClose(TaskEvent, tag="net.close", gc=False):
    """An established TCP connection ended."""

    duration_ns: Annotated[int, Meta(ge=0, description="time from established to closed; 0 when it was established before the agent started, or nobody saw it being established")]
    bytes_sent: Annotated[int, Meta(ge=0, description="payload bytes sent, retransmissions not counted twice")]
    bytes_received: Annotated[int, Meta(ge=0, description="payload bytes received in order")]
    errno: Annotated[int, Meta(ge=0, le=4095, description="error pending on the socket, such as 104 (ECONNRESET); 0 for an orderly close")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="remote port")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="who opened it; unknown when established before the agent started")]
    owner_known: Annotated[bool, Meta(description="whether the task is the owner of the socket; where it is not known, pid is 0")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="remote address")]


class NetListen(TaskEvent, tag="net.listen", gc=False):
    """A process called listen() for a TCP socket."""

    errno: Annotated[int, Meta(ge=0, le=4095, description="error number, such as 98 (EADDRINUSE); 0 when it listens")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    backlog_asked: Annotated[int, Meta(ge=-2147483648, le=2147483647, description="connections that may wait to be accepted, as asked")]
    backlog: Annotated[int, Meta(ge=0, le=4294967295, description="the same, as the kernel grants it (net.core.somaxconn); 0 when it failed")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port; 0 when there is none")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    reuse_port: Annotated[bool, Meta(description="whether others may listen at the same port (SO_REUSEPORT)")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address; 0.0.0.0 or :: for all of them")]


class NetBind(TaskEvent, tag="net.bind", gc=False):
    """A process called bind() for a TCP or UDP socket."""

    errno: Annotated[int, Meta(ge=0, le=4095, description="error number, such as 98 (EADDRINUSE) or 13 (EACCES); 0 when it succeeded")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    asked_port: Annotated[int, Meta(ge=0, le=65535, description="port that was asked for; 0 for any")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="port that the socket got; 0 when it failed")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    transport: Annotated[Literal["none", "other", "tcp", "udp"], Meta(description="protocol of the socket: tcp or udp")]
    reuse_port: Annotated[bool, Meta(description="whether others may bind to the same port (SO_REUSEPORT)")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="address that was bound, or asked for when it failed; 0.0.0.0 or :: for all of them")]


class NetRetransmit(TaskEvent, tag="net.retransmit", gc=False):
    """TCP sent a segment again."""

    segments: Annotated[int, Meta(ge=0, le=4294967295, description="TCP segments that were sent again")]
    bytes: Annotated[int, Meta(ge=0, le=4294967295, description="payload bytes in them")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="remote port")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    state: Annotated[Literal["unknown", "established", "syn_sent", "syn_recv", "fin_wait1", "fin_wait2", "time_wait", "close", "close_wait", "last_ack", "listen", "closing", "new_syn_recv"], Meta(description="state of the connection")]
    congestion: Annotated[Literal["open", "disorder", "cwr", "recovery", "loss"], Meta(description="what the sender takes it for: recovery after duplicate ACKs, loss after a timeout")]
    content: Annotated[Literal["data", "syn", "syn_ack", "fin"], Meta(description="what was sent again")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="who opened the connection; unknown when nobody saw it")]
    owner_known: Annotated[bool, Meta(description="whether the task is the owner of the socket; where it is not known, pid is 0")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="remote address")]


class NetDrop(Event, tag="net.drop", gc=False):
    """The kernel dropped an IP packet. `weight` counts those of the same reason and CPU that came before it and were too many to be reported."""

    reason_code: Annotated[int, Meta(ge=0, le=4294967295, description="number of the reason in this kernel; 0 when it gives none")]
    length: Annotated[int, Meta(ge=0, le=4294967295, description="bytes of the packet, headers included as far as it still had them")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace; 0 when the packet was in none that could be told")]
    ifindex: Annotated[int, Meta(ge=0, le=4294967295, description="index of the interface that it came in at or was to leave by; 0 when there is none")]
    source_port: Annotated[int, Meta(ge=0, le=65535, description="source port; 0 where there is none")]
    destination_port: Annotated[int, Meta(ge=0, le=65535, description="destination port; 0 where there is none")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6")]
    transport: Annotated[Literal["none", "other", "tcp", "udp", "icmp", "icmpv6", "igmp", "sctp", "gre", "esp", "ah", "ipv4", "ipv6", "ospf", "pim", "vrrp"], Meta(description="protocol above IP; none when the header could not be read; other too behind IPv6 extension headers")]
    reason: Annotated[str, Meta(max_length=31, description="why it was dropped, by the name that this kernel has for it, such as NO_SOCKET; empty when it gives none")]
    interface: Annotated[str, Meta(max_length=15, description="name of that interface")]
    source_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="source address; all zero when the header could not be read")]
    destination_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="destination address; likewise")]


class NetUdp(TaskEvent, tag="net.udp", gc=False):
    """What went through a UDP socket, when it is closed, and while it is in use every `udp_seconds`. All counts are totals."""

    duration_ns: Annotated[int, Meta(ge=0, description="how long the socket has been in use: since the first datagram that was seen")]
    datagrams_sent: Annotated[int, Meta(ge=0, description="sends that succeeded, in all that time")]
    bytes_sent: Annotated[int, Meta(ge=0, description="payload bytes in them")]
    datagrams_received: Annotated[int, Meta(ge=0, description="receives that succeeded, in all that time; looking ahead (MSG_PEEK) is none")]
    bytes_received: Annotated[int, Meta(ge=0, description="payload bytes that they gave")]
    send_errors: Annotated[int, Meta(ge=0, description="sends that failed")]
    drops: Annotated[int, Meta(ge=0, description="datagrams for the socket that were dropped, for want of room or for a wrong checksum, since it was made")]
    inode: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the socket, as /proc/PID/fd, /proc/net/udp and ss have it; with `netns` and `pid` it tells sockets apart")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="port of the peer; 0 when none is known")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="outbound when the socket sent first, inbound when it received first")]
    connected: Annotated[bool, Meta(description="whether the peer is the only one: the socket is connected to it")]
    closed: Annotated[bool, Meta(description="whether the socket was closed: its last record")]
    owner_known: Annotated[bool, Meta(description="always true: the task is the one that first sent or received")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address; 0.0.0.0 or :: when it is bound to none")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="address of the peer: of a socket that is not connected, the last one that it sent to; all zero when none is known")]


class NetDns(TaskEvent, tag="net.dns", gc=False):
    """A DNS query of this host was answered, or not; or a response came that nobody had asked for."""

    latency_ns: Annotated[int, Meta(ge=0, description="time from the first query to the response, or for which a query has been waiting; 0 of an unsolicited response")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace")]
    queries: Annotated[int, Meta(ge=0, le=4294967295, description="how often the query was sent, as seen here: more than once when it was repeated from the same port; 0 of an unsolicited response")]
    message_bytes: Annotated[int, Meta(ge=0, le=4294967295, description="bytes of the response, however much of it is looked at; 0 when there was none")]
    dns_id: Annotated[int, Meta(ge=0, le=65535, description="number of the query, by which the response is known")]
    local_port: Annotated[int, Meta(ge=0, le=65535, description="local port")]
    remote_port: Annotated[int, Meta(ge=0, le=65535, description="port of the server")]
    answers: Annotated[list[DnsAnswer], Meta(description="records of the answer section, at most 32")]
    query: Annotated[str, Meta(description="name that was asked for, without the dot at its end; `.` is the root. Its case is kept; what is no printable ASCII is `\\DDD`, in decimal, and special characters have a `\\`")]
    query_type: Annotated[str, Meta(description="what was asked for, such as A; `TYPE65280` where it has no name here")]
    query_class: Annotated[str, Meta(description="almost always IN; `CLASS32` where it has no name here")]
    opcode: Annotated[str, Meta(description="almost always QUERY")]
    response_code: Annotated[str, Meta(description="such as NOERROR, NXDOMAIN, SERVFAIL; empty where there is no response")]
    authoritative: Annotated[bool, Meta(description="whether the server answers for the zone itself (AA)")]
    response_truncated: Annotated[bool, Meta(description="whether the server left out what had no room (TC): it is then asked over TCP")]
    recursion_desired: Annotated[bool, Meta(description="whether the server was asked to ask others (RD)")]
    recursion_available: Annotated[bool, Meta(description="whether it would do that (RA)")]
    authenticated: Annotated[bool, Meta(description="whether it says to have checked signatures (AD)")]
    edns_bytes: Annotated[int, Meta(ge=0, description="what the server can take over UDP (EDNS); 0 where it does not say")]
    answers_left_out: Annotated[int, Meta(ge=0, description="records of the answer section that are not in `answers`")]
    malformed: Annotated[str, Meta(description="the first mistake in the message, in words; empty where there is none")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6; an IPv4-mapped address is published as IPv4")]
    transport: Annotated[Literal["none", "other", "tcp", "udp"], Meta(description="udp or tcp")]
    state: Annotated[Literal["answered", "unanswered", "unsolicited", "unfollowed"], Meta(description="answered; unanswered: no response within `dns_timeout_seconds`; unsolicited: a response to no query that is known, or a second one; unfollowed: over TCP, and its connection could not be followed")]
    owner_known: Annotated[bool, Meta(description="whether the task is who sent the query; where it is not known, pid is 0")]
    local_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="local address")]
    remote_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="address of the server")]


class NetFlow(TaskEvent, tag="net.flow", gc=False):
    """What passed a network interface between two endpoints, in both directions."""

    first_boot_ns: Annotated[int, Meta(ge=0, description="when its first packet was seen, nanoseconds since boot")]
    last_boot_ns: Annotated[int, Meta(ge=0, description="when its last packet was seen, nanoseconds since boot")]
    client_packets: Annotated[int, Meta(ge=0, description="packets that the client sent, since the flow's last record")]
    client_bytes: Annotated[int, Meta(ge=0, description="their bytes, with all headers of the frame; without a VLAN tag that the kernel keeps apart")]
    server_packets: Annotated[int, Meta(ge=0, description="packets that the server sent, since the flow's last record")]
    server_bytes: Annotated[int, Meta(ge=0, description="their bytes")]
    client_packets_total: Annotated[int, Meta(ge=0, description="packets that the client sent, of the whole flow")]
    client_bytes_total: Annotated[int, Meta(ge=0, description="their bytes")]
    server_packets_total: Annotated[int, Meta(ge=0, description="packets that the server sent, of the whole flow")]
    server_bytes_total: Annotated[int, Meta(ge=0, description="their bytes")]
    handshake_ns: Annotated[int, Meta(ge=0, description="TCP: time from the first SYN to the ACK of the server's; 0 when they were not seen")]
    netns: Annotated[int, Meta(ge=0, le=4294967295, description="inode number of the network namespace of the interface")]
    ifindex: Annotated[int, Meta(ge=0, le=4294967295, description="index of the interface")]
    client_port: Annotated[int, Meta(ge=0, le=65535, description="port of the client; 0 where the protocol has none")]
    server_port: Annotated[int, Meta(ge=0, le=65535, description="port of the server; 0 where the protocol has none")]
    vlan_id: Annotated[int, Meta(ge=0, le=4095, description="VLAN; 0 without")]
    inner_vlan_id: Annotated[int, Meta(ge=0, le=4095, description="VLAN within the VLAN; 0 without")]
    client_tcp_flags: Annotated[int, Meta(ge=0, le=255, description="TCP flags that the client's packets had, ORed")]
    server_tcp_flags: Annotated[int, Meta(ge=0, le=255, description="TCP flags that the server's packets had, ORed")]
    protocol: Annotated[int, Meta(ge=0, le=255, description="IP protocol: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6")]
    ip_version: Annotated[Literal[4, 6], Meta(description="4 or 6")]
    ports_unknown: Annotated[bool, Meta(description="fragments of which the first was not seen, or packets cut off before their ports: those are 0")]
    direction: Annotated[Literal["unknown", "outbound", "inbound"], Meta(description="how the client's packets pass the interface")]
    client_by: Annotated[Literal["syn", "packet", "port"], Meta(description="how the client is known: it sent the SYN; the first packet that was seen (never of TCP); has the higher port, nothing better is known")]
    reason: Annotated[Literal["end", "idle", "active", "evicted", "gone", "stop"], Meta(description="why it is reported: it has ended; had no packet for long; goes on; had to make way for another in a full table; its interface has gone; the agent stops")]
    owner_known: Annotated[bool, Meta(description="whether the task is the owner of the local socket; where it is not known, pid is 0")]
    interface: Annotated[str, Meta(max_length=15, description="name of the interface")]
    client_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="address of the client")]
    server_addr: Annotated[str, Meta(pattern="^[0-9a-f:.]{2,45}$", description="address of the server")]
    response_latencies: Annotated[tuple[Count, ...], Meta(min_length=24, max_length=24, description="how often the server took so long, from the client's last payload to its own first, since the flow's last record: under 1 µs, under 2, under 4, and so on; the last: more")]


class SyscallSlow(TaskEvent, tag="syscall.slow", gc=False):
    """A system call took longer than `syscall_slow_ms`. It is told when it returns."""

    duration_ns: Annotated[int, Meta(ge=0, description="time that the call took, suspend not included")]
    ret: Annotated[int, Meta(ge=-1, description="what it returned; -1 when it failed; 0 for what is an address, as of mmap")]
    errno: Annotated[int, Meta(ge=0, le=4095, description="error number; 0 when it succeeded; 4 (EINTR) also when a signal only interrupted it and the kernel makes it anew")]
    number: Annotated[int, Meta(ge=0, le=4294967295, description="number of the system call on this machine")]
    arg0: Annotated[int, Meta(ge=-2147483648, le=2147483647, description="first argument as a signed number of 32 bits, such as a file descriptor or process id; 0 where it does not fit, as an address")]
    syscall: Annotated[str, Meta(max_length=31, description="its name; `syscall_NNN` for one that this release does not know")]


HEADER: dict[str, int] = {"boot_ns": 0, "seq": 8, "size": 16, "kind": 24, "cpu": 26, "skipped": 28, "cut": 30, "header_size": 32}
"""Where the reader finds what it needs of a record, in its base."""

_BASE = (
    FieldLayout("schema", "const", 0, 'schema'),
    FieldLayout("id", "id", 0, None),
    FieldLayout("time_ns", "time", 0, None),
    FieldLayout("boot_ns", "moment", 0, None),
    FieldLayout("host", "const", 0, 'host'),
    FieldLayout("boot_id", "const", 0, 'boot_id'),
    FieldLayout("ring", "const", 0, 'ring'),
    FieldLayout("seq", "serial", 8, None),
    FieldLayout("cpu", "u16", 26, None),
    FieldLayout("weight", "u32", 20, None),
)

_MARKS = (
    FieldLayout("incomplete", "flag", 31, 1),
    FieldLayout("invalid_utf8", "invalid_utf8", 0, None),
)

_TASK = (
    FieldLayout("start_boot_ns", "start", 32, None),
    FieldLayout("cgroup_id", "u64", 40, None),
    FieldLayout("pid", "u32", 48, None),
    FieldLayout("tid", "u32", 52, None),
    FieldLayout("ppid", "u32", 56, None),
    FieldLayout("uid", "u32", 60, None),
    FieldLayout("gid", "u32", 64, None),
    FieldLayout("pidns", "u32", 68, None),
    FieldLayout("ns_pid", "u32", 72, None),
    FieldLayout("comm", "cstr", 80, 16),
)

_END = (
    FieldLayout("time", "const", 0, 'time'),
    FieldLayout("replayed", "const", 0, 'replayed'),
)

RECORDS: dict[int, RecordLayout] = {
    1: RecordLayout("process.exec", ProcessExec, 184, 37048, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ('exe', 'argv', 'cwd', 'parent_exe', 'filename', 'interp', 'cmdline')),
        *_MARKS,
        *_TASK,
        FieldLayout("start_time_ns", "boottime", 96, None),
        FieldLayout("exe_inode", "u64", 104, None),
        FieldLayout("exe_dev", "u32", 112, None),
        FieldLayout("exe_nlink", "u32", 116, None),
        FieldLayout("exe_mntns", "u32", 120, None),
        FieldLayout("cwd_mntns", "u32", 124, None),
        FieldLayout("parent_exe_mntns", "u32", 128, None),
        FieldLayout("euid", "u32", 132, None),
        FieldLayout("auid", "u32", 136, None),
        FieldLayout("argc", "u32", 140, None),
        FieldLayout("exe", "str", 144, None),
        FieldLayout("argv", "argv", 146, None),
        FieldLayout("cmdline", "line", 146, None),
        FieldLayout("cwd", "str", 148, None),
        FieldLayout("parent_exe", "str", 150, None),
        FieldLayout("filename", "str", 152, None),
        FieldLayout("interp", "str", 154, None),
        FieldLayout("exe_mntns_initial", "bool", 156, None),
        FieldLayout("cwd_mntns_initial", "bool", 157, None),
        FieldLayout("parent_exe_mntns_initial", "bool", 158, None),
        FieldLayout("exe_deleted", "bool", 159, None),
        FieldLayout("exe_memfd", "bool", 160, None),
        FieldLayout("parent_comm", "cstr", 168, 16),
        *_END,
    )),
    2: RecordLayout("process.fork", ProcessFork, 128, 128, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("child_start_boot_ns", "start", 96, None),
        FieldLayout("child_start_time_ns", "boottime", 104, None),
        FieldLayout("child_pid", "u32", 112, None),
        FieldLayout("child_ppid", "u32", 116, None),
        FieldLayout("child_pidns", "u32", 120, None),
        FieldLayout("child_ns_pid", "u32", 124, None),
        *_END,
    )),
    3: RecordLayout("process.exit", ProcessExit, 128, 128, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("start_time_ns", "boottime", 96, None),
        FieldLayout("duration_ns", "ns", 104, None),
        FieldLayout("exit_code", "u32", 112, None),
        FieldLayout("signal", "u32", 116, None),
        FieldLayout("core_dumped", "bool", 120, None),
        *_END,
    )),
    16: RecordLayout("file.open", FileOpen, 144, 8336, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ('path',)),
        *_MARKS,
        *_TASK,
        FieldLayout("latency_ns", "ns", 96, None),
        FieldLayout("inode", "u64", 104, None),
        FieldLayout("dev", "u32", 112, None),
        FieldLayout("fd", "s32", 116, None),
        FieldLayout("errno", "u32", 120, None),
        FieldLayout("flags", "u32", 124, None),
        FieldLayout("mode", "u32", 128, None),
        FieldLayout("mntns", "u32", 132, None),
        FieldLayout("path", "str", 136, None),
        FieldLayout("mntns_initial", "bool", 138, None),
        *_END,
    )),
    32: RecordLayout("net.connect", NetConnect, 152, 152, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("latency_ns", "ns", 96, None),
        FieldLayout("errno", "u32", 104, None),
        FieldLayout("netns", "u32", 108, None),
        FieldLayout("local_port", "u16", 112, None),
        FieldLayout("remote_port", "u16", 114, None),
        FieldLayout("ip_version", "u8", 116, None),
        FieldLayout("direction", "names", 117, ('unknown', 'outbound', 'inbound')),
        FieldLayout("owner_known", "bool", 118, None),
        FieldLayout("local_addr", "ip", 120, 116),
        FieldLayout("remote_addr", "ip", 136, 116),
        *_END,
    )),
    33: RecordLayout("net.accept", NetAccept, 144, 144, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("fd", "u32", 96, None),
        FieldLayout("netns", "u32", 100, None),
        FieldLayout("local_port", "u16", 104, None),
        FieldLayout("remote_port", "u16", 106, None),
        FieldLayout("ip_version", "u8", 108, None),
        FieldLayout("direction", "names", 109, ('unknown', 'outbound', 'inbound')),
        FieldLayout("owner_known", "bool", 110, None),
        FieldLayout("local_addr", "ip", 112, 108),
        FieldLayout("remote_addr", "ip", 128, 108),
        *_END,
    )),
    34: RecordLayout("net.close", NetClose, 168, 168, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("duration_ns", "ns", 96, None),
        FieldLayout("bytes_sent", "u64", 104, None),
        FieldLayout("bytes_received", "u64", 112, None),
        FieldLayout("errno", "u32", 120, None),
        FieldLayout("netns", "u32", 124, None),
        FieldLayout("local_port", "u16", 128, None),
        FieldLayout("remote_port", "u16", 130, None),
        FieldLayout("ip_version", "u8", 132, None),
        FieldLayout("direction", "names", 133, ('unknown', 'outbound', 'inbound')),
        FieldLayout("owner_known", "bool", 134, None),
        FieldLayout("local_addr", "ip", 136, 132),
        FieldLayout("remote_addr", "ip", 152, 132),
        *_END,
    )),
    35: RecordLayout("net.listen", NetListen, 136, 136, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("errno", "u32", 96, None),
        FieldLayout("netns", "u32", 100, None),
        FieldLayout("backlog_asked", "s32", 104, None),
        FieldLayout("backlog", "u32", 108, None),
        FieldLayout("local_port", "u16", 112, None),
        FieldLayout("ip_version", "u8", 114, None),
        FieldLayout("reuse_port", "bool", 115, None),
        FieldLayout("local_addr", "ip", 120, 114),
        *_END,
    )),
    36: RecordLayout("net.bind", NetBind, 128, 128, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("errno", "u32", 96, None),
        FieldLayout("netns", "u32", 100, None),
        FieldLayout("asked_port", "u16", 104, None),
        FieldLayout("local_port", "u16", 106, None),
        FieldLayout("ip_version", "u8", 108, None),
        FieldLayout("transport", "names", 109, ('none', 'other', 'tcp', 'udp')),
        FieldLayout("reuse_port", "bool", 110, None),
        FieldLayout("local_addr", "ip", 112, 108),
        *_END,
    )),
    37: RecordLayout("net.retransmit", NetRetransmit, 152, 152, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("segments", "u32", 96, None),
        FieldLayout("bytes", "u32", 100, None),
        FieldLayout("netns", "u32", 104, None),
        FieldLayout("local_port", "u16", 108, None),
        FieldLayout("remote_port", "u16", 110, None),
        FieldLayout("ip_version", "u8", 112, None),
        FieldLayout("state", "names", 113, ('unknown', 'established', 'syn_sent', 'syn_recv', 'fin_wait1', 'fin_wait2', 'time_wait', 'close', 'close_wait', 'last_ack', 'listen', 'closing', 'new_syn_recv')),
        FieldLayout("congestion", "names", 114, ('open', 'disorder', 'cwr', 'recovery', 'loss')),
        FieldLayout("content", "names", 115, ('data', 'syn', 'syn_ack', 'fin')),
        FieldLayout("direction", "names", 116, ('unknown', 'outbound', 'inbound')),
        FieldLayout("owner_known", "bool", 117, None),
        FieldLayout("local_addr", "ip", 120, 112),
        FieldLayout("remote_addr", "ip", 136, 112),
        *_END,
    )),
    38: RecordLayout("net.drop", NetDrop, 136, 136, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        FieldLayout("reason_code", "u32", 32, None),
        FieldLayout("length", "u32", 36, None),
        FieldLayout("netns", "u32", 40, None),
        FieldLayout("ifindex", "u32", 44, None),
        FieldLayout("source_port", "u16", 48, None),
        FieldLayout("destination_port", "u16", 50, None),
        FieldLayout("ip_version", "u8", 52, None),
        FieldLayout("transport", "names", 53, ('none', 'other', 'tcp', 'udp', 'icmp', 'icmpv6', 'igmp', 'sctp', 'gre', 'esp', 'ah', 'ipv4', 'ipv6', 'ospf', 'pim', 'vrrp')),
        FieldLayout("reason", "cstr", 56, 32),
        FieldLayout("interface", "cstr", 88, 16),
        FieldLayout("source_addr", "ip", 104, 52),
        FieldLayout("destination_addr", "ip", 120, 52),
        *_END,
    )),
    39: RecordLayout("net.udp", NetUdp, 208, 208, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("duration_ns", "ns", 96, None),
        FieldLayout("datagrams_sent", "u64", 104, None),
        FieldLayout("bytes_sent", "u64", 112, None),
        FieldLayout("datagrams_received", "u64", 120, None),
        FieldLayout("bytes_received", "u64", 128, None),
        FieldLayout("send_errors", "u64", 136, None),
        FieldLayout("drops", "u64", 144, None),
        FieldLayout("inode", "u32", 152, None),
        FieldLayout("netns", "u32", 156, None),
        FieldLayout("local_port", "u16", 160, None),
        FieldLayout("remote_port", "u16", 162, None),
        FieldLayout("ip_version", "u8", 164, None),
        FieldLayout("direction", "names", 165, ('unknown', 'outbound', 'inbound')),
        FieldLayout("connected", "bool", 166, None),
        FieldLayout("closed", "bool", 167, None),
        FieldLayout("owner_known", "bool", 168, None),
        FieldLayout("local_addr", "ip", 176, 164),
        FieldLayout("remote_addr", "ip", 192, 164),
        *_END,
    )),
    40: RecordLayout("net.dns", NetDns, 160, 4536, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ('answers',)),
        *_MARKS,
        *_TASK,
        FieldLayout("latency_ns", "ns", 96, None),
        FieldLayout("netns", "u32", 104, None),
        FieldLayout("queries", "u32", 108, None),
        FieldLayout("message_bytes", "u32", 112, None),
        FieldLayout("dns_id", "u16", 116, None),
        FieldLayout("local_port", "u16", 118, None),
        FieldLayout("remote_port", "u16", 120, None),
        FieldLayout("answers", "parsed", 122, PARSED["dns"].parse),
        FieldLayout("query", "part", 0, 1),
        FieldLayout("query_type", "part", 0, 2),
        FieldLayout("query_class", "part", 0, 3),
        FieldLayout("opcode", "part", 0, 4),
        FieldLayout("response_code", "part", 0, 5),
        FieldLayout("authoritative", "part", 0, 6),
        FieldLayout("response_truncated", "part", 0, 7),
        FieldLayout("recursion_desired", "part", 0, 8),
        FieldLayout("recursion_available", "part", 0, 9),
        FieldLayout("authenticated", "part", 0, 10),
        FieldLayout("edns_bytes", "part", 0, 11),
        FieldLayout("answers_left_out", "part", 0, 12),
        FieldLayout("malformed", "part", 0, 13),
        FieldLayout("ip_version", "u8", 124, None),
        FieldLayout("transport", "names", 125, ('none', 'other', 'tcp', 'udp')),
        FieldLayout("state", "names", 126, ('answered', 'unanswered', 'unsolicited', 'unfollowed')),
        FieldLayout("owner_known", "bool", 127, None),
        FieldLayout("local_addr", "ip", 128, 124),
        FieldLayout("remote_addr", "ip", 144, 124),
        *_END,
    )),
    41: RecordLayout("net.flow", NetFlow, 360, 360, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("first_boot_ns", "moment", 96, None),
        FieldLayout("last_boot_ns", "moment", 104, None),
        FieldLayout("client_packets", "u64", 112, None),
        FieldLayout("client_bytes", "u64", 120, None),
        FieldLayout("server_packets", "u64", 128, None),
        FieldLayout("server_bytes", "u64", 136, None),
        FieldLayout("client_packets_total", "u64", 144, None),
        FieldLayout("client_bytes_total", "u64", 152, None),
        FieldLayout("server_packets_total", "u64", 160, None),
        FieldLayout("server_bytes_total", "u64", 168, None),
        FieldLayout("handshake_ns", "ns", 176, None),
        FieldLayout("netns", "u32", 184, None),
        FieldLayout("ifindex", "u32", 188, None),
        FieldLayout("client_port", "u16", 192, None),
        FieldLayout("server_port", "u16", 194, None),
        FieldLayout("vlan_id", "u16", 196, None),
        FieldLayout("inner_vlan_id", "u16", 198, None),
        FieldLayout("client_tcp_flags", "u8", 200, None),
        FieldLayout("server_tcp_flags", "u8", 201, None),
        FieldLayout("protocol", "u8", 202, None),
        FieldLayout("ip_version", "u8", 203, None),
        FieldLayout("ports_unknown", "bool", 204, None),
        FieldLayout("direction", "names", 205, ('unknown', 'outbound', 'inbound')),
        FieldLayout("client_by", "names", 206, ('syn', 'packet', 'port')),
        FieldLayout("reason", "names", 207, ('end', 'idle', 'active', 'evicted', 'gone', 'stop')),
        FieldLayout("owner_known", "bool", 208, None),
        FieldLayout("interface", "cstr", 216, 16),
        FieldLayout("client_addr", "ip", 232, 203),
        FieldLayout("server_addr", "ip", 248, 203),
        FieldLayout("response_latencies", "counts", 264, 24),
        *_END,
    )),
    50: RecordLayout("syscall.slow", SyscallSlow, 160, 160, (
        *_BASE,
        FieldLayout("truncated", "cut", 30, ()),
        *_MARKS,
        *_TASK,
        FieldLayout("duration_ns", "ns", 96, None),
        FieldLayout("ret", "s64", 104, None),
        FieldLayout("errno", "u32", 112, None),
        FieldLayout("number", "u32", 116, None),
        FieldLayout("arg0", "s32", 120, None),
        FieldLayout("syscall", "cstr", 128, 32),
        *_END,
    )),
}
"""The layout of each kind's records, by number."""

_BASE_INFO = (
    FieldInfo("schema", "integer from 1", "version of the meaning of the fields"),
    FieldInfo("id", "string", "unique and stable id: run, ring, cpu, seq"),
    FieldInfo("time_ns", "integer", "when it happened, nanoseconds since the epoch"),
    FieldInfo("boot_ns", "integer", "nanoseconds since boot, suspend included, when the event happened"),
    FieldInfo("host", "string", "name of the host"),
    FieldInfo("boot_id", "string", "the kernel's random id of this boot"),
    FieldInfo("ring", "\"critical\" or \"bulk\"", "ring that carried it"),
    FieldInfo("seq", "integer from 1", "sequence number in this ring on this CPU; a missing number is a lost event"),
    FieldInfo("cpu", "integer", "CPU that wrote the record"),
    FieldInfo("weight", "integer from 1 to 1048576", "how many events this one stands for: more than 1 when its kind is sampled"),
    FieldInfo("truncated", "array of strings", "names of the strings that were cut, or could not be read to their end; mostly empty"),
    FieldInfo("incomplete", "boolean", "whether a read in the kernel failed, so that a field is 0 or empty that need not be"),
    FieldInfo("invalid_utf8", "boolean", "whether bytes that are not UTF-8 were replaced by U+FFFD"),
)

_TASK_INFO = (
    FieldInfo("start_boot_ns", "integer", "when the process started, nanoseconds since boot: with `pid`, identifies it"),
    FieldInfo("cgroup_id", "integer", "id of the task's cgroup in the unified (v2) hierarchy"),
    FieldInfo("pid", "integer from 0 to 4194304", "process id (thread group id) in the initial pid namespace"),
    FieldInfo("tid", "integer from 0 to 4194304", "thread id in the initial pid namespace"),
    FieldInfo("ppid", "integer from 0 to 4194304", "process id of the parent"),
    FieldInfo("uid", "integer", "real user id"),
    FieldInfo("gid", "integer", "real group id"),
    FieldInfo("pidns", "integer", "inode number of the process's pid namespace"),
    FieldInfo("ns_pid", "integer from 0 to 4194304", "process id in that namespace"),
    FieldInfo("comm", "string", "name of the task, at most 15 bytes"),
)

_END_INFO = (
    FieldInfo("time", "string", "at the end, with `rfc3339_time` alone: the same as `time_ns`, in RFC 3339"),
    FieldInfo("replayed", "boolean", "at the end, and true, of what was in the spool before it was sent"),
)

KINDS: dict[str, KindInfo] = {
    "process.exec": KindInfo("process.exec", ProcessExec, "critical", "A process executed a new program.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("start_time_ns", "integer", "when the process started, ns since the epoch"),
        FieldInfo("exe_inode", "integer", "inode number of the file that runs"),
        FieldInfo("exe_dev", "integer", "device of its file system, as stat() gives it"),
        FieldInfo("exe_nlink", "integer", "hard links to it; 0 when it is deleted"),
        FieldInfo("exe_mntns", "integer", "inode number of the mount namespace that `exe` is a path in; 0 when its mount is in none"),
        FieldInfo("cwd_mntns", "integer", "the same of `cwd`"),
        FieldInfo("parent_exe_mntns", "integer", "the same of `parent_exe`"),
        FieldInfo("euid", "integer", "effective user id after the exec"),
        FieldInfo("auid", "integer", "audit (login) user id; 4294967295 when none was set"),
        FieldInfo("argc", "integer", "number of arguments, also when `argv` was cut: to 16384 bytes, or fewer when the ring fills up"),
        FieldInfo("exe", "string", "absolute path of the file that runs: the interpreter, for a script"),
        FieldInfo("argv", "array of strings", "the arguments"),
        FieldInfo("cmdline", "string", "the arguments joined by single spaces, as far as their first 4096 bytes go: `truncated` names it then, and `argv` has the rest"),
        FieldInfo("cwd", "string", "working directory"),
        FieldInfo("parent_exe", "string", "absolute path of the parent's executable; empty for a kernel thread"),
        FieldInfo("filename", "string", "path that was asked to be executed, as given: the script, for a script"),
        FieldInfo("interp", "string", "path of the interpreter that the script names, as given; empty for what is no script"),
        FieldInfo("exe_mntns_initial", "boolean", "whether `exe_mntns` is the initial mount namespace"),
        FieldInfo("cwd_mntns_initial", "boolean", "whether `cwd_mntns` is"),
        FieldInfo("parent_exe_mntns_initial", "boolean", "whether `parent_exe_mntns` is"),
        FieldInfo("exe_deleted", "boolean", "whether the file that runs has been deleted: `exe` is where it was"),
        FieldInfo("exe_memfd", "boolean", "whether it is a memory file, in no directory at all"),
        FieldInfo("parent_comm", "string", "name of the parent"),
        *_END_INFO,
    ), ()),
    "process.fork": KindInfo("process.fork", ProcessFork, "critical", "A process created a child process (new threads are not reported). `pid` is who did it.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("child_start_boot_ns", "integer", "when the child started, nanoseconds since boot"),
        FieldInfo("child_start_time_ns", "integer", "the same, ns since the epoch"),
        FieldInfo("child_pid", "integer from 0 to 4194304", "process id of the child"),
        FieldInfo("child_ppid", "integer from 0 to 4194304", "process id of its parent: `ppid` and not `pid` after a clone with CLONE_PARENT"),
        FieldInfo("child_pidns", "integer", "inode number of the child's pid namespace"),
        FieldInfo("child_ns_pid", "integer from 0 to 4194304", "process id of the child in that namespace"),
        *_END_INFO,
    ), ()),
    "process.exit": KindInfo("process.exit", ProcessExit, "critical", "The last thread of a process ended.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("start_time_ns", "integer", "when the process started, ns since the epoch"),
        FieldInfo("duration_ns", "integer", "how long the process lived"),
        FieldInfo("exit_code", "integer from 0 to 255", "argument of exit(), 0 to 255; 0 when a signal ended the process"),
        FieldInfo("signal", "integer from 0 to 127", "signal that ended the process; 0 when it exited"),
        FieldInfo("core_dumped", "boolean", "whether a core was dumped"),
        *_END_INFO,
    ), ()),
    "file.open": KindInfo("file.open", FileOpen, "bulk", "A call of open, creat, openat or openat2 returned.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("latency_ns", "integer", "time the system call took; 0 unless `open_latency` is configured, which needs Linux 5.12 and BTF of the kernel's own"),
        FieldInfo("inode", "integer", "inode number of the file; 0 when the open failed"),
        FieldInfo("dev", "integer", "device of its file system, as stat() gives it; 0 when the open failed"),
        FieldInfo("fd", "integer from -1 to 2147483647", "file descriptor; -1 when the open failed"),
        FieldInfo("errno", "integer from 0 to 4095", "error number; 0 when the open succeeded"),
        FieldInfo("flags", "integer", "open flags as passed (O_*)"),
        FieldInfo("mode", "integer", "permissions asked for a new file; 0 when none could be created"),
        FieldInfo("mntns", "integer", "inode number of the mount namespace that `path` is a path in; 0 when its mount is in none"),
        FieldInfo("path", "string", "absolute path: as opened, symbolic links resolved; of a failed open, or of a file that is in no directory, as asked, behind cwd or dirfd"),
        FieldInfo("mntns_initial", "boolean", "whether `mntns` is the initial mount namespace"),
        *_END_INFO,
    ), ("opens through io_uring", "system calls of 32-bit programs on a 64-bit kernel", "open_by_handle_at")),
    "net.connect": KindInfo("net.connect", NetConnect, "bulk", "An outbound TCP connection was established or failed.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("latency_ns", "integer", "time from the SYN to the result; 0 when no SYN was sent, or the SYN or the result was not seen"),
        FieldInfo("errno", "integer from 0 to 4095", "error number, such as 111 (ECONNREFUSED); 0 when connected"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port; 0 when none was bound"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "always outbound"),
        FieldInfo("owner_known", "boolean", "whether the task is the owner of the socket; where it is not known, pid is 0"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
        *_END_INFO,
    ), ("connects through io_uring or by 32-bit programs that fail before a SYN is sent",)),
    "net.accept": KindInfo("net.accept", NetAccept, "bulk", "A process accepted an inbound TCP connection.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("fd", "integer from 0 to 2147483647", "file descriptor of the accepted connection"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "always inbound"),
        FieldInfo("owner_known", "boolean", "always true: the task is the one that accepted"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
        *_END_INFO,
    ), ("accepts through io_uring or by 32-bit programs",)),
    "net.close": KindInfo("net.close", NetClose, "bulk", "An established TCP connection ended.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("duration_ns", "integer", "time from established to closed; 0 when it was established before the agent started, or nobody saw it being established"),
        FieldInfo("bytes_sent", "integer", "payload bytes sent, retransmissions not counted twice"),
        FieldInfo("bytes_received", "integer", "payload bytes received in order"),
        FieldInfo("errno", "integer from 0 to 4095", "error pending on the socket, such as 104 (ECONNRESET); 0 for an orderly close"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "who opened it; unknown when established before the agent started"),
        FieldInfo("owner_known", "boolean", "whether the task is the owner of the socket; where it is not known, pid is 0"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
        *_END_INFO,
    ), ()),
    "net.listen": KindInfo("net.listen", NetListen, "bulk", "A process called listen() for a TCP socket.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("errno", "integer from 0 to 4095", "error number, such as 98 (EADDRINUSE); 0 when it listens"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("backlog_asked", "integer from -2147483648 to 2147483647", "connections that may wait to be accepted, as asked"),
        FieldInfo("backlog", "integer", "the same, as the kernel grants it (net.core.somaxconn); 0 when it failed"),
        FieldInfo("local_port", "integer", "local port; 0 when there is none"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("reuse_port", "boolean", "whether others may listen at the same port (SO_REUSEPORT)"),
        FieldInfo("local_addr", "string", "local address; 0.0.0.0 or :: for all of them"),
        *_END_INFO,
    ), ("listens through io_uring, by 32-bit programs or by the kernel itself",)),
    "net.bind": KindInfo("net.bind", NetBind, "bulk", "A process called bind() for a TCP or UDP socket.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("errno", "integer from 0 to 4095", "error number, such as 98 (EADDRINUSE) or 13 (EACCES); 0 when it succeeded"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("asked_port", "integer", "port that was asked for; 0 for any"),
        FieldInfo("local_port", "integer", "port that the socket got; 0 when it failed"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("transport", "\"none\" or \"other\" or \"tcp\" or \"udp\"", "protocol of the socket: tcp or udp"),
        FieldInfo("reuse_port", "boolean", "whether others may bind to the same port (SO_REUSEPORT)"),
        FieldInfo("local_addr", "string", "address that was bound, or asked for when it failed; 0.0.0.0 or :: for all of them"),
        *_END_INFO,
    ), ("binds through io_uring, by 32-bit programs or by the kernel itself", "ports that a socket is given by connecting or sending", "sockets of other protocols")),
    "net.retransmit": KindInfo("net.retransmit", NetRetransmit, "bulk", "TCP sent a segment again.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("segments", "integer", "TCP segments that were sent again"),
        FieldInfo("bytes", "integer", "payload bytes in them"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "remote port"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("state", "\"unknown\" or \"established\" or \"syn_sent\" or \"syn_recv\" or \"fin_wait1\" or \"fin_wait2\" or \"time_wait\" or \"close\" or \"close_wait\" or \"last_ack\" or \"listen\" or \"closing\" or \"new_syn_recv\"", "state of the connection"),
        FieldInfo("congestion", "\"open\" or \"disorder\" or \"cwr\" or \"recovery\" or \"loss\"", "what the sender takes it for: recovery after duplicate ACKs, loss after a timeout"),
        FieldInfo("content", "\"data\" or \"syn\" or \"syn_ack\" or \"fin\"", "what was sent again"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "who opened the connection; unknown when nobody saw it"),
        FieldInfo("owner_known", "boolean", "whether the task is the owner of the socket; where it is not known, pid is 0"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "remote address"),
        *_END_INFO,
    ), ("retransmissions that this host itself could not send",)),
    "net.drop": KindInfo("net.drop", NetDrop, "bulk", "The kernel dropped an IP packet. `weight` counts those of the same reason and CPU that came before it and were too many to be reported.", (
        *_BASE_INFO,
        FieldInfo("reason_code", "integer", "number of the reason in this kernel; 0 when it gives none"),
        FieldInfo("length", "integer", "bytes of the packet, headers included as far as it still had them"),
        FieldInfo("netns", "integer", "inode number of the network namespace; 0 when the packet was in none that could be told"),
        FieldInfo("ifindex", "integer", "index of the interface that it came in at or was to leave by; 0 when there is none"),
        FieldInfo("source_port", "integer", "source port; 0 where there is none"),
        FieldInfo("destination_port", "integer", "destination port; 0 where there is none"),
        FieldInfo("ip_version", "4 or 6", "4 or 6"),
        FieldInfo("transport", "\"none\" or \"other\" or \"tcp\" or \"udp\" or \"icmp\" or \"icmpv6\" or \"igmp\" or \"sctp\" or \"gre\" or \"esp\" or \"ah\" or \"ipv4\" or \"ipv6\" or \"ospf\" or \"pim\" or \"vrrp\"", "protocol above IP; none when the header could not be read; other too behind IPv6 extension headers"),
        FieldInfo("reason", "string", "why it was dropped, by the name that this kernel has for it, such as NO_SOCKET; empty when it gives none"),
        FieldInfo("interface", "string", "name of that interface"),
        FieldInfo("source_addr", "string", "source address; all zero when the header could not be read"),
        FieldInfo("destination_addr", "string", "destination address; likewise"),
        *_END_INFO,
    ), ("packets that hardware or driver drop", "packets that XDP drops", "packets that are not IP", "from 5.17 on, packets that the kernel freed without saying why, unless unspecified_drops is set")),
    "net.udp": KindInfo("net.udp", NetUdp, "bulk", "What went through a UDP socket, when it is closed, and while it is in use every `udp_seconds`. All counts are totals.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("duration_ns", "integer", "how long the socket has been in use: since the first datagram that was seen"),
        FieldInfo("datagrams_sent", "integer", "sends that succeeded, in all that time"),
        FieldInfo("bytes_sent", "integer", "payload bytes in them"),
        FieldInfo("datagrams_received", "integer", "receives that succeeded, in all that time; looking ahead (MSG_PEEK) is none"),
        FieldInfo("bytes_received", "integer", "payload bytes that they gave"),
        FieldInfo("send_errors", "integer", "sends that failed"),
        FieldInfo("drops", "integer", "datagrams for the socket that were dropped, for want of room or for a wrong checksum, since it was made"),
        FieldInfo("inode", "integer", "inode number of the socket, as /proc/PID/fd, /proc/net/udp and ss have it; with `netns` and `pid` it tells sockets apart"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "port of the peer; 0 when none is known"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "outbound when the socket sent first, inbound when it received first"),
        FieldInfo("connected", "boolean", "whether the peer is the only one: the socket is connected to it"),
        FieldInfo("closed", "boolean", "whether the socket was closed: its last record"),
        FieldInfo("owner_known", "boolean", "always true: the task is the one that first sent or received"),
        FieldInfo("local_addr", "string", "local address; 0.0.0.0 or :: when it is bound to none"),
        FieldInfo("remote_addr", "string", "address of the peer: of a socket that is not connected, the last one that it sent to; all zero when none is known"),
        *_END_INFO,
    ), ("sockets through which nothing was sent or received", "how many datagrams a single call sent (UDP_SEGMENT) or received (UDP_GRO) at once: it counts as one", "UDP-Lite")),
    "net.dns": KindInfo("net.dns", NetDns, "bulk", "A DNS query of this host was answered, or not; or a response came that nobody had asked for.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("latency_ns", "integer", "time from the first query to the response, or for which a query has been waiting; 0 of an unsolicited response"),
        FieldInfo("netns", "integer", "inode number of the network namespace"),
        FieldInfo("queries", "integer", "how often the query was sent, as seen here: more than once when it was repeated from the same port; 0 of an unsolicited response"),
        FieldInfo("message_bytes", "integer", "bytes of the response, however much of it is looked at; 0 when there was none"),
        FieldInfo("dns_id", "integer", "number of the query, by which the response is known"),
        FieldInfo("local_port", "integer", "local port"),
        FieldInfo("remote_port", "integer", "port of the server"),
        FieldInfo("answers", "array of objects", "records of the answer section, at most 32"),
        FieldInfo("query", "string", "name that was asked for, without the dot at its end; `.` is the root. Its case is kept; what is no printable ASCII is `\\DDD`, in decimal, and special characters have a `\\`"),
        FieldInfo("query_type", "string", "what was asked for, such as A; `TYPE65280` where it has no name here"),
        FieldInfo("query_class", "string", "almost always IN; `CLASS32` where it has no name here"),
        FieldInfo("opcode", "string", "almost always QUERY"),
        FieldInfo("response_code", "string", "such as NOERROR, NXDOMAIN, SERVFAIL; empty where there is no response"),
        FieldInfo("authoritative", "boolean", "whether the server answers for the zone itself (AA)"),
        FieldInfo("response_truncated", "boolean", "whether the server left out what had no room (TC): it is then asked over TCP"),
        FieldInfo("recursion_desired", "boolean", "whether the server was asked to ask others (RD)"),
        FieldInfo("recursion_available", "boolean", "whether it would do that (RA)"),
        FieldInfo("authenticated", "boolean", "whether it says to have checked signatures (AD)"),
        FieldInfo("edns_bytes", "integer", "what the server can take over UDP (EDNS); 0 where it does not say"),
        FieldInfo("answers_left_out", "integer", "records of the answer section that are not in `answers`"),
        FieldInfo("malformed", "string", "the first mistake in the message, in words; empty where there is none"),
        FieldInfo("ip_version", "4 or 6", "4 or 6; an IPv4-mapped address is published as IPv4"),
        FieldInfo("transport", "\"none\" or \"other\" or \"tcp\" or \"udp\"", "udp or tcp"),
        FieldInfo("state", "\"answered\" or \"unanswered\" or \"unsolicited\" or \"unfollowed\"", "answered; unanswered: no response within `dns_timeout_seconds`; unsolicited: a response to no query that is known, or a second one; unfollowed: over TCP, and its connection could not be followed"),
        FieldInfo("owner_known", "boolean", "whether the task is who sent the query; where it is not known, pid is 0"),
        FieldInfo("local_addr", "string", "local address"),
        FieldInfo("remote_addr", "string", "address of the server"),
        *_END_INFO,
    ), ("what a server on this host is asked", "encrypted DNS (over TLS, HTTPS, QUIC)", "queries to other ports than dns_ports", "what is handed on without a socket, as between containers and the network", "the messages of a zone transfer behind the first")),
    "net.flow": KindInfo("net.flow", NetFlow, "bulk", "What passed a network interface between two endpoints, in both directions.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("first_boot_ns", "integer", "when its first packet was seen, nanoseconds since boot"),
        FieldInfo("last_boot_ns", "integer", "when its last packet was seen, nanoseconds since boot"),
        FieldInfo("client_packets", "integer", "packets that the client sent, since the flow's last record"),
        FieldInfo("client_bytes", "integer", "their bytes, with all headers of the frame; without a VLAN tag that the kernel keeps apart"),
        FieldInfo("server_packets", "integer", "packets that the server sent, since the flow's last record"),
        FieldInfo("server_bytes", "integer", "their bytes"),
        FieldInfo("client_packets_total", "integer", "packets that the client sent, of the whole flow"),
        FieldInfo("client_bytes_total", "integer", "their bytes"),
        FieldInfo("server_packets_total", "integer", "packets that the server sent, of the whole flow"),
        FieldInfo("server_bytes_total", "integer", "their bytes"),
        FieldInfo("handshake_ns", "integer", "TCP: time from the first SYN to the ACK of the server's; 0 when they were not seen"),
        FieldInfo("netns", "integer", "inode number of the network namespace of the interface"),
        FieldInfo("ifindex", "integer", "index of the interface"),
        FieldInfo("client_port", "integer", "port of the client; 0 where the protocol has none"),
        FieldInfo("server_port", "integer", "port of the server; 0 where the protocol has none"),
        FieldInfo("vlan_id", "integer from 0 to 4095", "VLAN; 0 without"),
        FieldInfo("inner_vlan_id", "integer from 0 to 4095", "VLAN within the VLAN; 0 without"),
        FieldInfo("client_tcp_flags", "integer", "TCP flags that the client's packets had, ORed"),
        FieldInfo("server_tcp_flags", "integer", "TCP flags that the server's packets had, ORed"),
        FieldInfo("protocol", "integer", "IP protocol: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6"),
        FieldInfo("ip_version", "4 or 6", "4 or 6"),
        FieldInfo("ports_unknown", "boolean", "fragments of which the first was not seen, or packets cut off before their ports: those are 0"),
        FieldInfo("direction", "\"unknown\" or \"outbound\" or \"inbound\"", "how the client's packets pass the interface"),
        FieldInfo("client_by", "\"syn\" or \"packet\" or \"port\"", "how the client is known: it sent the SYN; the first packet that was seen (never of TCP); has the higher port, nothing better is known"),
        FieldInfo("reason", "\"end\" or \"idle\" or \"active\" or \"evicted\" or \"gone\" or \"stop\"", "why it is reported: it has ended; had no packet for long; goes on; had to make way for another in a full table; its interface has gone; the agent stops"),
        FieldInfo("owner_known", "boolean", "whether the task is the owner of the local socket; where it is not known, pid is 0"),
        FieldInfo("interface", "string", "name of the interface"),
        FieldInfo("client_addr", "string", "address of the client"),
        FieldInfo("server_addr", "string", "address of the server"),
        FieldInfo("response_latencies", "array of integers", "how often the server took so long, from the client's last payload to its own first, since the flow's last record: under 1 µs, under 2, under 4, and so on; the last: more"),
        *_END_INFO,
    ), ("packets that are not IP", "packets that other programs at the interface took before", "the owner, of connections from before the agent, of UDP sockets that only receive, and of other protocols")),
    "syscall.slow": KindInfo("syscall.slow", SyscallSlow, "bulk", "A system call took longer than `syscall_slow_ms`. It is told when it returns.", (
        *_BASE_INFO,
        *_TASK_INFO,
        FieldInfo("duration_ns", "integer", "time that the call took, suspend not included"),
        FieldInfo("ret", "integer from -1", "what it returned; -1 when it failed; 0 for what is an address, as of mmap"),
        FieldInfo("errno", "integer from 0 to 4095", "error number; 0 when it succeeded; 4 (EINTR) also when a signal only interrupted it and the kernel makes it anew"),
        FieldInfo("number", "integer", "number of the system call on this machine"),
        FieldInfo("arg0", "integer", "first argument as a signed number of 32 bits, such as a file descriptor or process id; 0 where it does not fit, as an address"),
        FieldInfo("syscall", "string", "its name; `syscall_NNN` for one that this release does not know"),
        *_END_INFO,
    ), ("calls of 32-bit programs on a 64-bit kernel", "calls that have not returned", "work done through io_uring")),
}
"""What each kind is, for people."""
