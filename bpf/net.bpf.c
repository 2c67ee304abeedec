// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * net.connect, net.accept, net.close, for TCP.
 *
 * One tracepoint sees every change of state of every socket, but often in a softirq, where the
 * current task is whoever was interrupted. So the owner is kept from the moments at which the
 * current task is it (connect, listen, accept, the beginning of a close) with the socket itself,
 * where the kernel lets a program of this kind keep something there, so that nobody's connections
 * can push out another's; else, and for what is known of a socket only by its address, in a table.
 */
#include "core/sock.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* Connects of which a change of state has told that they failed, until connect() returns: by the
 * address of the struct sock, with the error. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u32);
} failed_connects SEC(".maps");

static __always_inline struct connection *make_in_table(struct sock *sk)
{
	__u64 key = (__u64)sk;

	if (bpf_map_update_elem(&connections, &key, &nothing, BPF_ANY))
		count_fault(FAULT_CONNECTIONS_FULL);
	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline void forget_in_table(struct sock *sk)
{
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&connections, &key);
}

static __always_inline struct connection *make_with_socket(struct sock *sk)
{
	struct connection *made;

	made = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!made) /* the user has used up what the socket may hold (net.core.optmem_max) */
		count_fault(FAULT_SOCKET_STORAGE);
	return made;
}

/* Room for what is known of a connection, with or without what was; NULL if there is none. */
static __always_inline struct connection *make(struct sock *sk, const bool typed)
{
	struct connection *made = typed ? make_with_socket(sk) : NULL;

	return made ?: make_in_table(sk);
}

/* What is kept with the socket is emptied, and goes with the socket: its state is still needed. */
static __always_inline void forget(struct sock *sk, const bool typed)
{
	struct connection *kept = typed ? bpf_sk_storage_get(&sockets, sk, NULL, 0) : NULL;

	if (kept)
		*kept = nothing;
	forget_in_table(sk);
}

/* The same, but a reset may still have to be sent, which is the owner's (tc_classifier.bpf.c). */
static __always_inline void forget_all_but_owner(struct sock *sk, const bool typed)
{
	struct connection *kept = typed ? bpf_sk_storage_get(&sockets, sk, NULL, 0) : NULL;

	if (kept)
		__builtin_memset(&kept->owner + 1, 0, sizeof(*kept) - sizeof(kept->owner));
	forget_in_table(sk);
}

/* With storage: who accepted it is in the table until now, and what the socket had no room for. */
static __always_inline void take_from_table(struct sock *sk, const bool typed)
{
	struct connection *found, *kept;

	if (!typed)
		return;
	found = find_in_table(sk);
	if (!found)
		return;
	kept = make_with_socket(sk);
	if (!kept)
		return;
	kept->owner = found->owner;
	kept->listener = 0;
	kept->direction = found->direction;
	if (found->since_boot_ns)
		kept->since_boot_ns = found->since_boot_ns;
	forget_in_table(sk);
}

/* ---------------------------------------------------------------- events */

static __noinline void emit_connect(void *ctx, const struct owner *owner,
				    struct endpoints *ends, __u64 since_boot_ns, __u32 errno)
{
	struct net_connect *record;
	struct event_base base;

	start_base(&base);
	if (!admits_net(&base, owner, KIND_NET_CONNECT, ends, DIRECTION_OUTBOUND))
		return;
	record = begin(&bulk, &base, KIND_NET_CONNECT, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = owner->task;
	record->owner_known = owner->known;
	record->latency_ns = since_boot_ns ? base.boot_ns - since_boot_ns : 0;
	record->errno = errno;
	record->direction = DIRECTION_OUTBOUND;
	record->pad = 0;
	COPY_ENDPOINTS(record, ends);
	submit(ctx, &bulk, RING_BULK, record);
}

static __noinline void emit_close(void *ctx, const struct connection *connection,
				  struct sock *sk, struct endpoints *ends)
{
	struct net_close *record;
	struct event_base base;
	__u64 received;

