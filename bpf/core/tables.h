/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What programs count in for the agent, which makes summaries of it from time to time: see
 * streamer/summaries/. Names of classes are published in lower case, without their prefix.
 */
#ifndef STREAMER_TABLES_H
#define STREAMER_TABLES_H

#include <linux/types.h>

/* ---------------------------------------------------------------- xdp.counters */

enum packet_vlan {
	VLAN_NONE = 0,
	VLAN_SINGLE = 1,
	VLAN_DOUBLE = 2,
	VLAN_MORE = 3, /* more tags than are looked behind */
	VLAN_END = 4,
};

enum packet_network {
	NETWORK_OTHER = 0,
	NETWORK_IPV4 = 1,
	NETWORK_IPV6 = 2,
	NETWORK_ARP = 3,
	NETWORK_END = 4,
};

enum packet_transport {
	TRANSPORT_NONE = 0, /* no IP packet, or not known: a later fragment, a header that is cut */
	TRANSPORT_OTHER = 1,
	TRANSPORT_TCP = 2,
	TRANSPORT_UDP = 3,
	TRANSPORT_ICMP = 4,
	TRANSPORT_ICMPV6 = 5,
	TRANSPORT_IGMP = 6,
	TRANSPORT_SCTP = 7,
	TRANSPORT_GRE = 8,
	TRANSPORT_ESP = 9,
	TRANSPORT_AH = 10,
	TRANSPORT_IPV4 = 11, /* within IP */
	TRANSPORT_IPV6 = 12,
	TRANSPORT_OSPF = 13,
	TRANSPORT_PIM = 14,
	TRANSPORT_VRRP = 15,
	TRANSPORT_END = 16,
};

/* Of the lower port: as a rule the service's. */
enum packet_ports {
	PORTS_NONE = 0,
	PORTS_SYSTEM = 1,  /* 0 to 1023 */
	PORTS_USER = 2,    /* to 49151 */
	PORTS_DYNAMIC = 3, /* the rest */
	PORTS_END = 4,
};

enum packet_verdict {
	PACKET_WHOLE = 0,
	PACKET_FIRST_FRAGMENT = 1,
	PACKET_LATER_FRAGMENT = 2,
	PACKET_TRUNCATED = 3,  /* it ends before its headers do, or before it says */
	PACKET_MALFORMED = 4,  /* a header contradicts itself */
	PACKET_EXTENSIONS = 5, /* more IPv6 extension headers than are looked behind */
	PACKET_END = 8,
};

#define PACKET_CLASSES \
	(VLAN_END * NETWORK_END * TRANSPORT_END * PORTS_END * PACKET_END)

struct packet_count {
	__u64 packets;
	__u64 bytes;
};

/* Of one interface on one CPU, by class. */
struct packet_counts {
	struct packet_count by_class[PACKET_CLASSES];
};

/* ---------------------------------------------------------------- syscall.latency */

enum syscall_limits {
	SYSCALL_NUMBERS = 512, /* with an entry of their own; the last is for all above */
	SYSCALL_BUCKETS = 56,
};

enum syscall_flags {
	SYSCALL_SLOW_TOLD = 1,       /* a slow one is reported */
	SYSCALL_GIVES_ADDRESS = 2,   /* its result is nobody's business */
	SYSCALL_RESULT_UNKNOWN = 4,  /* what it seems to return is another call's */
};

/* Written by the agent, an entry for each number. */
struct syscall_place {
	__u32 counts; /* where its counts begin, by CPU, in a table: one more than that; 0: not wanted */
	__u32 flags;  /* enum syscall_flags, ORed */
	char name[CALL_NAME_LEN];
};

/* Written by the agent, but for the last. */
struct syscall_settings {
	__u64 period;  /* the number of the period that calls are counted in now */
	__u64 slow_ns; /* from which duration on a call is reported */
	__u64 cgroup_entries; /* that programs have made, ever */
};

/* The longest of a period. There are two, so that one can be read while calls of the next period
 * are counted in the other. */
struct syscall_longest {
	__u64 period;
	__u64 ns;
};

/* Of one call on one CPU, or of one in a cgroup. */
struct syscall_counts {
	__u64 count;
	__u64 errors;
	__u64 total_ns;
	__u64 missed; /* began, and did not end as far as could be seen */
	struct syscall_longest longest[2];
	__u64 buckets[SYSCALL_BUCKETS]; /* by the highest bit of the duration in ns */
};

struct syscall_cgroup_key {
	__u64 cgroup_id;
	__u32 place; /* as of a number, or the last for all above */
	__u32 pad;
};

struct syscall_cgroup_counts {
	__u64 since; /* ns since boot; tells an entry from an earlier one of the same key */
	struct syscall_counts counts;
};

/* ---------------------------------------------------------------- profile.sample */

#define PROFILE_SETS 2
#define PROFILE_DEPTH 127
#define PROFILE_NO_STACK (-1)   /* there is none: of a kernel thread, or of the kernel in user mode */
#define PROFILE_LOST_STACK (-2) /* there is one, and it could not be kept */
#define PROFILE_COLLIDED (1 << 24) /* added to places in the table of those that collided */

/* Mapped: what the agent tells the program. */
struct profile_settings {
	__u64 active; /* the set of tables to fill */
};

/* Of one set, as long as the agent runs: taken = idle + filtered + lost + those in the tables.
 * Samples of the agent itself are none. */
struct profile_set {
	__u64 begun;
	__u64 ended;
	__u64 taken;
	__u64 idle;     /* nothing ran */
	__u64 filtered; /* kept back by a filter */
	__u64 lost;     /* the table was full */
	__u64 pad[2];
};

/* Of one CPU. */
struct profile_counts {
	struct profile_set sets[PROFILE_SETS];
};

/* What samples are counted by. The argument area of a process is elsewhere after each exec: with it,
 * what was sampled before one is not taken for what runs now. */
struct profile_key {
	__u64 start_boot_ns;
	__u64 cgroup_id;
	__u64 image;        /* address of the arguments */
	__u32 pid;
	__s32 kernel_stack; /* its place in the table, or one of those above; likewise the next */
	__s32 user_stack;
	__u32 user_mode;    /* whether it ran in user mode */
	char comm[16];
};

/* Addresses from the innermost on, ended by 0. */
struct profile_stack {
	__u64 at[PROFILE_DEPTH];
};

/* Names what is not a map's value, so that it is in the objects' BTF. */
union table {
	struct packet_count packet_count;
	struct packet_counts packet_counts;
	struct syscall_place syscall_place;
	struct syscall_settings syscall_settings;
	struct syscall_longest syscall_longest;
	struct syscall_counts syscall_counts;
	struct syscall_cgroup_key syscall_cgroup_key;
	struct syscall_cgroup_counts syscall_cgroup_counts;
	enum syscall_flags syscall_flags;
	enum syscall_limits syscall_limits;
	struct profile_settings profile_settings;
	struct profile_set profile_set;
	struct profile_counts profile_counts;
	struct profile_key profile_key;
	struct profile_stack profile_stack;
	enum packet_vlan vlan;
	enum packet_network network;
	enum packet_transport transport;
	enum packet_ports ports;
	enum packet_verdict verdict;
};

#endif
