// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * net.connect, net.accept, net.close, for TCP.
 *
 * One tracepoint sees every change of state of every socket, but often in a softirq, where the
 * current task is whoever was interrupted. So the owner is kept per socket from the moments at which
 * the current task is it: connect(), listen(), accept(), close().
 */
#include "path.bpf.h"

struct endpoints {
	__u8 local_addr[16];
	__u8 remote_addr[16];
	__u16 local_port;
	__u16 remote_port;
	__u8 ip_version;
	__u8 pad[3];
	__u32 netns; /* of loopback addresses, which every namespace has; else 0 */
};

struct connection {
	struct event_header owner;
	__u64 since_boot_ns; /* of the SYN, then of being established; 0: before the agent started */
	__u32 direction;     /* enum net_direction */
	__u32 pad;
};

/* Sockets from their SYN to their close. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct connection);
} connections SEC(".maps");

struct listener_key {
	__u32 netns;
	__u32 port;
};

/* Who listens: the owner of an inbound connection until somebody accepts it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct listener_key);
	__type(value, struct event_header);
} listeners SEC(".maps");

/* A connect() under way. */
struct connect_call {
	__u64 boot_ns;
	__u64 sock;     /* set once the socket has sent its SYN */
	__u32 fd;
	__u8 addr[28];  /* struct sockaddr_in or sockaddr_in6 */
	__u8 failed;    /* closed again within the call, which will return why */
	__u8 pad[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct connect_call);
} connect_calls SEC(".maps");

/* The agent's own connections, as their other end sees them: a broker on this machine must not
 * make events by serving the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct endpoints);
	__type(value, __u8);
} agent_peers SEC(".maps");

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

static __always_inline __u32 netns_of(const struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

static __always_inline bool is_loopback(const struct endpoints *ends)
{
	const __u32 *word = (const __u32 *)ends->remote_addr;

	if (ends->ip_version == 4)
		return ends->remote_addr[0] == 127;
	return !word[0] && !word[1] && !word[2] && word[3] == bpf_htonl(1);
}

static __always_inline void read_addresses(struct endpoints *ends, const struct sock *sk)
{
	const struct inet_sock *inet = (const void *)sk;

	/* Not skc_num: a closing socket has given its port back already. */
	ends->local_port = bpf_ntohs(BPF_CORE_READ(inet, inet_sport));
	ends->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET) {
		ends->ip_version = 4;
		bpf_core_read(ends->local_addr, 4, &sk->__sk_common.skc_rcv_saddr);
		bpf_core_read(ends->remote_addr, 4, &sk->__sk_common.skc_daddr);
		return;
	}
	ends->ip_version = 6;
	bpf_core_read(ends->local_addr, 16, &sk->__sk_common.skc_v6_rcv_saddr);
	bpf_core_read(ends->remote_addr, 16, &sk->__sk_common.skc_v6_daddr);
	if (is_mapped(ends->remote_addr)) {
		ends->ip_version = 4;
		unmap_addr(ends->local_addr);
		unmap_addr(ends->remote_addr);
	}
}

static __always_inline void read_endpoints(struct endpoints *ends, const struct sock *sk)
{
	__builtin_memset(ends, 0, sizeof(*ends));
	read_addresses(ends, sk);
	if (is_loopback(ends))
		ends->netns = netns_of(sk);
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

static __always_inline bool is_tcp(const struct sock *sk)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP;
}

/* The connection that a socket stands for: of a Multipath TCP one, its first. */
static __always_inline struct sock *first_connection(struct sock *sk)
{
	struct mptcp_sock *multipath = (void *)sk;

	if (bpf_core_type_exists(struct mptcp_sock) &&
	    BPF_CORE_READ(sk, sk_protocol) == IPPROTO_MPTCP)
		return BPF_CORE_READ(multipath, first);
	return sk;
}

static __always_inline struct socket *socket_of_fd(int fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct file *file = file_of_fd(task, fd);

	return BPF_CORE_READ(file, private_data);
}

/* Whether an event of `owner` between `ends` is to be reported. */
static __always_inline bool admits_net(const struct event_header *owner, enum event_kind kind,
				       struct endpoints *ends)
{
	__u8 *local, *remote;
	bool keep;