	start_base(&base);
	if (!admits_net(&base, &connection->owner, KIND_NET_CLOSE, ends,
			connection->direction))
		return;
	record = begin(&bulk, &base, KIND_NET_CLOSE, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = connection->owner.task;
	record->owner_known = connection->owner.known;
	record->duration_ns =
		connection->since_boot_ns ? base.boot_ns - connection->since_boot_ns : 0;
	/* bytes_sent counts payload, each retransmission again; bytes_received counts the peer's
	 * FIN as a byte (tcp_rcv_nxt_update over end_seq). */
	record->bytes_sent = READ(struct tcp_sock, sk, bytes_sent) -
			     READ(struct tcp_sock, sk, bytes_retrans);
	received = READ(struct tcp_sock, sk, bytes_received);
	if (received && READ(struct sock, sk, __sk_common.skc_flags) & (1UL << SOCK_DONE))
		received--;
	record->bytes_received = received;
	record->errno = READ(struct sock, sk, sk_err);
	record->direction = connection->direction;
	record->pad = 0;
	COPY_ENDPOINTS(record, ends);
	submit(ctx, &bulk, RING_BULK, record);
}

static __always_inline void remember_agent_peer(const struct endpoints *ends)
{
	struct endpoints peer;
	__u8 one = 1;

	turn_round(&peer, ends);
	if (bpf_map_update_elem(&agent_peers, &peer, &one, BPF_ANY))
		count_fault(FAULT_AGENT_PEERS_FULL);
}

/* ---------------------------------------------------------------- changes of state */

/* A SYN is about to be sent: the current task is connecting. */
static __always_inline void on_syn(struct sock *sk, const bool typed)
{
	struct connection *made = make(sk, typed);

	if (!made)
		return;
	own(&made->owner);
	made->since_boot_ns = bpf_ktime_get_boot_ns();
	made->listener = 0;
	made->direction = DIRECTION_OUTBOUND;
}

static __always_inline void on_connected(void *ctx, struct sock *sk, const bool typed)
{
	struct connection *known = find(sk, typed);
	struct endpoints ends;

	read_endpoints(&ends, sk);
	if (!known) {
		emit_connect(ctx, &nothing.owner, &ends, 0, 0);
		known = make(sk, typed);
		if (!known)
			return;
	} else {
		if (known->owner.is_agent)
			remember_agent_peer(&ends);
		emit_connect(ctx, &known->owner, &ends, known->since_boot_ns, 0);
	}
	known->direction = DIRECTION_OUTBOUND;
	known->since_boot_ns = bpf_ktime_get_boot_ns();
}

/* Whether connect() itself is still under way, and failed before the SYN could be sent: no port or
 * no route was found after all. Only once it is sent is the socket said to be connecting. */
static __always_inline bool fails_within_connect(struct sock *sk)
{
	struct socket *socket = READ(struct sock, sk, sk_socket);

	return socket && READ(struct socket, socket, state) == SS_UNCONNECTED;
}

/* Whether somebody waits in connect(), and will be told of the failure there, too. Else what is left
 * for him would be taken for the next failure of the same kind at the same address. */
static __always_inline bool waits_in_connect(struct sock *sk)
{
	struct socket *socket = READ(struct sock, sk, sk_socket);
	struct file *file;

	if (!socket)
		return false; /* closed */
	file = READ(struct socket, socket, file); /* none: the kernel's own, of Multipath TCP */
	return !file || !(READ(struct file, file, f_flags) & O_NONBLOCK);
}

static __always_inline void on_connect_failed(void *ctx, struct sock *sk, const bool typed)
{
	struct connection *known = find(sk, typed);
	struct endpoints ends;
	__u64 key = (__u64)sk;
	__u32 error = READ(struct sock, sk, sk_err);

	if (!error && fails_within_connect(sk))
		goto out; /* connect() will say */
	if (!error)
		error = ECONNABORTED; /* closed by its owner while connecting */
	read_endpoints(&ends, sk);
	if (waits_in_connect(sk) && bpf_map_update_elem(&failed_connects, &key, &error, BPF_ANY))
		count_fault(FAULT_FAILED_FULL);
	if (!known)
		known = (void *)&nothing;
	emit_connect(ctx, &known->owner, &ends, known->since_boot_ns, error);
out:
	forget(sk, typed);
}

/* Both ends sent a SYN before they had the other's: the socket connects all the same. */
static __always_inline bool opens_simultaneously(struct sock *sk, const bool typed)
{
	struct connection *known = find(sk, typed);

	return known && known->direction == DIRECTION_OUTBOUND;
}

static __always_inline void on_listen(struct sock *sk, const bool typed)
{
	__u64 key = typed ? (__u64)sk : listener_by_port(sk);
	struct connection *listener, *kept;

	if (bpf_map_update_elem(&listeners, &key, &nothing, BPF_ANY))
		count_fault(FAULT_LISTENERS_FULL);
	listener = bpf_map_lookup_elem(&listeners, &key);
	if (!listener) {
		forget(sk, typed); /* of what the socket was used for before */
		return;
	}
	own(&listener->owner);
	listener->direction = DIRECTION_INBOUND;
	listener->listener = key;
	if (!typed)
		return;
	kept = make_with_socket(sk);
	if (kept)
		*kept = *listener;
	else /* connections will not inherit it */
		bpf_map_delete_elem(&listeners, &key);
}

/* An inbound connection is complete, and waits to be accepted. */
static __always_inline void on_inbound(struct sock *sk, const bool typed)
{
	struct connection *known = find(sk, typed), *listener;
	__u64 key;

	if (!known) {
		known = make(sk, typed);
		if (!known)
			return;
		if (!typed) {
			key = listener_by_port(sk);
			listener = bpf_map_lookup_elem(&listeners, &key);
			if (listener)
				known->owner = listener->owner;
		}
	}
	known->direction = DIRECTION_INBOUND;
	known->since_boot_ns = bpf_ktime_get_boot_ns();
}

/* The owner begins to close: he is the current task, whom we may not know yet. */
static __always_inline void on_closing(struct sock *sk, const bool typed)
{
	struct connection *known = find(sk, typed);

	if (known && is_owned(known, sk))
		return;
	if (!known)
		known = make(sk, typed);
	if (!known)
		return;
	own(&known->owner);
	known->listener = 0;
}

/* Whether the current task ends the connection at once, by a reset. Whoever works with a socket holds
 * it, and what comes in for it meanwhile has to wait. */
static __always_inline bool is_cut_off(struct sock *sk, int from)
{
	return (from == TCP_ESTABLISHED || from == TCP_CLOSE_WAIT) &&
	       READ(struct sock, sk, sk_lock.owned) && !READ(struct sock, sk, sk_err);
}

static __always_inline void on_closed(void *ctx, struct sock *sk, int from, const bool typed)
{
	struct connection *known;
	struct endpoints ends;

	if (is_cut_off(sk, from))
		on_closing(sk, typed);
	known = find(sk, typed);
	read_endpoints(&ends, sk);
	if (known && !is_owned(known, sk))
		known->owner = nothing.owner;
	emit_close(ctx, known ?: &nothing, sk, &ends);
	forget_all_but_owner(sk, typed);
	bpf_map_delete_elem(&agent_peers, &ends);
}

/* Never complete: of interest only if Fast Open let it be accepted all the same. */
static __always_inline void on_aborted(void *ctx, struct sock *sk, const bool typed)
{
	if (is_accepted(sk) && find(sk, typed))
		on_closed(ctx, sk, TCP_SYN_RECV, typed);
	else
		forget(sk, typed);
}

/* Whether what is in the table is of another socket, which was at this address before. With Fast Open
 * a connection can have been accepted before it is complete; else what is there then is of one that was
 * reset in the middle of its accept. */
static __always_inline bool begins_with(struct sock *sk, int from, int to)
{
	return to == TCP_SYN_SENT || to == TCP_SYN_RECV || to == TCP_LISTEN ||
	       (from == TCP_SYN_RECV && to == TCP_ESTABLISHED && !is_accepted(sk));
}

static __always_inline void change_state(void *ctx, struct sock *sk, int from, int to,
					 const bool typed)
{
	if (begins_with(sk, from, to))
		forget_in_table(sk);
	else
		take_from_table(sk, typed);
	if (from == TCP_SYN_RECV && opens_simultaneously(sk, typed))
		from = TCP_SYN_SENT;
	if (to == TCP_SYN_SENT)
		on_syn(sk, typed);
	else if (from == TCP_SYN_SENT && to == TCP_ESTABLISHED)
		on_connected(ctx, sk, typed);
	else if (from == TCP_SYN_SENT && to == TCP_CLOSE)
		on_connect_failed(ctx, sk, typed);
	else if (from == TCP_SYN_RECV && to == TCP_ESTABLISHED)
		on_inbound(sk, typed);
	else if (to == TCP_LISTEN)
		on_listen(sk, typed);
	else if (to == TCP_FIN_WAIT1 || to == TCP_LAST_ACK)
		on_closing(sk, typed);
	else if (to == TCP_CLOSE && from == TCP_SYN_RECV)
		on_aborted(ctx, sk, typed);
	else if (to == TCP_CLOSE && from != TCP_LISTEN)
		on_closed(ctx, sk, from, typed);
}

/* Whether a change of state means anything here: most do not, and are not looked at further. */
static __always_inline bool matters(int from, int to)
{
	if (from == to)
		return false;
	switch (to) {
	case TCP_SYN_SENT:
	case TCP_LISTEN:
	case TCP_FIN_WAIT1:
	case TCP_LAST_ACK:
		return true;
	case TCP_ESTABLISHED:
		return from == TCP_SYN_SENT || from == TCP_SYN_RECV;
	case TCP_SYN_RECV:
		return from != TCP_SYN_SENT; /* a new socket; of a listener, or one just closed */
	case TCP_CLOSE:
		return true;
	}
	return false;
}

/*
 * From 6.1 on the kernel does not run a program inside itself on one CPU. But a system call's change
 * of state can be interrupted by packets and their changes, on a busy machine about one in a hundred
 * times. So there are two programs: the first to see a change handles it, and says with the socket
 * that it has been seen, by which the other knows. What interrupts one of them is handled by the other
 * alone. Where the kernel has no such guard, one program sees all, and the twin is not attached.
 *
 * From 7.0 on tasks can be preempted at the ends of both, one after the other: another task's change is
 * then seen by neither. That is noticed at the next change of that socket, or when it is destroyed.
 */

/* Whether a change went unseen between the last one that was seen and this. */
static __always_inline bool is_gap(int seen, int from)
{
	if (!seen || seen == from)
		return false;
	switch (from) {
	case TCP_LISTEN: /* of a child, whose listener was being closed */
		return seen != TCP_CLOSE;
	case TCP_SYN_RECV: /* both ends sent a SYN */
		return seen != TCP_SYN_SENT;
	case TCP_CLOSE_WAIT: /* after SYN_RECV: Fast Open */
		return seen != TCP_ESTABLISHED && seen != TCP_SYN_RECV;
	case TCP_FIN_WAIT2:
	case TCP_CLOSING:
		return seen != TCP_FIN_WAIT1;
	}
	return true;
}

/* A connect that nobody saw succeed. The time at which it did is not known. */
static __always_inline void connect_late(void *ctx, struct sock *sk, struct connection *kept)
{
	take_from_table(sk, TYPED);
	kept->since_boot_ns = 0;
	on_connected(ctx, sk, TYPED);
	kept->since_boot_ns = 0;
}

/* Counts that changes went unseen, and does what can be done about it. */
static __always_inline void mend_gap(void *ctx, struct sock *sk, struct connection *kept,
				     int from)
{
	count_fault(FAULT_CHANGE_UNSEEN);
	if (from == TCP_SYN_SENT)
		*kept = nothing; /* of what the socket was used for before */
	else if (kept->state == TCP_SYN_SENT && from != TCP_CLOSE && from != TCP_LISTEN)
		connect_late(ctx, sk, kept); /* else it was used again: the addresses are others by now */
}

/* Without anything kept with the socket, the twins leave notes for each other by CPU. */
#define TWINS 2
#define NOTES 8 /* room for some that are never picked up */

struct notes {
	__u64 changes[TWINS][NOTES];
	__u64 address[TWINS]; /* of the socket: read from here it is a number to the verifier */
	__u32 next[TWINS];
	__u32 busy[TWINS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct notes);
} notes SEC(".maps");

/* Which change of which connection. Ports, because the memory of a socket is soon used again. */
static __always_inline __u64 change_of(volatile struct notes *here, struct sock *sk, int from,
				       int to, const __u32 me)
{
	__u64 ports = (__u64)READ(struct inet_sock, sk, inet_sport) << 16 |
		      READ(struct sock, sk, __sk_common.skc_dport);

	here->address[me] = (__u64)sk;
	return (here->address[me] << 8 | (from & 15) << 4 | (to & 15)) ^ ports << 32;
}

/* Takes the note that the other has left of this change. False: there is none. */
static __always_inline bool take_note(volatile struct notes *here, __u64 change, const __u32 me)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < NOTES; i++) {
		if (here->changes[1 - me][i] != change)
			continue;
		here->changes[1 - me][i] = 0;
		return true;
	}
	return false;
}

