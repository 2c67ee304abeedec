/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the agent tells the programs while they run, and the counters that they keep for it. */
#ifndef STREAMER_SETTINGS_H
#define STREAMER_SETTINGS_H

#include "events.h"

/* How a filter list is used. */
enum filter_mode {
	FILTER_OFF = 0,
	FILTER_EXCLUDE = 1, /* keep what is not listed */
	FILTER_INCLUDE = 2, /* keep only what is listed with VERDICT_KEEP */
};

enum filter_verdict {
	VERDICT_KEEP = 1,
	VERDICT_DROP = 2,
};

#define AGENT_PIDS 2
#define MOST_FURTHER_WORKERS 15
#define MOST_INTERFACES 64

#define GENERATIONS 2

/* How the lists of one generation of filters are used: enum filter_mode each. */
struct filter_modes {
	__u8 pid;
	__u8 uid;
	__u8 comm;
	__u8 cgroup;
	__u8 exe;
	__u8 task; /* whether any of those above is on */
	__u8 port;
	__u8 path;
};

/*
 * Mapped by the agent, which may change it at any time.
 *
 * Of filters there are two generations: one in force, and one that the agent may prepare meanwhile. Entries
 * of their maps have the generation in their keys. A program looks once which it is to use, so that no
 * event is judged by a part of each.
 */
struct settings {
	__u64 wakeup_bytes[RING_END]; /* wake the reader when a ring comes to hold this much */
	__u64 generation;             /* of the filters that are in force */
	struct filter_modes filters[GENERATIONS];
};

#define PRESSURE_LEVELS 4 /* a power of two */

/* Mapped by the agent, an entry for each kind. */
struct kind_settings {
	__u32 enabled;
	__u32 pad;
	__u32 rates[PRESSURE_LEVELS]; /* at each level of pressure, report one in so many; 0 and 1: all */
};

/* Written by the program `learn_pids` before anything is attached. */
struct identity {
	__u32 agent_pids[AGENT_PIDS]; /* of both processes of the agent, as the hooks see them */
	__u32 initial_mntns;          /* inode number of the mount namespace of the host's init */
	__u32 further_workers;        /* how many read beside the agent's first process */
	__u32 worker_pids[MOST_FURTHER_WORKERS];
	__u32 pad;
};

/* produced = filtered + shed + lost + submitted. Mapped read-only, one per kind and CPU. */
struct kind_counters {
	__u64 produced; /* events that happened, the agent's own not among them */
	__u64 filtered; /* kept back by a filter */
	__u64 shed;     /* kept back by sampling */
	__u64 lost;     /* no room in the ring, or in a table that the event needs */
};

/* Mapped read-only, one per CPU, a cache line each. */
struct cpu_counters {
	__u64 seq[RING_END];     /* last sequence number taken */
	__u64 skipped[RING_END]; /* sequence numbers given up unused */
	__u64 pad[4];
};

/* What went wrong apart from events whose numbers are missing; counted, mapped read-only. */
enum fault {
	FAULT_CONNECTIONS_FULL = 0,  /* the owner of a connection could not be kept: its table is full */
	FAULT_SOCKET_STORAGE = 1,    /* a socket had no room for its owner, who went into that table */
	FAULT_LISTENERS_FULL = 2,    /* who listens could not be kept */
	FAULT_AGENT_PEERS_FULL = 3,  /* a connection of the agent's own could not be kept */
	FAULT_EXITED_FULL = 4,       /* an exit could not be remembered: it may be told twice */
	FAULT_FAILED_FULL = 5,       /* a failed connect could not be remembered: likewise */
	FAULT_OPEN_STARTS_FULL = 6,  /* the start of an open could not be kept: its latency is 0 */
	FAULT_UNREADABLE = 7,        /* memory could not be read: the event says `incomplete` */
	FAULT_NO_SLOT = 8,           /* a CPU or kind without counters: an event is lost uncounted */
	FAULT_CHANGE_UNSEEN = 9,     /* no program saw a change of a socket's state: what it meant was told
				      * late, or not at all */
	FAULT_SYSCALL_STARTS_FULL = 10,  /* the start of a system call could not be kept: it is not counted */
	FAULT_SYSCALL_CGROUPS_FULL = 11, /* a call could not be counted for its cgroup */
	FAULT_UDP_FULL = 12,         /* a UDP socket could not be kept: what went through it was not counted */
	FAULT_SAMPLES_FULL = 13,     /* a sample of the profile could not be counted: it is in `lost` */
	FAULT_STACK_COLLIDED = 14,   /* a stack of a sample had no place: others were there */
	FAULT_STACK_UNREADABLE = 15, /* a stack of a sample could not be read */
	FAULT_DNS_FULL = 16,         /* a DNS query could not be kept: it is counted as lost */
	FAULT_DNS_UNFOLLOWED = 17,   /* a direction of a TCP connection with a DNS server cannot be followed */
	FAULT_FLOWS_FULL = 18,       /* a packet is in no flow: none could be made for it */
	FAULT_FRAGMENTS_FULL = 19,   /* the ports of a first fragment could not be kept for the others */
	FAULT_PACKET_MALFORMED = 20, /* a packet is in no flow: its IP header is cut off, or contradicts itself */
	FAULT_FLOWS_EVICTED = 21,    /* a flow that went on made way for another: it is told as `evicted` */
	FAULT_PAYERS_FULL = 22,      /* who pays for an event could not be kept: he was not kept back */
	FAULT_DNS_MALFORMED = 23,    /* what went to or came from a port of DNS is in no event: it is shorter than a
				      * header, its connection ended in the middle, or it is no query where one
				      * is sent, or no response where one comes */
	FAULT_END = 24,
};

