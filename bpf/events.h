/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The contract: every record that a BPF program writes and the reader reads.
 *
 * `make gen` reads these structs from the compiled objects' BTF and derives from them the
 * Python Structs, the decoder's layout table, schemas/ and docs/events.md.
 *
 *   enum event_kind    KIND_PROCESS_EXEC is published as `process.exec`. Never reuse a number.
 *   struct             one per kind, named after it: `struct process_exec`. It begins with `base`,
 *                      and then `task` if its events have a task. Its RING says what it travels in.
 *   UNSEEN("A|B")      on a struct: what is never observed of its kind, whatever the kernel.
 *   DOC("...")         what the field (or kind) means, with units.
 *   RANGE("A..B")      its values, where they are fewer than the C type has; -1.. has no end
 *   AMONG("A,B,...")   the same, as a list
 *   OPTIONAL           left out by releases before the one that brought it: every field that is
 *                      added to a kind after its release
 *   AS("...")          how the field is published, where a plain integer is not it:
 *     hidden           not published
 *     bool             true or false
 *     cstr             char[N], ends at the first NUL
 *     ns               a duration in nanoseconds
 *     moment           ns since boot, when something happened
 *     start            ns since boot, when a process started: with its pid, who it is
 *     boottime         the same, published as ns since the epoch
 *     serial           a number that seldom repeats
 *     counts           array of u32, published as an array
 *     ip:FIELD         16 bytes of address, of the IP version that FIELD says (4: the first 4)
 *     names:A,B,...    an index, published as the string at that place
 *     str:NAME         bytes of string NAME in `data`
 *     argv:NAME,LINE   bytes of NUL-terminated strings in `data`, published as the array NAME
 *                      and, joined by spaces, as the string LINE: of that the first 4096 bytes
 *     parsed:WHAT,NAME bytes in `data` that WHAT of streamer/events/parsed.py makes several fields
 *                      of, which are documented there; in `truncated` they are NAME
 *
 * Strings in `data` follow one another in the order of the fields that give their lengths; there
 * are at most eight, and bit n of `cut` in the base says that the n-th is not whole. A record with
 * `data` ends where the last string ends, so its size varies.
 * Padding is explicit (`pad…`, hidden) and no struct is packed: every byte has a name.
 *
 * How programs and maps say what they need: see `bpf/core/tags.h`.
 */
#ifndef STREAMER_EVENTS_H
#define STREAMER_EVENTS_H

#define DOC(text) __attribute__((btf_decl_tag("doc:" text)))
#define AS(text) __attribute__((btf_decl_tag("as:" text)))
#define RING(name) __attribute__((btf_decl_tag("ring:" name)))
#define RANGE(text) __attribute__((btf_decl_tag("range:" text)))
#define AMONG(text) __attribute__((btf_decl_tag("among:" text)))
#define OPTIONAL __attribute__((btf_decl_tag("optional:")))
#define UNSEEN(what) __attribute__((btf_decl_tag("unseen:" what)))
#define HIDDEN AS("hidden")

/* What Linux has at most, on any machine: PID_MAX_LIMIT and MAX_ERRNO. */
#define PID RANGE("0..4194304")
#define ERRNO RANGE("0..4095")

#define COMM_LEN 16
#define CALL_NAME_LEN 32
#define PATH_LEN 4096
#define ARGV_LEN 16384
#define INTERFACE_LEN 16 /* IFNAMSIZ */
#define REASON_LEN 32
#define DNS_QUERY_LEN 272 /* a header, and a question with a name of 255 bytes, rounded up */
#define DNS_MESSAGE_LEN 4096

/* In the order of enum packet_transport in core/tables.h. */
#define TRANSPORT_NAMES \
	"names:none,other,tcp,udp,icmp,icmpv6,igmp,sctp,gre,esp,ah,ipv4,ipv6,ospf,pim,vrrp"
#define LATENCIES 24

/* Raised when a field changes its meaning. New fields and kinds do not raise it. */
enum event_schema {
	SCHEMA_VERSION = 3,
};