	if (!enabled(kind) || bpf_map_lookup_elem(&agent_peers, ends))
		return false;
	if (!admits(owner, kind))
		return false;
	if (settings.filter_port == FILTER_OFF)
		return true;
	local = bpf_map_lookup_elem(&filter_ports, &ends->local_port);
	remote = bpf_map_lookup_elem(&filter_ports, &ends->remote_port);
	if ((local && *local == VERDICT_DROP) || (remote && *remote == VERDICT_DROP))
		keep = false;
	else
		keep = settings.filter_port == FILTER_EXCLUDE || local || remote;
	if (!keep)
		count_filtered(kind);
	return keep;
}

#define COPY_ENDPOINTS(record, ends)                                               \
	do {                                                                       \
		(record)->ip_version = (ends)->ip_version;                         \
		(record)->local_port = (ends)->local_port;                         \
		(record)->remote_port = (ends)->remote_port;                       \
		__builtin_memcpy((record)->local_addr, (ends)->local_addr, 16);    \
		__builtin_memcpy((record)->remote_addr, (ends)->remote_addr, 16);  \
	} while (0)

static __always_inline void emit_connect(const struct event_header *owner, const struct sock *sk,
					 struct endpoints *ends, __u64 since_boot_ns, __u32 errno)
{
	struct event_header header = *owner;
	struct net_connect *record;

	header.boot_ns = bpf_ktime_get_boot_ns();
	if (!admits_net(&header, KIND_NET_CONNECT, ends))
		return;
	record = begin(&bulk, &header, KIND_NET_CONNECT, STREAM_BULK, sizeof(*record));
	if (!record)
		return;
	record->latency_ns = since_boot_ns ? header.boot_ns - since_boot_ns : 0;
	record->errno = errno;
	record->netns = netns_of(sk);
	record->direction = DIRECTION_OUTBOUND;
	COPY_ENDPOINTS(record, ends);
	submit(&bulk, STREAM_BULK, record);
}

static __always_inline void emit_close(const struct connection *connection, const struct sock *sk,
				       struct endpoints *ends)
{
	const struct tcp_sock *tcp = (const void *)sk;
	struct event_header header = connection->owner;
	struct net_close *record;
	__u64 sent, received;

	header.boot_ns = bpf_ktime_get_boot_ns();
	if (!admits_net(&header, KIND_NET_CLOSE, ends))
		return;
	record = begin(&bulk, &header, KIND_NET_CLOSE, STREAM_BULK, sizeof(*record));
	if (!record)
		return;
	if (connection->since_boot_ns)
		record->duration_ns = header.boot_ns - connection->since_boot_ns;
	/* bytes_sent counts payload, each retransmission again; bytes_received counts the peer's
	 * FIN as a byte (tcp_rcv_nxt_update over end_seq). */
	sent = BPF_CORE_READ(tcp, bytes_sent) - BPF_CORE_READ(tcp, bytes_retrans);
	received = BPF_CORE_READ(tcp, bytes_received);
	if (received && BPF_CORE_READ(sk, __sk_common.skc_flags) & (1UL << SOCK_DONE))
		received--;
	record->bytes_sent = sent;
	record->bytes_received = received;
	record->errno = BPF_CORE_READ(sk, sk_err);
	record->netns = netns_of(sk);
	record->direction = connection->direction;
	COPY_ENDPOINTS(record, ends);
	submit(&bulk, STREAM_BULK, record);
}

static __always_inline void remember(__u64 key, struct connection *connection)
{
	/* A full table costs the owner of this connection: its close is reported with none. */
	bpf_map_update_elem(&connections, &key, connection, BPF_ANY);
}

static __always_inline void remember_agent_peer(const struct endpoints *ends)
{
	struct endpoints peer;
	__u8 one = 1;

	turn_round(&peer, ends);
	bpf_map_update_elem(&agent_peers, &peer, &one, BPF_ANY);
}