/* When a program is to wake the reader. */
enum wake {
	WAKE_NEVER = 0, /* it will look by itself */
	WAKE_FULL = 1,  /* when the ring holds wakeup_bytes */
	WAKE_ANY = 2,   /* at the next record: the reader sleeps */
};

/* There can be several ring buffers for what is bulk, each for some of the CPUs; one is a single one. */
#define MOST_BULK_RINGS 64
/* A number for each ring buffer: RING_CRITICAL, RING_BULK, and on. */
#define MOST_RINGS (RING_BULK + MOST_BULK_RINGS)

/* Mapped: the reader asks for one wake-up for each ring buffer, the program that gives it resets it. */
struct reader_state {
	__u32 wake[MOST_RINGS]; /* enum wake */
};

/* By what it is known who pays for events: see core/fair.bpf.h. */
enum payer_kind {
	PAYER_USER = 1,      /* user id */
	PAYER_CGROUP = 2,    /* cgroup id; 0: all those that are very deep */
	PAYER_CONTAINER = 3, /* inode number of a pid namespace, where there are no cgroups */
};

/* The events that are paid for: those that happen in the task that does them. */
enum paid {
	PAID_PROCESS_EXEC = 0,
	PAID_PROCESS_FORK = 1,
	PAID_PROCESS_EXIT = 2,
	PAID_FILE_OPEN = 3,
	PAID_NET_ACCEPT = 4,
	PAID_NET_LISTEN = 5,
	PAID_NET_BIND = 6,
	PAID_SYSCALL_SLOW = 7,
	PAID_END = 8,
};

/* Mapped, and written by the agent but for what is said to be the programs'. */
struct pressure {
	__u64 from[RING_END];      /* bytes in a ring buffer from which on it is asked who pays for more */
	__u64 level;               /* of pressure, less than PRESSURE_LEVELS: which rates hold */
	__u64 salt;                /* of what is drawn by connection: nobody else is to know it */
	__u64 pressed[MOST_RINGS]; /* the programs': 1: this ring buffer holds so much */
	__u64 pad[3];              /* what changes all the time is in another cache line */
	/* The rest is the programs'. */
	__u64 refused[PAID_END]; /* of all who pay together */
};

#define SPANS 8        /* of a ring, of which what is in it is counted by payer */
#define PAYER_SPANS 16 /* that are kept: more than can be in use, and a power of two */

struct payer_key {
	__u64 id;
	__u32 kind; /* enum payer_kind */
	__u32 bulk; /* of which ring buffer for bulk its spans are, from 0 */
};

struct payer {
	__u64 spans[RING_END * PAYER_SPANS]; /* number of the span << 32 | bytes */
	__u64 refused[PAID_END];             /* events for which he had no room any more */
};

/* How the flows are to be walked through, and how far it has come. Mapped by the agent. */
struct flow_walk {
	__u64 idle_ns;   /* a flow without packets for so long is reported, and forgotten */
	__u64 active_ns; /* one that goes on is reported so often */
	__u64 linger_ns; /* one that has ended is reported so much later */
	__u64 target;    /* rounds that are to be made */
	__u64 rounds;    /* that were made */
	__u64 cursor;    /* the slot that is next */
	__u64 live;      /* slots in use */
	__u32 stop;      /* report all, and forget them */
	__u32 least;     /* the class of response times into which all that are shorter go */
};

enum perf_limits {
	PERF_SLOTS = 8, /* of each CPU: records of perf buffers that are being built at the same time */
};

#define PREFIX_LEN 255 /* with the generation, as much as an LPM trie takes */

/* Keys of the filters' maps: each has the generation that it is of. */
struct path_prefix {
	__u32 bits; /* length of what is to be the same, in bits: of the generation and the prefix */
	__u8 generation;
	__u8 path[PREFIX_LEN];
};

struct number_key {
	__u64 number; /* process, user or cgroup id, or port */
	__u64 generation;
};

struct comm_key {
	char comm[COMM_LEN];
	__u64 generation;
};

struct exe_key {
	__u64 inode;
	__u32 dev; /* as the kernel keeps it: 12 bits major, 20 bits minor */
	__u32 generation;
};

#endif