enum event_kind {
	KIND_PROCESS_EXEC = 1,
	KIND_PROCESS_FORK = 2,
	KIND_PROCESS_EXIT = 3,
	KIND_FILE_OPEN = 16,
	KIND_NET_CONNECT = 32,
	KIND_NET_ACCEPT = 33,
	KIND_NET_CLOSE = 34,
	KIND_NET_LISTEN = 35,
	KIND_NET_BIND = 36,
	KIND_NET_RETRANSMIT = 37,
	KIND_NET_DROP = 38,
	KIND_NET_UDP = 39,
	KIND_NET_DNS = 40,
	KIND_NET_FLOW = 41,
	KIND_SYSCALL_SLOW = 50,
	KIND_END = 64, /* more than the largest, of summaries too */
};

/* Summaries, which the agent makes of what programs count (core/tables.h): the Structs are in
 * streamer/events/summaries.py. SUMMARY_XDP_COUNTERS is published as `xdp.counters`; the numbers
 * are of one row with those above. */
enum summary_kind {
	SUMMARY_XDP_COUNTERS = 48,
	SUMMARY_SYSCALL_LATENCY = 49,
	SUMMARY_PROFILE_SAMPLE = 51,
};

/* A ring, its sequence and its drop counters. */
enum event_ring {
	RING_CRITICAL = 0,
	RING_BULK = 1,
	RING_END = 2,
};

/* FLAG_INCOMPLETE is published with every event as `incomplete`. */
enum event_flags {
	FLAG_INCOMPLETE = 1, /* a read in the kernel failed: a field is 0 or empty that need not be */
};

enum net_direction {
	DIRECTION_UNKNOWN = 0,
	DIRECTION_OUTBOUND = 1,
	DIRECTION_INBOUND = 2,
};

/* How it was found out which end of a flow is the client. */
enum flow_client {
	CLIENT_BY_SYN = 0,
	CLIENT_BY_PACKET = 1,
	CLIENT_BY_PORT = 2,
};

/* Why a flow is reported. */
enum flow_reason {
	FLOW_END = 0,
	FLOW_IDLE = 1,
	FLOW_ACTIVE = 2,
	FLOW_EVICTED = 3,
	FLOW_GONE = 4,
	FLOW_STOP = 5,
};

/* What every record begins with. */
struct event_base {
	__u64 boot_ns AS("moment") DOC("nanoseconds since boot, suspend included, when the event happened");
	__u64 seq AS("serial") RANGE("1..") DOC("sequence number in this ring on this CPU; a missing number is a lost event");
	__u32 size HIDDEN DOC("bytes of this record");
	__u32 weight RANGE("1..1048576") DOC("how many events this one stands for: more than 1 when its kind is sampled");
	__u16 kind HIDDEN DOC("enum event_kind");
	__u16 cpu DOC("CPU that wrote the record");
	__u8 skipped HIDDEN DOC("sequence numbers given up just before `seq`: not losses");
	__u8 ring HIDDEN DOC("enum event_ring");
	__u8 cut HIDDEN DOC("bit per string in `data`: it was cut, or could not be read to its end");
	__u8 flags HIDDEN DOC("enum event_flags, ORed");
};

/* Who, in records that have a task. Process ids are reused: start and pid together are not. */
struct event_task {
	__u64 start_boot_ns AS("start") DOC("when the process started, nanoseconds since boot: with `pid`, identifies it");
	__u64 cgroup_id DOC("id of the task's cgroup in the unified (v2) hierarchy");
	__u32 pid PID DOC("process id (thread group id) in the initial pid namespace");
	__u32 tid PID DOC("thread id in the initial pid namespace");
	__u32 ppid PID DOC("process id of the parent");
	__u32 uid DOC("real user id");
	__u32 gid DOC("real group id");
	__u32 pidns DOC("inode number of the process's pid namespace");
	__u32 ns_pid PID DOC("process id in that namespace");
	__u32 pad HIDDEN;
	char comm[COMM_LEN] AS("cstr") DOC("name of the task, at most 15 bytes");
};