static __always_inline bool first_to_note(volatile struct notes *here, __u64 change,
					  const __u32 me)
{
	__u32 i, free = NOTES;

	if (take_note(here, change, me))
		return false;
#pragma unroll
	for (i = 0; i < NOTES; i++) {
		if (free == NOTES && !here->changes[me][i])
			free = i;
	}
	if (here->busy[1 - me]) /* this interrupts it: it will not come to see */
		return true;
	if (free == NOTES)
		free = here->next[me]++;
	here->changes[me][free % NOTES] = change;
	return true;
}

/* Whether the other program has handled this change already. If it leads to the state that was noted,
 * and this same program noted that, it is a new one: those in between were missed. */
static __always_inline bool is_second(volatile struct notes *here, struct connection *kept,
				      struct sock *sk, int from, int to, const __u32 me)
{
	__u64 change;

	if (kept && kept->state)
		return kept->state == to && kept->seen_by != me;
	change = change_of(here, sk, from, to, me);
	if (kept) /* the socket may have got room for it just now */
		return take_note(here, change, me);
	return !first_to_note(here, change, me);
}

static __always_inline int sock_state(void *ctx, struct sock *sk, int from, int to,
				      const __u32 me, const bool typed)
{
	struct connection *kept = NULL;
	volatile struct notes *here;
	bool second;

	if (!matters(from, to) || !is_tcp(sk))
		return 0;
	here = ONLY_ENTRY(notes);
	if (!here)
		return 0;
	if (typed)
		kept = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	here->busy[me] = 1;
	second = is_second(here, kept, sk, from, to, me);
	if (!second) {
		if (kept && is_gap(kept->state, from))
			mend_gap(ctx, sk, kept, from);
		change_state(ctx, sk, from, to, typed);
		if (typed && !kept) /* handling it may have found room */
			kept = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	}
	if (kept && (!second || !kept->state)) {
		kept->state = to;
		kept->seen_by = me;
	}
	here->busy[me] = 0;
	return 0;
}