/* A SYN is about to be sent: the current task is connecting. */
static __always_inline void on_syn(const struct sock *sk)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct connect_call *call = bpf_map_lookup_elem(&connect_calls, &id);
	struct connection connection = { .direction = DIRECTION_OUTBOUND };

	identify_current(&connection.owner);
	connection.since_boot_ns = connection.owner.boot_ns;
	if (call) {
		call->sock = (__u64)sk;
		connection.since_boot_ns = call->boot_ns;
	}
	remember((__u64)sk, &connection);
}

static __always_inline void on_connected(const struct sock *sk, struct endpoints *ends)
{
	__u64 key = (__u64)sk;
	struct connection *known = bpf_map_lookup_elem(&connections, &key);
	struct connection unknown = { .direction = DIRECTION_OUTBOUND };

	if (!known) {
		emit_connect(&unknown.owner, sk, ends, 0, 0);
		unknown.since_boot_ns = bpf_ktime_get_boot_ns();
		remember(key, &unknown);
		return;
	}
	if (known->owner.pid == agent_pid)
		remember_agent_peer(ends);
	emit_connect(&known->owner, sk, ends, known->since_boot_ns, 0);
	known->since_boot_ns = bpf_ktime_get_boot_ns();
}

static __always_inline void on_connect_failed(const struct sock *sk, struct endpoints *ends)
{
	__u64 id = bpf_get_current_pid_tgid(), key = (__u64)sk;
	struct connection *known = bpf_map_lookup_elem(&connections, &key);
	struct connect_call *call = bpf_map_lookup_elem(&connect_calls, &id);
	struct connection unknown = {};
	int error = BPF_CORE_READ(sk, sk_err);

	if (!error && call && call->sock == key) {
		call->failed = 1; /* no port or no route was found after all: connect() will say */
		goto out;
	}
	if (!error)
		error = ECONNABORTED; /* closed by its owner while connecting */
	if (known)
		emit_connect(&known->owner, sk, ends, known->since_boot_ns, error);
	else
		emit_connect(&unknown.owner, sk, ends, 0, error);
out:
	bpf_map_delete_elem(&connections, &key);
}

/* Both ends sent a SYN before they had the other's: the socket connects all the same. */
static __always_inline bool opens_simultaneously(const struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct connection *known = bpf_map_lookup_elem(&connections, &key);

	return known && known->direction == DIRECTION_OUTBOUND;
}

/* An inbound connection is complete, and waits to be accepted. */
static __always_inline void on_inbound(const struct sock *sk, const struct endpoints *ends)
{
	struct listener_key key = { .netns = netns_of(sk), .port = ends->local_port };
	struct event_header *listener = bpf_map_lookup_elem(&listeners, &key);
	struct connection connection = {
		.direction = DIRECTION_INBOUND,
		.since_boot_ns = bpf_ktime_get_boot_ns(),
	};

	__u64 socket = (__u64)sk;

	/* With Fast Open it can have been accepted before it was complete. */
	if (bpf_map_lookup_elem(&connections, &socket))
		return;
	if (listener)
		connection.owner = *listener;
	remember(socket, &connection);
}

static __always_inline void on_listen(const struct sock *sk, const struct endpoints *ends)
{
	struct listener_key key = { .netns = netns_of(sk), .port = ends->local_port };
	struct event_header owner;

	identify_current(&owner);
	bpf_map_update_elem(&listeners, &key, &owner, BPF_ANY);
}

/* The owner begins to close a connection that is older than the agent. */
static __always_inline void on_closing(const struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct connection connection = {};

	if (bpf_map_lookup_elem(&connections, &key))
		return;
	identify_current(&connection.owner);
	remember(key, &connection);
}

static __always_inline void on_closed(const struct sock *sk, struct endpoints *ends)
{
	__u64 key = (__u64)sk;
	struct connection *known = bpf_map_lookup_elem(&connections, &key);
	struct connection unknown = {};

	emit_close(known ?: &unknown, sk, ends);
	if (known)
		bpf_map_delete_elem(&connections, &key);
	bpf_map_delete_elem(&agent_peers, ends);
}

/* Never complete: of interest only if Fast Open let it be accepted all the same. */
static __always_inline void on_aborted(const struct sock *sk, struct endpoints *ends)
{
	__u64 key = (__u64)sk;

	if (bpf_map_lookup_elem(&connections, &key))
		on_closed(sk, ends);
}

