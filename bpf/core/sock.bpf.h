/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Sockets: their addresses, what is kept of TCP connections, and whose they are.
 *
 * net.bpf.c keeps owners, at the moments at which the current task is it; what reports something of a
 * connection at other moments (tracepoint_net.bpf.c) looks there. So these maps are COMMON.
 */
#ifndef STREAMER_SOCK_H
#define STREAMER_SOCK_H

#include "filter.bpf.h"

struct endpoints {
	__u8 local_addr[16];
	__u8 remote_addr[16];
	__u16 local_port;
	__u16 remote_port;
	__u8 ip_version;
	__u8 pad[3];
	__u32 netns;
};

/* Whose a connection is, and what the task filters said of the owner when he took it. */
struct owner {
	struct event_task task;
	__u8 known;
	__u8 admitted;
	__u8 is_agent;
	__u8 pad[5];
};

struct connection {
	struct owner owner; /* the first: see forget_all_but_owner() */
	__u64 since_boot_ns; /* of the SYN, then of being established; 0: nobody saw it */
	__u64 listener;      /* key in `listeners`, while the owner is the one who listens; else 0 */
	__u32 missed;        /* in `listeners`: another one's accept could not be kept */
	__u8 direction;      /* enum net_direction */
	__u8 state;          /* in `sockets`: the state to which the last seen change led; 0: none yet.
			      * A child begins with its listener's */
	__u8 seen_by;        /* which of the twins saw that change first */
	__u8 pad;
};

/* What is known of a connection of which nothing is. */
static const struct connection nothing;

/* What a listening socket holds is given to every connection that comes in there. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct connection);
} sockets SEC(".maps") COMMON;

/* By the address of the struct sock. Where `sockets` is used: only what somebody else than the
 * listener accepted, until it changes its state, and what the socket has no room for. Else: all, from
 * the SYN to the close. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct connection);
} connections SEC(".maps") SIZED("table:connections") COMMON;

/* Who listens: the owner of an inbound connection until somebody accepts it. By the address of the
 * listening struct sock, and where connections do not inherit that by network namespace and port. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct connection);
} listeners SEC(".maps") COMMON;

/* The agent's own connections, as their other end sees them: a broker on this machine must not
 * make events by serving the agent. Of its network namespace, so that nobody can hide behind the
 * same addresses in another. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct endpoints);
	__type(value, __u8);
} agent_peers SEC(".maps") COMMON;

/* ---------------------------------------------------------------- addresses */

static __always_inline bool is_mapped(const __u8 *addr)
{
	const __u32 *word = (const __u32 *)addr;

	return !word[0] && !word[1] && word[2] == bpf_htonl(0xffff);
}

/* An IPv4 address in IPv6 clothes becomes an IPv4 address. */
static __always_inline void unmap_addr(__u8 *addr)
{
	__u32 *word = (__u32 *)addr;

	word[0] = is_mapped(addr) ? word[3] : 0;
	word[2] = 0;
	word[3] = 0;
}

#define READ_IN6(to, sk, member)                                                              \
	do {                                                                                  \
		__u32 *__word = (__u32 *)(to);                                                \
		__word[0] = READ(struct sock, sk, __sk_common.member.in6_u.u6_addr32[0]);     \
		__word[1] = READ(struct sock, sk, __sk_common.member.in6_u.u6_addr32[1]);     \
		__word[2] = READ(struct sock, sk, __sk_common.member.in6_u.u6_addr32[2]);     \
		__word[3] = READ(struct sock, sk, __sk_common.member.in6_u.u6_addr32[3]);     \
	} while (0)

static __always_inline void read_addresses(struct endpoints *ends, struct sock *sk)
{
	if (READ(struct sock, sk, __sk_common.skc_family) == AF_INET) {
		ends->ip_version = 4;
		*(__u32 *)ends->local_addr = READ(struct sock, sk, __sk_common.skc_rcv_saddr);
		*(__u32 *)ends->remote_addr = READ(struct sock, sk, __sk_common.skc_daddr);
		return;
	}
	ends->ip_version = 6;
	if (!bpf_core_field_exists(struct sock_common, skc_v6_daddr))
		return; /* CONFIG_IPV6=n */
	READ_IN6(ends->local_addr, sk, skc_v6_rcv_saddr);
	READ_IN6(ends->remote_addr, sk, skc_v6_daddr);
	if (is_mapped(ends->remote_addr)) {
		ends->ip_version = 4;
		unmap_addr(ends->local_addr);
		unmap_addr(ends->remote_addr);
	}
}