/*
 * A socket that is destroyed has been closed, whether that was seen or not. Reported as far as possible:
 * not the end of a connect (connect() may have said it), nor that of a connection that its owner has cut
 * off, because then the socket has lost its addresses. A close that was seen leaves nothing in the table.
 */
static __always_inline int destroyed(void *ctx, struct sock *sk)
{
	struct connection *kept = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	bool has_peer = READ(struct sock, sk, __sk_common.skc_dport);
	__u8 seen = kept ? kept->state : 0;
	__u64 key = (__u64)sk;

	if (!kept || !seen) {
		if (!bpf_map_delete_elem(&connections, &key))
			count_fault(FAULT_CHANGE_UNSEEN);
		return 0;
	}
	if (seen == TCP_CLOSE || (seen == TCP_LISTEN && !has_peer))
		return 0;
	count_fault(FAULT_CHANGE_UNSEEN);
	if (has_peer && seen != TCP_LISTEN && seen != TCP_SYN_SENT)
		change_state(ctx, sk, seen, TCP_CLOSE, TYPED);
	else
		forget(sk, TYPED);
	kept->state = TCP_CLOSE;
	return 0;
}

/* For the kernels whose raw tracepoints have no guard. */
static __always_inline int sock_state_alone(void *ctx, struct sock *sk, int from, int to,
					    const bool typed)
{
	if (matters(from, to) && is_tcp(sk))
		change_state(ctx, sk, from, to, typed);
	return 0;
}