/*
 * The kernel does not run a program inside itself on one CPU. But a system call's change of state
 * can be interrupted by packets and their changes, on a busy machine about one in a hundred times.
 * So there are two programs: the first to see a change handles it and leaves a note, by which the
 * other knows. What interrupts one of them is handled by the other alone.
 */
#define TWINS 2
#define NOTES 8 /* room for some that are never picked up */

struct notes {
	__u64 changes[TWINS][NOTES];
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
static __always_inline __u64 change_of(const struct sock *sk, const struct endpoints *ends,
				       int from, int to)
{
	__u64 ports = (__u64)ends->local_port << 16 | ends->remote_port;

	return ((__u64)sk << 8 | (from & 15) << 4 | (to & 15)) ^ ports << 32;
}

static __always_inline bool first_to_see(volatile struct notes *here, __u64 change,
					 const __u32 me)
{
	const __u32 twin = 1 - me;
	__u32 i, free = NOTES;

#pragma unroll
	for (i = 0; i < NOTES; i++) {
		if (here->changes[twin][i] == change) {
			here->changes[twin][i] = 0;
			return false;
		}
		if (free == NOTES && !here->changes[me][i])
			free = i;
	}
	if (here->busy[twin]) /* this interrupts it: it will not come to see */
		return true;
	if (free == NOTES)
		free = here->next[me]++;
	here->changes[me][free % NOTES] = change;
	return true;
}

static __always_inline void change_state(const struct sock *sk, struct endpoints *ends, int from,
					 int to)
{
	if (from == TCP_SYN_RECV && opens_simultaneously(sk))
		from = TCP_SYN_SENT;
	if (to == TCP_SYN_SENT)
		on_syn(sk);
	else if (from == TCP_SYN_SENT && to == TCP_ESTABLISHED)
		on_connected(sk, ends);
	else if (from == TCP_SYN_SENT && to == TCP_CLOSE)
		on_connect_failed(sk, ends);
	else if (from == TCP_SYN_RECV && to == TCP_ESTABLISHED)
		on_inbound(sk, ends);
	else if (to == TCP_LISTEN)
		on_listen(sk, ends);
	else if (to == TCP_FIN_WAIT1 || to == TCP_LAST_ACK)
		on_closing(sk);
	else if (to == TCP_CLOSE && from == TCP_SYN_RECV)
		on_aborted(sk, ends);
	else if (to == TCP_CLOSE && from != TCP_LISTEN && from != TCP_CLOSE)
		on_closed(sk, ends);
}

static __always_inline int sock_state(const struct sock *sk, int from, int to, const __u32 me)
{
	volatile struct notes *here;
	struct endpoints ends;
	__u32 zero = 0;

	here = bpf_map_lookup_elem(&notes, &zero);
	if (!here)
		return 0;
	here->busy[me] = 1;
	if (is_tcp(sk)) {
		read_endpoints(&ends, sk);
		if (first_to_see(here, change_of(sk, &ends, from, to), me))
			change_state(sk, &ends, from, to);
	}
	here->busy[me] = 0;
	return 0;
}

SEC("raw_tp/inet_sock_set_state") EMITS("net.connect,net.close")
int BPF_PROG(on_sock_state, const struct sock *sk, int from, int to)
{
	return sock_state(sk, from, to, 0);
}

SEC("raw_tp/inet_sock_set_state") EMITS("net.connect,net.close")
DOC("changes of state that interrupt another one")
int BPF_PROG(on_sock_state_twin, const struct sock *sk, int from, int to)
{
	return sock_state(sk, from, to, 1);
}

SEC("tracepoint/syscalls/sys_enter_connect") EMITS("net.connect")
DOC("connects that fail before a SYN is sent (no route, no free port)")
int on_connect_enter(struct trace_event_raw_sys_enter *ctx)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct connect_call call = { .boot_ns = bpf_ktime_get_boot_ns(), .fd = ctx->args[0] };
	__u64 length = ctx->args[2];
	struct event_header owner;
	struct socket *socket;
	struct sock *sk;
	__u16 family;