struct process_exec {
	struct event_base base;
	struct event_task task;
	__u64 start_time_ns AS("boottime") DOC("when the process started, ns since the epoch");
	__u64 exe_inode DOC("inode number of the file that runs");
	__u32 exe_dev DOC("device of its file system, as stat() gives it");
	__u32 exe_nlink DOC("hard links to it; 0 when it is deleted");
	__u32 exe_mntns DOC("inode number of the mount namespace that `exe` is a path in; 0 when its mount is in none");
	__u32 cwd_mntns DOC("the same of `cwd`");
	__u32 parent_exe_mntns DOC("the same of `parent_exe`");
	__u32 euid DOC("effective user id after the exec");
	__u32 auid DOC("audit (login) user id; 4294967295 when none was set");
	__u32 argc DOC("number of arguments, also when `argv` was cut: to 16384 bytes, or fewer when the ring fills up");
	__u16 exe_len AS("str:exe") DOC("absolute path of the file that runs: the interpreter, for a script");
	__u16 argv_len AS("argv:argv,cmdline") DOC("the arguments|the arguments joined by single spaces, as far as their first 4096 bytes go: `truncated` names it then, and `argv` has the rest");
	__u16 cwd_len AS("str:cwd") DOC("working directory");
	__u16 parent_exe_len AS("str:parent_exe") DOC("absolute path of the parent's executable; empty for a kernel thread");
	__u16 filename_len AS("str:filename") DOC("path that was asked to be executed, as given: the script, for a script");
	__u16 interp_len AS("str:interp") DOC("path of the interpreter that the script names, as given; empty for what is no script");
	__u8 exe_mntns_initial AS("bool") DOC("whether `exe_mntns` is the initial mount namespace");
	__u8 cwd_mntns_initial AS("bool") DOC("whether `cwd_mntns` is");
	__u8 parent_exe_mntns_initial AS("bool") DOC("whether `parent_exe_mntns` is");
	__u8 exe_deleted AS("bool") DOC("whether the file that runs has been deleted: `exe` is where it was");
	__u8 exe_memfd AS("bool") DOC("whether it is a memory file, in no directory at all");
	__u8 pad[7] HIDDEN;
	char parent_comm[COMM_LEN] AS("cstr") DOC("name of the parent");
	__u8 data[5 * PATH_LEN + ARGV_LEN] HIDDEN;
} RING("critical") DOC("A process executed a new program.");

struct process_fork {
	struct event_base base;
	struct event_task task;
	__u64 child_start_boot_ns AS("start") DOC("when the child started, nanoseconds since boot");
	__u64 child_start_time_ns AS("boottime") DOC("the same, ns since the epoch");
	__u32 child_pid PID DOC("process id of the child");
	__u32 child_ppid PID DOC("process id of its parent: `ppid` and not `pid` after a clone with CLONE_PARENT");
	__u32 child_pidns DOC("inode number of the child's pid namespace");
	__u32 child_ns_pid PID DOC("process id of the child in that namespace");
} RING("critical") DOC("A process created a child process (new threads are not reported). `pid` is who did it.");

struct process_exit {
	struct event_base base;
	struct event_task task;
	__u64 start_time_ns AS("boottime") DOC("when the process started, ns since the epoch");
	__u64 duration_ns AS("ns") DOC("how long the process lived");
	__u32 exit_code RANGE("0..255") DOC("argument of exit(), 0 to 255; 0 when a signal ended the process");
	__u32 signal RANGE("0..127") DOC("signal that ended the process; 0 when it exited");
	__u8 core_dumped AS("bool") DOC("whether a core was dumped");
	__u8 pad[7] HIDDEN;
} RING("critical") DOC("The last thread of a process ended.");