/* Those of connections, and the agent's own; of what connects alone. */
#define OWNERS KEEPS("net.retransmit,net.drop,net.flow")
#define OWNERS_OF_ALL KEEPS("net.retransmit,net.drop,net.dns,net.flow")

#define GUARD "function:bpf_prog_inc_misses_counter"

#define ON_SOCK_STATE(name, section, hook, needs, body)     \
	SEC(section) HOOK(hook) EMITS("net.connect,net.close") OWNERS_OF_ALL needs \
	int BPF_PROG(name, struct sock *sk, int from, int to) \
	{                                                   \
		return UNPREEMPTED(body);                   \
	}

ON_SOCK_STATE(on_sock_state, "tp_btf/inet_sock_set_state", "sock_state", NEEDS(GUARD),
	      sock_state(ctx, sk, from, to, 0, TYPED))
ON_SOCK_STATE(on_sock_state_untyped, "raw_tp/inet_sock_set_state", "sock_state", NEEDS(GUARD),
	      sock_state(ctx, sk, from, to, 0, UNTYPED))
ON_SOCK_STATE(on_sock_state_alone, "tp_btf/inet_sock_set_state", "sock_state",
	      NEEDS("no " GUARD), sock_state_alone(ctx, sk, from, to, TYPED))
ON_SOCK_STATE(on_sock_state_alone_untyped, "raw_tp/inet_sock_set_state", "sock_state",
	      NEEDS("no " GUARD), sock_state_alone(ctx, sk, from, to, UNTYPED))