	if (length > sizeof(call.addr))
		length = sizeof(call.addr);
	bpf_probe_read_user(&call.addr, length, (void *)ctx->args[1]);
	family = *(__u16 *)call.addr;
	if (family != AF_INET && family != AF_INET6)
		return 0;
	socket = socket_of_fd(call.fd);
	/* Of a socket that is connecting already, connect() asks for news: no new attempt. */
	if (BPF_CORE_READ(socket, state) != SS_UNCONNECTED)
		return 0;
	sk = first_connection(BPF_CORE_READ(socket, sk));
	if (!is_tcp(sk))
		return 0;
	if (bpf_map_update_elem(&connect_calls, &id, &call, BPF_ANY)) {
		identify_current(&owner);
		if (admits(&owner, KIND_NET_CONNECT))
			lose(&owner, KIND_NET_CONNECT, STREAM_BULK);
	}
	return 0;
}

static __always_inline void read_wanted(struct endpoints *ends, const struct connect_call *call)
{
	const struct sockaddr_in *in = (const void *)call->addr;
	const struct sockaddr_in6 *in6 = (const void *)call->addr;

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

SEC("tracepoint/syscalls/sys_exit_connect") EMITS("net.connect")
DOC("connects that fail before a SYN is sent (no route, no free port)")
int on_connect_exit(struct trace_event_raw_sys_exit *ctx)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct connect_call *call = bpf_map_lookup_elem(&connect_calls, &id);
	struct event_header owner;
	struct endpoints ends;
	struct socket *socket;
	struct sock *sk;
	long result = ctx->ret;

	if (!call)
		return 0;
	if (result < 0 && result != -EINPROGRESS && (!call->sock || call->failed)) {
		socket = socket_of_fd(call->fd);
		sk = first_connection(BPF_CORE_READ(socket, sk));
		read_endpoints(&ends, sk);
		read_wanted(&ends, call);
		identify_current(&owner);
		emit_connect(&owner, sk, &ends, call->boot_ns, -result);
	}
	bpf_map_delete_elem(&connect_calls, &id);
	return 0;
}

/* From now on the connection belongs to the current task. */
static __always_inline void take_over(const struct sock *sk, const struct event_header *owner)
{
	__u64 key = (__u64)sk;
	struct connection *known = bpf_map_lookup_elem(&connections, &key);
	struct connection connection = { .direction = DIRECTION_INBOUND };

	if (known)
		connection = *known;
	else if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_CLOSE)
		return; /* reset before it was accepted */
	connection.owner = *owner;
	/* Not in place: the entry may be another socket's by now. */
	bpf_map_update_elem(&connections, &key, &connection, known ? BPF_EXIST : BPF_ANY);
}

static __always_inline int accepted(long fd)
{
	struct net_accept *record;
	struct event_header header;
	struct endpoints ends;
	struct socket *socket;
	struct sock *sk;

	if (fd < 0)
		return 0;
	socket = socket_of_fd(fd);
	sk = first_connection(BPF_CORE_READ(socket, sk));
	if (!is_tcp(sk))
		return 0;
	read_endpoints(&ends, sk);
	identify_current(&header);
	take_over(sk, &header);
	if (!admits_net(&header, KIND_NET_ACCEPT, &ends))
		return 0;
	record = begin(&bulk, &header, KIND_NET_ACCEPT, STREAM_BULK, sizeof(*record));
	if (!record)
		return 0;
	record->fd = fd;
	record->netns = netns_of(sk);
	record->direction = DIRECTION_INBOUND;
	COPY_ENDPOINTS(record, &ends);
	submit(&bulk, STREAM_BULK, record);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_accept") EMITS("net.accept,net.close")
DOC("connections taken by accept(), and their owner at the close,")
int on_accept_exit(struct trace_event_raw_sys_exit *ctx)
{
	return accepted(ctx->ret);
}

SEC("tracepoint/syscalls/sys_exit_accept4") EMITS("net.accept,net.close")
DOC("connections taken by accept4(), and their owner at the close,")
int on_accept4_exit(struct trace_event_raw_sys_exit *ctx)
{
	return accepted(ctx->ret);
}