struct file_open {
	struct event_base base;
	struct event_task task;
	__u64 latency_ns AS("ns") DOC("time the system call took; 0 unless `open_latency` is configured, which needs Linux 5.12 and BTF of the kernel's own");
	__u64 inode DOC("inode number of the file; 0 when the open failed");
	__u32 dev DOC("device of its file system, as stat() gives it; 0 when the open failed");
	__s32 fd RANGE("-1..") DOC("file descriptor; -1 when the open failed");
	__u32 errno ERRNO DOC("error number; 0 when the open succeeded");
	__u32 flags DOC("open flags as passed (O_*)");
	__u32 mode DOC("permissions asked for a new file; 0 when none could be created");
	__u32 mntns DOC("inode number of the mount namespace that `path` is a path in; 0 when its mount is in none");
	__u16 path_len AS("str:path") DOC("absolute path: as opened, symbolic links resolved; of a failed open, or of a file that is in no directory, as asked, behind cwd or dirfd");
	__u8 mntns_initial AS("bool") DOC("whether `mntns` is the initial mount namespace");
	__u8 pad[5] HIDDEN;
	__u8 data[2 * PATH_LEN] HIDDEN;
} RING("bulk") DOC("A call of open, creat, openat or openat2 returned.")
UNSEEN("opens through io_uring|system calls of 32-bit programs on a 64-bit kernel|open_by_handle_at");

struct net_connect {
	struct event_base base;
	struct event_task task;
	__u64 latency_ns AS("ns") DOC("time from the SYN to the result; 0 when no SYN was sent, or the SYN or the result was not seen");
	__u32 errno ERRNO DOC("error number, such as 111 (ECONNREFUSED); 0 when connected");
	__u32 netns DOC("inode number of the network namespace");
	__u16 local_port DOC("local port; 0 when none was bound");
	__u16 remote_port DOC("remote port");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("always outbound");
	__u8 owner_known AS("bool") DOC("whether the task is the owner of the socket; where it is not known, pid is 0");
	__u8 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("remote address");
} RING("bulk") DOC("An outbound TCP connection was established or failed.")
UNSEEN("connects through io_uring or by 32-bit programs that fail before a SYN is sent");

struct net_accept {
	struct event_base base;
	struct event_task task;
	__u32 fd RANGE("0..2147483647") DOC("file descriptor of the accepted connection");
	__u32 netns DOC("inode number of the network namespace");
	__u16 local_port DOC("local port");
	__u16 remote_port DOC("remote port");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("always inbound");
	__u8 owner_known AS("bool") DOC("always true: the task is the one that accepted");
	__u8 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("remote address");
} RING("bulk") DOC("A process accepted an inbound TCP connection.")
UNSEEN("accepts through io_uring or by 32-bit programs");

struct net_close {
	struct event_base base;
	struct event_task task;
	__u64 duration_ns AS("ns") DOC("time from established to closed; 0 when it was established before the agent started, or nobody saw it being established");
	__u64 bytes_sent DOC("payload bytes sent, retransmissions not counted twice");
	__u64 bytes_received DOC("payload bytes received in order");
	__u32 errno ERRNO DOC("error pending on the socket, such as 104 (ECONNRESET); 0 for an orderly close");
	__u32 netns DOC("inode number of the network namespace");
	__u16 local_port DOC("local port");
	__u16 remote_port DOC("remote port");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("who opened it; unknown when established before the agent started");
	__u8 owner_known AS("bool") DOC("whether the task is the owner of the socket; where it is not known, pid is 0");
	__u8 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("remote address");
} RING("bulk") DOC("An established TCP connection ended.");

struct net_listen {
	struct event_base base;
	struct event_task task;
	__u32 errno ERRNO DOC("error number, such as 98 (EADDRINUSE); 0 when it listens");
	__u32 netns DOC("inode number of the network namespace");
	__s32 backlog_asked RANGE("-2147483648..") DOC("connections that may wait to be accepted, as asked");
	__u32 backlog DOC("the same, as the kernel grants it (net.core.somaxconn); 0 when it failed");
	__u16 local_port DOC("local port; 0 when there is none");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 reuse_port AS("bool") DOC("whether others may listen at the same port (SO_REUSEPORT)");
	__u32 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address; 0.0.0.0 or :: for all of them");
} RING("bulk") DOC("A process called listen() for a TCP socket.")
UNSEEN("listens through io_uring, by 32-bit programs or by the kernel itself");