ON_SOCK_STATE(on_sock_state_twin, "tp_btf/inet_sock_set_state", "sock_state_twin",
	      NEEDS(GUARD) DOC("changes of state that interrupt another one"),
	      sock_state(ctx, sk, from, to, 1, TYPED))
ON_SOCK_STATE(on_sock_state_twin_untyped, "raw_tp/inet_sock_set_state", "sock_state_twin",
	      NEEDS(GUARD) DOC("changes of state that interrupt another one"),
	      sock_state(ctx, sk, from, to, 1, UNTYPED))

/* Of no use before 7.0, but what tells that kernel from those before is not in its BTF. */
#define PREEMPTS "function:bpf_preempt_disable"

#define ON_DESTROYED(name)                                                             \
	SEC("tp_btf/tcp_destroy_sock") NEEDS(PREEMPTS)                                 \
	COMPLETES("net.connect,net.close")                                             \
	DOC("changes that both programs on the hook of socket states missed")          \
	int BPF_PROG(name, struct sock *sk)                                            \
	{                                                                              \
		return UNPREEMPTED(destroyed(ctx, sk));                                     \
	}

ON_DESTROYED(on_destroyed)
ON_DESTROYED(on_destroyed_twin)

/* ---------------------------------------------------------------- connect() */

struct wanted_address {
	__u8 bytes[28]; /* struct sockaddr_in or sockaddr_in6 */
};