static __always_inline void read_endpoints(struct endpoints *ends, struct sock *sk)
{
	__builtin_memset(ends, 0, sizeof(*ends));
	read_addresses(ends, sk);
	/* Not skc_num: a closing socket has given its port back already. */
	ends->local_port = bpf_ntohs(READ(struct inet_sock, sk, inet_sport));
	ends->remote_port = bpf_ntohs(READ(struct sock, sk, __sk_common.skc_dport));
	ends->netns = READ(struct sock, sk, __sk_common.skc_net.net, ns.inum);
}

static __always_inline void turn_round(struct endpoints *to, const struct endpoints *from)
{
	__builtin_memset(to, 0, sizeof(*to));
	__builtin_memcpy(to->local_addr, from->remote_addr, 16);
	__builtin_memcpy(to->remote_addr, from->local_addr, 16);
	to->local_port = from->remote_port;
	to->remote_port = from->local_port;
	to->ip_version = from->ip_version;
	to->netns = from->netns;
}

/* ---------------------------------------------------------------- sockets */

static __always_inline bool is_tcp(struct sock *sk)
{
	__u16 family = READ(struct sock, sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       READ(struct sock, sk, sk_protocol) == IPPROTO_TCP;
}

/* The connection that a socket stands for: of a Multipath TCP one, its first. */
static __always_inline struct sock *first_connection(struct sock *sk)
{
	struct mptcp_sock *multipath = (void *)sk;

	if (bpf_core_type_exists(struct mptcp_sock) &&
	    READ(struct sock, sk, sk_protocol) == IPPROTO_MPTCP)
		return BPF_CORE_READ(multipath, first); /* its type may be a module's */
	return sk;
}

/* The socket behind a descriptor; NULL if it is none. */
static __always_inline struct socket *socket_of_fd(int fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct file *file = file_of_fd(task, fd);
	struct socket *socket;

	if (!file || (READ(struct file, file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return NULL;
	socket = READ(struct file, file, private_data);
	/* The name of a socket in a directory, opened with O_PATH, has no socket behind it. */
	return socket && READ(struct socket, socket, file) == file ? socket : NULL;
}

/* ---------------------------------------------------------------- owners */

/* Not inlined, as a few others here: the stack is small. */
static __noinline void own(struct owner *owner)
{
	__builtin_memset(owner, 0, sizeof(*owner));
	identify(&owner->task);
	owner->known = 1;
	owner->is_agent = is_agent(owner->task.pid);
	owner->admitted = passes_task_filters(&owner->task, generation_in_force());
}

/* Programs of one kind get the socket as a kernel type, and may keep a connection with it. */
#define TYPED true
#define UNTYPED false

static __always_inline struct connection *find_in_table(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline struct connection *find(struct sock *sk, const bool typed)
{
	struct connection *kept = typed ? bpf_sk_storage_get(&sockets, sk, NULL, 0) : NULL;

	return kept ?: find_in_table(sk);
}

static __always_inline bool is_accepted(struct sock *sk)
{
	return READ(struct sock, sk, sk_socket);
}

/* Whether the owner is known: not if it is the one who listens, and somebody else may have accepted
 * it of whom could not be kept that he did. */
static __always_inline bool is_owned(const struct connection *known, struct sock *sk)
{
	struct connection *listener;
	__u64 key = known->listener;

	if (!key || !is_accepted(sk))
		return known->owner.known;
	listener = bpf_map_lookup_elem(&listeners, &key);
	if (!listener) /* others have pushed it out */
		count_fault(FAULT_LISTENERS_FULL);
	return listener && !listener->missed && known->owner.known;
}

/* Whose a connection is now. */
static __always_inline void owner_of(struct owner *owner, struct sock *sk, const bool typed)
{
	struct connection *kept = typed ? bpf_sk_storage_get(&sockets, sk, NULL, 0) : NULL;
	struct connection *found = find_in_table(sk); /* who accepted it, until it changes its state */

	if (found)
		*owner = found->owner;
	else if (kept && is_owned(kept, sk))
		*owner = kept->owner;
	else
		*owner = nothing.owner;
}

/* Without storage. */
static __always_inline __u64 listener_by_port(struct sock *sk)
{
	__u64 netns = READ(struct sock, sk, __sk_common.skc_net.net, ns.inum);

	return netns << 32 | bpf_ntohs(READ(struct inet_sock, sk, inet_sport));
}

/*
 * What the port filter says. Either port can make an event wanted; only that of the service, which is
 * the one that was connected to, makes it unwanted: the other is any that the client has chosen.
 */
static __always_inline bool passes_ports(struct endpoints *ends, __u32 direction)
{
	__u32 generation = generation_in_force();
	struct filter_modes *modes = modes_of(generation);
	__u8 *local, *remote;

	if (!modes || modes->port == FILTER_OFF)
		return true;
	local = verdict_on(&filter_ports, ends->local_port, generation);
	remote = verdict_on(&filter_ports, ends->remote_port, generation);
	if ((local && *local == VERDICT_DROP && direction == DIRECTION_INBOUND) ||
	    (remote && *remote == VERDICT_DROP && direction == DIRECTION_OUTBOUND))
		return false;
	return modes->port == FILTER_EXCLUDE || (local && *local == VERDICT_KEEP) ||
	       (remote && *remote == VERDICT_KEEP);
}

/* ---------------------------------------------------------------- sampling by connection */

static __always_inline __u64 mixed(__u64 bits)
{
	bits = (bits ^ bits >> 33) * 0xff51afd7ed558ccdULL; /* the end of MurmurHash3 */
	bits = (bits ^ bits >> 33) * 0xc4ceb9fe1a85ec53ULL;
	return bits ^ bits >> 33;
}

static __always_inline __u64 hash_of_end(const __u8 *addr, __u16 port, __u64 salt)
{
	const __u32 *word = (const __u32 *)addr;

	return mixed(mixed(((__u64)word[0] << 32 | word[1]) ^ salt) +
		     ((__u64)word[2] << 32 | word[3]) + port);
}

/*
 * What a connection draws: the same for all that is told of it, and at both of its ends, so that what
 * belongs together is taken together. Without the salt nobody can choose ports that are never
 * taken. What has no port yet has nothing that distinguishes it, and nothing that belongs to it.
 */
static __always_inline __u32 draw_of(const struct endpoints *ends)
{
	struct pressure *now = ONLY_ENTRY(pressure);

	if (!now || !ends->local_port)
		return bpf_get_prandom_u32();
	return mixed(hash_of_end(ends->local_addr, ends->local_port, now->salt) +
		     hash_of_end(ends->remote_addr, ends->remote_port, now->salt)) >> 32;
}

/* As sample(), of a connection's beginning or end. */
static __always_inline __u32 sample_connection(enum event_kind kind, const struct endpoints *ends)
{
	__u32 rate = rate_of(kind);

	if (rate <= 1)
		return 1;
	if (is_drawn(draw_of(ends), rate))
		return rate;
	count_shed(kind);
	return 0;
}

static __always_inline bool is_told_once(enum event_kind kind)
{
	return kind == KIND_NET_CONNECT || kind == KIND_NET_ACCEPT || kind == KIND_NET_CLOSE;
}

/* Whether an event of `owner` between `ends` is to be reported. An owner who is not known is not
 * left out: nobody can say that he is meant. */
static __always_inline bool admits_net(struct event_base *base, const struct owner *owner,
				       enum event_kind kind, struct endpoints *ends,
				       __u32 direction)
{
	bool keep = owner->admitted || !owner->known;

	if (!enabled(kind) || owner->is_agent || bpf_map_lookup_elem(&agent_peers, ends))
		return false;
	if (!keep || !passes_ports(ends, direction)) {
		count_filtered(kind);
		return false;
	}
	base->weight = is_told_once(kind) ? sample_connection(kind, ends) : sample(kind);
	return base->weight;
}

#define COPY_ENDPOINTS(record, ends)                                               \
	do {                                                                       \
		(record)->netns = (ends)->netns;                                   \
		(record)->ip_version = (ends)->ip_version;                         \
		(record)->local_port = (ends)->local_port;                         \
		(record)->remote_port = (ends)->remote_port;                       \
		__builtin_memcpy((record)->local_addr, (ends)->local_addr, 16);    \
		__builtin_memcpy((record)->remote_addr, (ends)->remote_addr, 16);  \
	} while (0)

#endif