struct net_bind {
	struct event_base base;
	struct event_task task;
	__u32 errno ERRNO DOC("error number, such as 98 (EADDRINUSE) or 13 (EACCES); 0 when it succeeded");
	__u32 netns DOC("inode number of the network namespace");
	__u16 asked_port DOC("port that was asked for; 0 for any");
	__u16 local_port DOC("port that the socket got; 0 when it failed");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 transport AS("names:none,other,tcp,udp") DOC("protocol of the socket: tcp or udp");
	__u8 reuse_port AS("bool") DOC("whether others may bind to the same port (SO_REUSEPORT)");
	__u8 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("address that was bound, or asked for when it failed; 0.0.0.0 or :: for all of them");
} RING("bulk") DOC("A process called bind() for a TCP or UDP socket.")
UNSEEN("binds through io_uring, by 32-bit programs or by the kernel itself|ports that a socket is given by connecting or sending|sockets of other protocols");

struct net_retransmit {
	struct event_base base;
	struct event_task task;
	__u32 segments DOC("TCP segments that were sent again");
	__u32 bytes DOC("payload bytes in them");
	__u32 netns DOC("inode number of the network namespace");
	__u16 local_port DOC("local port");
	__u16 remote_port DOC("remote port");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 state AS("names:unknown,established,syn_sent,syn_recv,fin_wait1,fin_wait2,time_wait,close,close_wait,last_ack,listen,closing,new_syn_recv") DOC("state of the connection");
	__u8 congestion AS("names:open,disorder,cwr,recovery,loss") DOC("what the sender takes it for: recovery after duplicate ACKs, loss after a timeout");
	__u8 content AS("names:data,syn,syn_ack,fin") DOC("what was sent again");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("who opened the connection; unknown when nobody saw it");
	__u8 owner_known AS("bool") DOC("whether the task is the owner of the socket; where it is not known, pid is 0");
	__u16 pad HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("remote address");
} RING("bulk") DOC("TCP sent a segment again.")
UNSEEN("retransmissions that this host itself could not send");

struct net_drop {
	struct event_base base;
	__u32 reason_code DOC("number of the reason in this kernel; 0 when it gives none");
	__u32 length DOC("bytes of the packet, headers included as far as it still had them");
	__u32 netns DOC("inode number of the network namespace; 0 when the packet was in none that could be told");
	__u32 ifindex DOC("index of the interface that it came in at or was to leave by; 0 when there is none");
	__u16 source_port DOC("source port; 0 where there is none");
	__u16 destination_port DOC("destination port; 0 where there is none");
	__u8 ip_version AMONG("4,6") DOC("4 or 6");
	__u8 transport AS(TRANSPORT_NAMES) DOC("protocol above IP; none when the header could not be read; other too behind IPv6 extension headers");
	__u16 pad HIDDEN;
	char reason[REASON_LEN] AS("cstr") DOC("why it was dropped, by the name that this kernel has for it, such as NO_SOCKET; empty when it gives none");
	char interface[INTERFACE_LEN] AS("cstr") DOC("name of that interface");
	__u8 source_addr[16] AS("ip:ip_version") DOC("source address; all zero when the header could not be read");
	__u8 destination_addr[16] AS("ip:ip_version") DOC("destination address; likewise");
} RING("bulk") DOC("The kernel dropped an IP packet. `weight` counts those of the same reason and CPU that came before it and were too many to be reported.")
UNSEEN("packets that hardware or driver drop|packets that XDP drops|packets that are not IP|from 5.17 on, packets that the kernel freed without saying why, unless unspecified_drops is set");