static __always_inline void read_wanted(struct endpoints *ends, const struct wanted_address *wanted)
{
	const struct sockaddr_in *in = (const void *)wanted->bytes;
	const struct sockaddr_in6 *in6 = (const void *)wanted->bytes;

	ends->remote_port = bpf_ntohs(in->port);
	__builtin_memset(ends->remote_addr, 0, 16);
	if (in->family == AF_INET) {
		ends->ip_version = 4;
		__builtin_memcpy(ends->remote_addr, in->addr, 4);
		return;
	}
	ends->ip_version = 6;
	__builtin_memcpy(ends->remote_addr, in6->addr, 16);
	if (is_mapped(ends->remote_addr)) {
		ends->ip_version = 4;
		unmap_addr(ends->remote_addr);
	}
}

/* Errors by which connect() tells of an attempt that goes on, or of none. */
static __always_inline bool is_an_end(__u32 errno)
{
	return errno && errno != EINPROGRESS && errno != EALREADY && errno != EISCONN &&
	       errno != EINTR;
}

/* Whether a change of state has reported this failure already. */
static __always_inline bool is_told(struct sock *sk, __u32 errno)
{
	__u64 key = (__u64)sk;
	__u32 *told = bpf_map_lookup_elem(&failed_connects, &key);
	bool same = told && *told == errno;

	if (told)
		bpf_map_delete_elem(&failed_connects, &key);
	return same;
}

/* Reports a connect that failed before a SYN was sent: nothing else tells of it. */
static __always_inline int connected(void *ctx, long result, struct pt_regs___user *registers)
{
	struct wanted_address address = {};
	struct call_arguments passed;
	struct endpoints ends;
	struct socket *socket;
	struct owner owner;
	struct sock *sk;
	__u64 length;
	__u16 family;

	if (!is_an_end(errno_of(result)))
		return 0;
	passed = call_arguments(registers);
	socket = socket_of_fd(passed.at[0]);
	if (!socket)
		return 0;
	sk = first_connection(READ(struct socket, socket, sk));
	if (!is_tcp(sk) || is_told(sk, errno_of(result)))
		return 0;
	length = passed.at[2];
	if (length > sizeof(address.bytes))
		length = sizeof(address.bytes);
	if (bpf_probe_read_user(address.bytes, length, (void *)passed.at[1]))
		return 0; /* EFAULT: no address was asked for */
	family = *(__u16 *)address.bytes;
	if (family != AF_INET && family != AF_INET6)
		return 0;
	read_endpoints(&ends, sk);
	read_wanted(&ends, &address);
	own(&owner);
	emit_connect(ctx, &owner, &ends, 0, errno_of(result));
	return 0;
}

SEC("fexit/" SYSTEM_CALL(connect)) HOOK("connect") EMITS("net.connect")
DOC("connects that fail before a SYN is sent (no route, no free port)")
int BPF_PROG(on_connect, struct pt_regs___user *unused, long result)
{
	/* Not from the argument: in the BTF of 5.10 its type is only declared here. */
	return UNPREEMPTED(connected(ctx, result, user_registers()));
}

SEC("tracepoint/syscalls/sys_exit_connect") HOOK("connect") EMITS("net.connect")
DOC("connects that fail before a SYN is sent (no route, no free port)")
int on_connect_exit(struct trace_event_raw_sys_exit *ctx)
{
	return AMONG_OTHERS(UNPREEMPTED(connected(ctx, ctx->ret, user_registers())));
}

/* ---------------------------------------------------------------- accept() */

static __always_inline bool is_same_owner(const struct owner *one, const struct owner *other)
{
	const __u64 *a = (const void *)one, *b = (const void *)other;
	__u64 difference = 0;
	__u32 i;

#pragma unroll
	for (i = 0; i < sizeof(*one) / sizeof(*a); i++)
		difference |= a[i] ^ b[i];
	return !difference;
}