struct net_udp {
	struct event_base base;
	struct event_task task;
	__u64 duration_ns AS("ns") DOC("how long the socket has been in use: since the first datagram that was seen");
	__u64 datagrams_sent DOC("sends that succeeded, in all that time");
	__u64 bytes_sent DOC("payload bytes in them");
	__u64 datagrams_received DOC("receives that succeeded, in all that time; looking ahead (MSG_PEEK) is none");
	__u64 bytes_received DOC("payload bytes that they gave");
	__u64 send_errors DOC("sends that failed");
	__u64 drops DOC("datagrams for the socket that were dropped, for want of room or for a wrong checksum, since it was made");
	__u32 inode DOC("inode number of the socket, as /proc/PID/fd, /proc/net/udp and ss have it; with `netns` and `pid` it tells sockets apart");
	__u32 netns DOC("inode number of the network namespace");
	__u16 local_port DOC("local port");
	__u16 remote_port DOC("port of the peer; 0 when none is known");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("outbound when the socket sent first, inbound when it received first");
	__u8 connected AS("bool") DOC("whether the peer is the only one: the socket is connected to it");
	__u8 closed AS("bool") DOC("whether the socket was closed: its last record");
	__u8 owner_known AS("bool") DOC("always true: the task is the one that first sent or received");
	__u8 pad[7] HIDDEN;
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address; 0.0.0.0 or :: when it is bound to none");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("address of the peer: of a socket that is not connected, the last one that it sent to; all zero when none is known");
} RING("bulk") DOC("What went through a UDP socket, when it is closed, and while it is in use every `udp_seconds`. All counts are totals.")
UNSEEN("sockets through which nothing was sent or received|how many datagrams a single call sent (UDP_SEGMENT) or received (UDP_GRO) at once: it counts as one|UDP-Lite");

struct net_dns {
	struct event_base base;
	struct event_task task;
	__u64 latency_ns AS("ns") DOC("time from the first query to the response, or for which a query has been waiting; 0 of an unsolicited response");
	__u32 netns DOC("inode number of the network namespace");
	__u32 queries DOC("how often the query was sent, as seen here: more than once when it was repeated from the same port; 0 of an unsolicited response");
	__u32 message_bytes DOC("bytes of the response, however much of it is looked at; 0 when there was none");
	__u16 dns_id DOC("number of the query, by which the response is known");
	__u16 local_port DOC("local port");
	__u16 remote_port DOC("port of the server");
	__u16 message_len AS("parsed:dns,answers") DOC("query and response");
	__u8 ip_version AMONG("4,6") DOC("4 or 6; an IPv4-mapped address is published as IPv4");
	__u8 transport AS("names:none,other,tcp,udp") DOC("udp or tcp");
	__u8 state AS("names:answered,unanswered,unsolicited,unfollowed") DOC("answered; unanswered: no response within `dns_timeout_seconds`; unsolicited: a response to no query that is known, or a second one; unfollowed: over TCP, and its connection could not be followed");
	__u8 owner_known AS("bool") DOC("whether the task is who sent the query; where it is not known, pid is 0");
	__u8 local_addr[16] AS("ip:ip_version") DOC("local address");
	__u8 remote_addr[16] AS("ip:ip_version") DOC("address of the server");
	__u8 data[8 + DNS_QUERY_LEN + DNS_MESSAGE_LEN] HIDDEN;
} RING("bulk") DOC("A DNS query of this host was answered, or not; or a response came that nobody had asked for.")
UNSEEN("what a server on this host is asked|encrypted DNS (over TLS, HTTPS, QUIC)|queries to other ports than dns_ports|what is handed on without a socket, as between containers and the network|the messages of a zone transfer behind the first");