static __always_inline struct connection *listener_of_fd(int fd)
{
	struct socket *socket = socket_of_fd(fd);
	__u64 key;

	if (!socket)
		return NULL;
	key = (__u64)first_connection(READ(struct socket, socket, sk));
	return bpf_map_lookup_elem(&listeners, &key);
}

/* From now on the connection belongs to the current task. Not inlined: the stack has to do for what comes then. */
static __noinline void take_over(struct sock *sk, const struct owner *owner, int listener_fd)
{
	struct connection *listener = listener_of_fd(listener_fd);
	struct connection made = {}, *found;
	__u64 key = (__u64)sk;

	if (listener && !listener->missed && is_same_owner(&listener->owner, owner))
		return; /* as the socket says already */
	if (READ(struct sock, sk, __sk_common.skc_state) == TCP_CLOSE)
		return; /* reset before it was accepted: its end has been told */
	found = find_in_table(sk);
	if (found)
		made = *found;
	/* Whole, not in place: meanwhile its end may come, and another connection in its place. */
	made.owner = *owner;
	made.direction = DIRECTION_INBOUND;
	if (bpf_map_update_elem(&connections, &key, &made, BPF_ANY)) {
		count_fault(FAULT_CONNECTIONS_FULL);
		if (listener)
			listener->missed = 1;
	}
	if (READ(struct sock, sk, __sk_common.skc_state) == TCP_CLOSE)
		forget_in_table(sk); /* it was told meanwhile */
}

static __always_inline int accepted(void *ctx, long fd, struct pt_regs___user *registers)
{
	struct net_accept *record;
	struct event_base base;
	struct endpoints ends;
	struct socket *socket;
	struct owner owner;
	struct sock *sk;

	if (fd < 0)
		return 0;
	socket = socket_of_fd(fd);
	if (!socket)
		return 0;
	sk = first_connection(READ(struct socket, socket, sk));
	if (!is_tcp(sk))
		return 0;
	read_endpoints(&ends, sk);
	own(&owner);
	take_over(sk, &owner, call_arguments(registers).at[0]);
	start_base(&base);
	if (!admits_net(&base, &owner, KIND_NET_ACCEPT, &ends, DIRECTION_INBOUND))
		return 0;
	record = begin(&bulk, &base, KIND_NET_ACCEPT, RING_BULK, sizeof(*record));
	if (!record)
		return 0;
	record->task = owner.task;
	record->owner_known = 1;
	record->fd = fd;
	record->direction = DIRECTION_INBOUND;
	record->pad = 0;
	COPY_ENDPOINTS(record, &ends);
	submit(ctx, &bulk, RING_BULK, record);
	return 0;
}

/* At the return of the function behind the call, so as not to tax every other system call; see
 * ON_OPEN in file.bpf.c. */
#define ON_ACCEPT(name)                                                                  \
	SEC("fexit/" SYSTEM_CALL(name)) HOOK(#name) EMITS("net.accept,net.close") OWNERS \
	DOC("connections taken by " #name "(), and their owner at the close,")           \
	int BPF_PROG(on_##name, struct pt_regs___user *unused, long result)              \
	{                                                                                \
		return UNPREEMPTED(accepted(ctx, result, user_registers()));                  \
	}                                                                                \
	SEC("tracepoint/syscalls/sys_exit_" #name) HOOK(#name) EMITS("net.accept,net.close") OWNERS \
	DOC("connections taken by " #name "(), and their owner at the close,")           \
	int on_##name##_exit(struct trace_event_raw_sys_exit *ctx)                       \
	{                                                                                \
		return AMONG_OTHERS(UNPREEMPTED(accepted(ctx, ctx->ret, user_registers())));  \
	}

ON_ACCEPT(accept)
ON_ACCEPT(accept4)