struct net_flow {
	struct event_base base;
	struct event_task task;
	__u64 first_boot_ns AS("moment") DOC("when its first packet was seen, nanoseconds since boot");
	__u64 last_boot_ns AS("moment") DOC("when its last packet was seen, nanoseconds since boot");
	__u64 client_packets DOC("packets that the client sent, since the flow's last record");
	__u64 client_bytes DOC("their bytes, with all headers of the frame; without a VLAN tag that the kernel keeps apart");
	__u64 server_packets DOC("packets that the server sent, since the flow's last record");
	__u64 server_bytes DOC("their bytes");
	__u64 client_packets_total DOC("packets that the client sent, of the whole flow");
	__u64 client_bytes_total DOC("their bytes");
	__u64 server_packets_total DOC("packets that the server sent, of the whole flow");
	__u64 server_bytes_total DOC("their bytes");
	__u64 handshake_ns AS("ns") DOC("TCP: time from the first SYN to the ACK of the server's; 0 when they were not seen");
	__u32 netns DOC("inode number of the network namespace of the interface");
	__u32 ifindex DOC("index of the interface");
	__u16 client_port DOC("port of the client; 0 where the protocol has none");
	__u16 server_port DOC("port of the server; 0 where the protocol has none");
	__u16 vlan_id RANGE("0..4095") DOC("VLAN; 0 without");
	__u16 inner_vlan_id RANGE("0..4095") DOC("VLAN within the VLAN; 0 without");
	__u8 client_tcp_flags DOC("TCP flags that the client's packets had, ORed");
	__u8 server_tcp_flags DOC("TCP flags that the server's packets had, ORed");
	__u8 protocol DOC("IP protocol: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6");
	__u8 ip_version AMONG("4,6") DOC("4 or 6");
	__u8 ports_unknown AS("bool") DOC("fragments of which the first was not seen, or packets cut off before their ports: those are 0");
	__u8 direction AS("names:unknown,outbound,inbound") DOC("how the client's packets pass the interface");
	__u8 client_by AS("names:syn,packet,port") DOC("how the client is known: it sent the SYN; the first packet that was seen (never of TCP); has the higher port, nothing better is known");
	__u8 reason AS("names:end,idle,active,evicted,gone,stop") DOC("why it is reported: it has ended; had no packet for long; goes on; had to make way for another in a full table; its interface has gone; the agent stops");
	__u8 owner_known AS("bool") DOC("whether the task is the owner of the local socket; where it is not known, pid is 0");
	__u8 pad[7] HIDDEN;
	char interface[INTERFACE_LEN] AS("cstr") DOC("name of the interface");
	__u8 client_addr[16] AS("ip:ip_version") DOC("address of the client");
	__u8 server_addr[16] AS("ip:ip_version") DOC("address of the server");
	__u32 response_latencies[LATENCIES] AS("counts") DOC("how often the server took so long, from the client's last payload to its own first, since the flow's last record: under 1 µs, under 2, under 4, and so on; the last: more");
} RING("bulk") DOC("What passed a network interface between two endpoints, in both directions.")
UNSEEN("packets that are not IP|packets that other programs at the interface took before|the owner, of connections from before the agent, of UDP sockets that only receive, and of other protocols");

struct syscall_slow {
	struct event_base base;
	struct event_task task;
	__u64 duration_ns AS("ns") DOC("time that the call took, suspend not included");
	__s64 ret RANGE("-1..") DOC("what it returned; -1 when it failed; 0 for what is an address, as of mmap");
	__u32 errno ERRNO DOC("error number; 0 when it succeeded; 4 (EINTR) also when a signal only interrupted it and the kernel makes it anew");
	__u32 number DOC("number of the system call on this machine");
	__s32 arg0 DOC("first argument as a signed number of 32 bits, such as a file descriptor or process id; 0 where it does not fit, as an address");
	__u32 pad HIDDEN;
	char syscall[CALL_NAME_LEN] AS("cstr") DOC("its name; `syscall_NNN` for one that this release does not know");
} RING("bulk") DOC("A system call took longer than `syscall_slow_ms`. It is told when it returns.")
UNSEEN("calls of 32-bit programs on a 64-bit kernel|calls that have not returned|work done through io_uring");

/* Every record: what is not named here is not in the objects' BTF. */
union event_record {
	struct event_base base;
	struct event_task task;
	struct process_exec process_exec;
	struct process_fork process_fork;
	struct process_exit process_exit;
	struct file_open file_open;
	struct net_connect net_connect;
	struct net_accept net_accept;
	struct net_close net_close;
	struct net_listen net_listen;
	struct net_bind net_bind;
	struct net_retransmit net_retransmit;
	struct net_drop net_drop;
	struct net_udp net_udp;
	struct net_dns net_dns;
	struct syscall_slow syscall_slow;
	struct net_flow net_flow;
};

#endif
