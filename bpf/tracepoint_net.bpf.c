// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * net.listen, net.bind, net.retransmit, net.drop, net.udp: what shows how a network is used, and what
 * is wrong with it.
 *
 * Whose a TCP connection is, net.bpf.c keeps: retransmissions happen in a softirq, where the current
 * task is whoever was interrupted. A UDP socket is counted in itself, by whoever sends and receives.
 */
#include "core/sock.bpf.h"
#include "core/tables.h"
#include "core/packet.h"

char LICENSE[] SEC("license") = "GPL";

/* A program is loaded only where its kind is wanted: others would pay for it at every packet. */
#define WANTED(kind) "option:kind." kind

/* ---------------------------------------------------------------- bind() and listen() */

static __always_inline __u8 transport_of(struct sock *sk)
{
	__u16 family = READ(struct sock, sk, __sk_common.skc_family);
	__u16 protocol = READ(struct sock, sk, sk_protocol);

	if (family != AF_INET && family != AF_INET6)
		return TRANSPORT_NONE;
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP)
		return TRANSPORT_TCP;
	return protocol == IPPROTO_UDP ? TRANSPORT_UDP : TRANSPORT_NONE;
}

static __always_inline bool reuses_port(struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD_PROBED(&sk->__sk_common, skc_reuseport);
}

/* The address of a socket that has no peer. */
static __always_inline void read_local(struct endpoints *ends, struct sock *sk)
{
	read_endpoints(ends, sk);
	if (ends->ip_version == 6 && is_mapped(ends->local_addr)) {
		ends->ip_version = 4;
		unmap_addr(ends->local_addr);
	}
}

struct asked_address {
	__u8 bytes[28]; /* struct sockaddr_in or sockaddr_in6 */
};

/* Only where it failed does what was asked for stand for the address: the memory is the user's. */
static __always_inline void take_asked(struct endpoints *ends, const struct asked_address *asked)
{
	const struct sockaddr_in *in = (const void *)asked->bytes;
	const struct sockaddr_in6 *in6 = (const void *)asked->bytes;

	ends->local_port = 0;
	__builtin_memset(ends->local_addr, 0, 16);
	if (in->family == AF_INET6) {
		ends->ip_version = 6;
		__builtin_memcpy(ends->local_addr, in6->addr, 16);
	} else {
		ends->ip_version = 4;
		__builtin_memcpy(ends->local_addr, in->addr, 4);
	}
	if (ends->ip_version == 6 && is_mapped(ends->local_addr)) {
		ends->ip_version = 4;
		unmap_addr(ends->local_addr);
	}
}

static __always_inline int bound(void *ctx, long result, struct pt_regs___user *registers)
{
	struct asked_address asked = {};
	struct call_arguments passed;
	struct net_bind *record;
	struct event_base base;
	struct endpoints ends;
	struct socket *socket;
	struct owner owner;
	struct sock *sk;
	__u8 transport;
	__u64 length;
	__u16 port;

	if (!enabled(KIND_NET_BIND))
		return 0;
	passed = call_arguments(registers);
	socket = socket_of_fd(passed.at[0]);
	if (!socket)
		return 0;
	sk = READ(struct socket, socket, sk);
	transport = transport_of(sk);
	if (transport == TRANSPORT_NONE)
		return 0;
	start_base(&base);
	length = passed.at[2];
	if (length > sizeof(asked.bytes))
		length = sizeof(asked.bytes);
	if (bpf_probe_read_user(asked.bytes, length, (void *)passed.at[1]) && !result) {
		base.flags |= FLAG_INCOMPLETE;
		count_fault(FAULT_UNREADABLE);
	}
	port = bpf_ntohs(((const struct sockaddr_in *)asked.bytes)->port);
	read_local(&ends, sk);
	if (result < 0) {
		take_asked(&ends, &asked);
		ends.local_port = port; /* by which it is filtered */
	}
	own(&owner);
	if (!admits_net(&base, &owner, KIND_NET_BIND, &ends, DIRECTION_INBOUND))
		return 0;
	record = begin(&bulk, &base, KIND_NET_BIND, RING_BULK, sizeof(*record));
	if (!record)
		return 0;
	record->task = owner.task;
	record->errno = errno_of(result);
	record->netns = ends.netns;
	record->asked_port = port;
	record->local_port = result < 0 ? 0 : ends.local_port;
	record->ip_version = ends.ip_version;
	record->transport = transport;
	record->reuse_port = reuses_port(sk);
	record->pad = 0;
	__builtin_memcpy(record->local_addr, ends.local_addr, 16);
	submit(ctx, &bulk, RING_BULK, record);
	return 0;
}

static __always_inline int listened(void *ctx, long result, struct pt_regs___user *registers)
{
	struct call_arguments passed;
	struct net_listen *record;
	struct event_base base;
	struct endpoints ends;
	struct socket *socket;
	struct owner owner;
	struct sock *sk;

	if (!enabled(KIND_NET_LISTEN))
		return 0;
	passed = call_arguments(registers);
	socket = socket_of_fd(passed.at[0]);
	if (!socket)
		return 0;
	sk = READ(struct socket, socket, sk);
	if (transport_of(sk) != TRANSPORT_TCP)
		return 0;
	read_local(&ends, sk);
	own(&owner);
	start_base(&base);
	if (!admits_net(&base, &owner, KIND_NET_LISTEN, &ends, DIRECTION_INBOUND))
		return 0;
	record = begin(&bulk, &base, KIND_NET_LISTEN, RING_BULK, sizeof(*record));
	if (!record)
		return 0;
	record->task = owner.task;
	record->errno = errno_of(result);
	record->netns = ends.netns;
	record->backlog_asked = passed.at[1];
	record->backlog = result < 0 ? 0 : READ(struct sock, first_connection(sk), sk_max_ack_backlog);
	record->local_port = ends.local_port;
	record->ip_version = ends.ip_version;
	record->reuse_port = reuses_port(sk);
	record->pad = 0;
	__builtin_memcpy(record->local_addr, ends.local_addr, 16);
	submit(ctx, &bulk, RING_BULK, record);
	return 0;
}

/* At the return of the function behind the call, so as not to tax every other system call; see
 * ON_OPEN in file.bpf.c. */
#define ON_CALL(name, kind, body)                                                         \
	SEC("fexit/" SYSTEM_CALL(name)) HOOK(#name) EMITS(kind) NEEDS(WANTED(kind))       \
	int BPF_PROG(on_##name, struct pt_regs___user *unused, long result)               \
	{                                                                                 \
		return UNPREEMPTED(body(ctx, result, user_registers()));                       \
	}                                                                                 \
	SEC("tracepoint/syscalls/sys_exit_" #name) HOOK(#name) EMITS(kind) NEEDS(WANTED(kind)) \
	int on_##name##_exit(struct trace_event_raw_sys_exit *ctx)                        \
	{                                                                                 \
		return AMONG_OTHERS(UNPREEMPTED(body(ctx, ctx->ret, user_registers())));       \
	}

ON_CALL(bind, "net.bind", bound)
ON_CALL(listen, "net.listen", listened)

/* ---------------------------------------------------------------- retransmissions */

enum content {
	CONTENT_DATA = 0,
	CONTENT_SYN = 1,
	CONTENT_SYN_ACK = 2,
	CONTENT_FIN = 3,
};

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_ACK 0x10

struct retransmission {
	__u32 segments;
	__u32 bytes;
	__u8 state;
	__u8 congestion;
	__u8 content;
	__u8 direction;
	__u8 pad[4];
};

static __noinline void emit_retransmit(void *ctx, const struct owner *owner,
				       struct endpoints *ends,
				       const struct retransmission *what)
{
	struct net_retransmit *record;
	struct event_base base;

	start_base(&base);
	if (!admits_net(&base, owner, KIND_NET_RETRANSMIT, ends, what->direction))
		return;
	record = begin(&bulk, &base, KIND_NET_RETRANSMIT, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = owner->task;
	record->owner_known = owner->known;
	record->segments = what->segments;
	record->bytes = what->bytes;
	record->state = what->state;
	record->congestion = what->congestion;
	record->content = what->content;
	record->direction = what->direction;
	record->pad = 0;
	COPY_ENDPOINTS(record, ends);
	submit(ctx, &bulk, RING_BULK, record);
}

static __always_inline __u8 content_of(__u8 flags)
{
	if (flags & TCP_FLAG_SYN)
		return flags & TCP_FLAG_ACK ? CONTENT_SYN_ACK : CONTENT_SYN;
	return flags & TCP_FLAG_FIN ? CONTENT_FIN : CONTENT_DATA;
}

/* Of a connection that nobody saw begin its state may tell. */
static __always_inline __u8 direction_of(struct sock *sk, __u8 state, const bool typed)
{
	struct connection *known = find(sk, typed);

	if (state == TCP_SYN_SENT)
		return DIRECTION_OUTBOUND;
	return known ? known->direction : DIRECTION_UNKNOWN;
}

static __always_inline int retransmitted(void *ctx, struct sock *sk, struct sk_buff *skb,
					 const bool typed)
{
	struct inet_connection_sock *connection = (void *)sk;
	struct retransmission what = {};
	struct tcp_skb_cb *control;
	struct endpoints ends;
	struct owner owner;

	if (!enabled(KIND_NET_RETRANSMIT))
		return 0;
	control = (void *)skb + bpf_core_field_offset(struct sk_buff, cb);
	what.segments = READ(struct tcp_skb_cb, control, tcp_gso_segs);
	what.bytes = READ(struct sk_buff, skb, len);
	what.state = READ(struct sock, sk, __sk_common.skc_state);
	what.congestion = BPF_CORE_READ_BITFIELD_PROBED(connection, icsk_ca_state);
	what.content = content_of(READ(struct tcp_skb_cb, control, tcp_flags));
	what.direction = direction_of(sk, what.state, typed);
	read_endpoints(&ends, sk);
	owner_of(&owner, sk, typed);
	emit_retransmit(ctx, &owner, &ends, &what);
	return 0;
}

/* From 6.16 on ("tcp: trace retransmit failures in tcp_retransmit_skb()") with an error, also of what
 * could not be sent; before, only of what was. */
static __always_inline int retransmitted_or_not(void *ctx, struct sock *sk,
						struct sk_buff *skb, int error,
						const bool typed)
{
	return error ? 0 : retransmitted(ctx, sk, skb, typed);
}

/* Whose a request for a connection is: the listener's. */
static __always_inline void owner_of_listener(struct owner *owner, struct sock *sk,
					      const bool typed)
{
	struct connection *listener;
	__u64 key;

	if (typed) {
		listener = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	} else {
		key = listener_by_port(sk);
		listener = bpf_map_lookup_elem(&listeners, &key);
	}
	*owner = listener ? listener->owner : nothing.owner;
}

static __always_inline int retransmitted_synack(void *ctx, struct sock *sk,
						struct request_sock *request, const bool typed)
{
	struct retransmission what = {};
	struct endpoints ends;
	struct owner owner;

	if (!enabled(KIND_NET_RETRANSMIT))
		return 0;
	/* A request begins as every socket does, but with no port where those have it. */
	read_endpoints(&ends, (struct sock *)request);
	ends.local_port = READ(struct request_sock, request, __req_common.skc_num);
	what.segments = 1;
	what.state = TCP_NEW_SYN_RECV;
	what.content = CONTENT_SYN_ACK;
	what.direction = DIRECTION_INBOUND;
	owner_of_listener(&owner, sk, typed);
	emit_retransmit(ctx, &owner, &ends, &what);
	return 0;
}

#define ON_RETRANSMIT(name, section, body)                                                    \
	SEC(section) HOOK("retransmit") EMITS("net.retransmit") NEEDS(WANTED("net.retransmit")) \
	int BPF_PROG(name, struct sock *sk, struct sk_buff *skb, int error)                   \
	{                                                                                     \
		return UNPREEMPTED(body);                                                     \
	}

ON_RETRANSMIT(on_retransmit, "tp_btf/tcp_retransmit_skb",
	      retransmitted_or_not(ctx, sk, skb, error, TYPED))
ON_RETRANSMIT(on_retransmit_untyped, "raw_tp/tcp_retransmit_skb",
	      retransmitted_or_not(ctx, sk, skb, error, UNTYPED))
ON_RETRANSMIT(on_retransmit_sent, "tp_btf/tcp_retransmit_skb", retransmitted(ctx, sk, skb, TYPED))
ON_RETRANSMIT(on_retransmit_sent_untyped, "raw_tp/tcp_retransmit_skb",
	      retransmitted(ctx, sk, skb, UNTYPED))

#define ON_RETRANSMIT_SYNACK(name, section, typed)                                  \
	SEC(section) HOOK("retransmit_synack") EMITS("net.retransmit")              \
	NEEDS(WANTED("net.retransmit")) DOC("retransmissions of SYN-ACKs")          \
	int BPF_PROG(name, struct sock *sk, struct request_sock *request)           \
	{                                                                           \
		return UNPREEMPTED(retransmitted_synack(ctx, sk, request, typed));       \
	}

ON_RETRANSMIT_SYNACK(on_retransmit_synack, "tp_btf/tcp_retransmit_synack", TYPED)
ON_RETRANSMIT_SYNACK(on_retransmit_synack_untyped, "raw_tp/tcp_retransmit_synack", UNTYPED)

/* ---------------------------------------------------------------- drops */

/* How many drops of one reason each CPU reports in a second. */
OPTION(drops_per_second);
/* Whether those without a reason are reported, too. */
OPTION(unspecified_drops);

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ONE_SECOND 1000000000ull
#define MOST_WEIGHT (1u << 20)

enum skb_drop_reason {
	SKB_DROP_REASON_NOT_SPECIFIED,
};

struct reason_name {
	char name[REASON_LEN];
};

/* The core's own; those of its subsystems have numbers from 1 << 16 on, and names in modules. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 512);
	__type(key, __u32);
	__type(value, struct reason_name);
} drop_reasons SEC(".maps") NAMED("skb_drop_reason");

struct drop_limit {
	__u64 since_boot_ns;
	__u64 reported; /* since then */
	__u64 left_out; /* in all */
	__u64 told;     /* how many of those are in the weight of one that was reported */
};

#define DROP_LIMITS 256

/* By reason; those of subsystems share the last one. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_LIMITS);
	__type(key, __u32);
	__type(value, struct drop_limit);
} drop_limits SEC(".maps");

struct packet {
	struct endpoints ends; /* local: of whom it is, remote: for whom */
	__u32 ifindex;
	__u32 length;
	__u8 transport;
	__u8 incomplete;
	__u8 pad[6];
	struct net_device *device;
};

static __always_inline __u8 transport_by_number(__u8 protocol)
{
	switch (protocol) {
	case 1:
		return TRANSPORT_ICMP;
	case 2:
		return TRANSPORT_IGMP;
	case 4:
		return TRANSPORT_IPV4;
	case 6:
		return TRANSPORT_TCP;
	case 17:
		return TRANSPORT_UDP;
	case 41:
		return TRANSPORT_IPV6;
	case 47:
		return TRANSPORT_GRE;
	case 50:
		return TRANSPORT_ESP;
	case 51:
		return TRANSPORT_AH;
	case 58:
		return TRANSPORT_ICMPV6;
	case 89:
		return TRANSPORT_OSPF;
	case 103:
		return TRANSPORT_PIM;
	case 112:
		return TRANSPORT_VRRP;
	case 132:
		return TRANSPORT_SCTP;
	}
	return TRANSPORT_OTHER;
}

/* Copies from a packet, as far as its linear part goes: what is behind it is not the packet's. */
static __always_inline bool copy_header(void *to, struct sk_buff *skb, __u32 at, const __u32 size)
{
	unsigned char *head = READ(struct sk_buff, skb, head);

	if (at + size > READ(struct sk_buff, skb, tail))
		return false;
	if (!bpf_probe_read_kernel(to, size, head + at))
		return true;
	count_fault(FAULT_UNREADABLE);
	return false;
}

static __always_inline void read_ports(struct packet *packet, struct sk_buff *skb, __u32 at)
{
	struct ports ports;

	if (packet->transport != TRANSPORT_TCP && packet->transport != TRANSPORT_UDP &&
	    packet->transport != TRANSPORT_SCTP)
		return;
	if (!copy_header(&ports, skb, at, sizeof(ports))) {
		packet->incomplete = 1;
		return;
	}
	packet->ends.local_port = bpf_ntohs(ports.from);
	packet->ends.remote_port = bpf_ntohs(ports.to);
}

static __always_inline void read_ipv4(struct packet *packet, struct sk_buff *skb, __u32 at)
{
	struct ipv4 header;

	packet->ends.ip_version = 4;
	if (!copy_header(&header, skb, at, sizeof(header)) || header.version_length >> 4 != 4) {
		packet->incomplete = 1;
		return;
	}
	packet->transport = transport_by_number(header.protocol);
	*(__be32 *)packet->ends.local_addr = header.from;
	*(__be32 *)packet->ends.remote_addr = header.to;
	if (!(header.fragment & bpf_htons(IPV4_OFFSET)))
		read_ports(packet, skb, at + (header.version_length & 15) * 4);
}

static __always_inline void read_ipv6(struct packet *packet, struct sk_buff *skb, __u32 at)
{
	struct ipv6 header;

	packet->ends.ip_version = 6;
	if (!copy_header(&header, skb, at, sizeof(header)) ||
	    (header.version_class_label & bpf_htonl(0xf0000000)) != bpf_htonl(0x60000000)) {
		packet->incomplete = 1;
		return;
	}
	packet->transport = transport_by_number(header.next);
	__builtin_memcpy(packet->ends.local_addr, header.from, 16);
	__builtin_memcpy(packet->ends.remote_addr, header.to, 16);
	read_ports(packet, skb, at + sizeof(header));
}

/* Whether that is an address of the kernel's. */
static __always_inline bool is_address(const void *pointer)
{
	return (__u64)pointer >> 56 == 0xff;
}

/* Whether that is a network namespace: each has a loopback device, which is in it. */
static __always_inline bool is_net(struct net *net)
{
	struct net_device *loopback;

	if (!is_address(net))
		return false;
	loopback = READ(struct net, net, loopback_dev);
	return is_address(loopback) && READ(struct net_device, loopback, nd_net.net) == net;
}

/*
 * Where the packet was. Both pointers to it are in unions with what the kernel uses while the packet is
 * in a queue (of a TCP or UDP socket, of fragments), so what is there may be anything: it is believed
 * only where it leads to a network namespace.
 */
static __always_inline void read_place(struct packet *packet, struct sk_buff *skb)
{
	struct net_device *device = READ(struct sk_buff, skb, dev);
	struct sock *sk = READ(struct sk_buff, skb, sk);
	struct net *net;

	packet->device = NULL;
	if (is_address(device)) {
		net = READ(struct net_device, device, nd_net.net);
		if (is_net(net)) {
			packet->device = device;
			packet->ifindex = READ(struct net_device, device, ifindex);
			packet->ends.netns = READ(struct net, net, ns.inum);
			return;
		}
	}
	if (is_address(sk)) {
		net = READ(struct sock, sk, __sk_common.skc_net.net);
		if (is_net(net))
			packet->ends.netns = READ(struct net, net, ns.inum);
	}
}

/* False: it is not an IP packet. */
static __always_inline bool read_packet(struct packet *packet, struct sk_buff *skb)
{
	__u16 type = bpf_ntohs(READ(struct sk_buff, skb, protocol));
	__u32 at = READ(struct sk_buff, skb, network_header);

	if (type != ETH_P_IP && type != ETH_P_IPV6)
		return false;
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->length = READ(struct sk_buff, skb, len);
	read_place(packet, skb);
	if (type == ETH_P_IP)
		read_ipv4(packet, skb, at);
	else
		read_ipv6(packet, skb, at);
	return true;
}

/* Whether it is one of the agent's own connections, from either end. */
static __always_inline bool is_agents(struct endpoints *ends)
{
	struct endpoints turned;

	turn_round(&turned, ends);
	return bpf_map_lookup_elem(&agent_peers, ends) ||
	       bpf_map_lookup_elem(&agent_peers, &turned);
}

static __always_inline bool admits_drop(struct event_base *base, struct packet *packet)
{
	if (is_agents(&packet->ends))
		return false;
	if (!passes_ports(&packet->ends, DIRECTION_OUTBOUND)) {
		count_filtered(KIND_NET_DROP);
		return false;
	}
	base->weight = sample(KIND_NET_DROP);
	return base->weight;
}

/* Keeps down what a flood costs; what is left out is in the weight of the next one. */
static __always_inline bool within_limit(struct event_base *base, __u32 reason)
{
	__u32 index = reason < DROP_LIMITS ? reason : DROP_LIMITS - 1;
	struct drop_limit *limit = bpf_map_lookup_elem(&drop_limits, &index);
	__u64 more;

	if (!limit)
		return true;
	if (base->boot_ns - limit->since_boot_ns >= ONE_SECOND) {
		limit->since_boot_ns = base->boot_ns;
		limit->reported = 0;
	}
	if (limit->reported >= drops_per_second) {
		__sync_fetch_and_add(&limit->left_out, base->weight);
		count_shed(KIND_NET_DROP);
		return false;
	}
	limit->reported++;
	more = limit->left_out - limit->told;
	if ((__s64)more < 0) /* one that interrupted this told the same ones */
		more = 0;
	if (more > MOST_WEIGHT - base->weight)
		more = MOST_WEIGHT - base->weight;
	__sync_fetch_and_add(&limit->told, more);
	base->weight += more;
	return true;
}

static __noinline void emit_drop(void *ctx, struct packet *packet, __u32 reason)
{
	struct reason_name *name = bpf_map_lookup_elem(&drop_reasons, &reason);
	struct net_drop *record;
	struct event_base base;

	start_base(&base);
	if (!admits_drop(&base, packet) || !within_limit(&base, reason))
		return;
	if (packet->incomplete)
		base.flags |= FLAG_INCOMPLETE;
	record = begin(&bulk, &base, KIND_NET_DROP, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->reason_code = reason;
	record->length = packet->length;
	record->netns = packet->ends.netns;
	record->ifindex = packet->ifindex;
	record->source_port = packet->ends.local_port;
	record->destination_port = packet->ends.remote_port;
	record->ip_version = packet->ends.ip_version;
	record->transport = packet->transport;
	record->pad = 0;
	__builtin_memset(record->reason, 0, REASON_LEN);
	if (name)
		__builtin_memcpy(record->reason, name->name, REASON_LEN);
	__builtin_memset(record->interface, 0, INTERFACE_LEN);
	if (packet->device &&
	    bpf_probe_read_kernel(record->interface, INTERFACE_LEN,
				  (void *)packet->device +
					  bpf_core_field_offset(struct net_device, name)))
		count_fault(FAULT_UNREADABLE);
	__builtin_memcpy(record->source_addr, packet->ends.local_addr, 16);
	__builtin_memcpy(record->destination_addr, packet->ends.remote_addr, 16);
	submit(ctx, &bulk, RING_BULK, record);
}

static __always_inline int dropped(void *ctx, struct sk_buff *skb, __u32 reason)
{
	struct packet packet;

	if (enabled(KIND_NET_DROP) && read_packet(&packet, skb))
		emit_drop(ctx, &packet, reason);
	return 0;
}

static __always_inline int dropped_because(void *ctx, struct sk_buff *skb, __u32 reason)
{
	__u32 unspecified = bpf_core_enum_value(enum skb_drop_reason, SKB_DROP_REASON_NOT_SPECIFIED);

	return reason == unspecified && !unspecified_drops ? 0 : dropped(ctx, skb, reason);
}

/* With a reason since 5.17 (c504e5c2f964, "net: skb: introduce kfree_skb_reason()"). */
#define ON_DROP(name, section, body)                                               \
	SEC(section) HOOK("drop") EMITS("net.drop") NEEDS(WANTED("net.drop"))      \
	int BPF_PROG(name, struct sk_buff *skb, void *location, __u32 reason)      \
	{                                                                          \
		return UNPREEMPTED(body);                                          \
	}

#define ON_DROP_UNREASONED(name, section)                                          \
	SEC(section) HOOK("drop") EMITS("net.drop") NEEDS(WANTED("net.drop"))      \
	LACKS("the reasons of drops")                                              \
	int BPF_PROG(name, struct sk_buff *skb)                                    \
	{                                                                          \
		return UNPREEMPTED(dropped(ctx, skb, 0));                               \
	}

ON_DROP(on_drop, "tp_btf/kfree_skb", dropped_because(ctx, skb, reason))
ON_DROP(on_drop_raw, "raw_tp/kfree_skb", dropped_because(ctx, skb, reason))
ON_DROP_UNREASONED(on_drop_unreasoned, "tp_btf/kfree_skb")
ON_DROP_UNREASONED(on_drop_unreasoned_raw, "raw_tp/kfree_skb")

/* ---------------------------------------------------------------- UDP */

/* How long a socket is in use before it is reported, and again. */
OPTION(udp_seconds);

struct udp_socket {
	struct owner owner;
	__u64 since_boot_ns;
	__u64 told_boot_ns; /* when it was last reported; at first since_boot_ns */
	__u64 datagrams_sent;
	__u64 bytes_sent;
	__u64 datagrams_received;
	__u64 bytes_received;
	__u64 send_errors;
	__u32 inode;
	__u16 remote_port; /* of whom it last sent to, while it is not connected */
	__u8 remote_version;
	__u8 direction;
	__u8 remote_addr[16];
};

/* With the socket, where the program may keep something there. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct udp_socket);
} udp_kept SEC(".maps");

/* By the address of the struct sock: of those that have no room, and on kernels before 5.11 all. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct udp_socket);
} udp_sockets SEC(".maps") SIZED("table:udp_sockets");

static __always_inline bool is_udp(struct sock *sk)
{
	__u16 family = READ(struct sock, sk, __sk_common.skc_family);

	return READ(struct sock, sk, sk_protocol) == IPPROTO_UDP &&
	       (family == AF_INET || family == AF_INET6);
}

static __always_inline struct udp_socket *find_udp(struct sock *sk, const bool typed)
{
	struct udp_socket *kept = typed ? bpf_sk_storage_get(&udp_kept, sk, NULL, 0) : NULL;
	__u64 key = (__u64)sk;

	return kept ?: bpf_map_lookup_elem(&udp_sockets, &key);
}

static __noinline void first_use(struct udp_socket *made, struct sock *sk, __u32 direction)
{
	__builtin_memset(made, 0, sizeof(*made));
	own(&made->owner);
	made->since_boot_ns = bpf_ktime_get_boot_ns();
	made->told_boot_ns = made->since_boot_ns;
	made->inode = READ(struct sock, sk, sk_socket, file, f_inode, i_ino);
	made->direction = direction;
}

/* Whole, not in place: another CPU may be doing the same. */
static __always_inline struct udp_socket *make_udp(struct sock *sk, __u32 direction,
						   const bool typed)
{
	struct udp_socket made, *kept = NULL;
	__u64 key = (__u64)sk;

	first_use(&made, sk, direction);
	if (typed) {
		kept = bpf_sk_storage_get(&udp_kept, sk, &made, BPF_SK_STORAGE_GET_F_CREATE);
		if (kept)
			return kept;
		count_fault(FAULT_SOCKET_STORAGE);
	}
	bpf_map_update_elem(&udp_sockets, &key, &made, BPF_NOEXIST);
	kept = bpf_map_lookup_elem(&udp_sockets, &key);
	if (!kept)
		count_fault(FAULT_UDP_FULL);
	return kept;
}

static __always_inline __u64 drops_of(struct sock *sk)
{
	struct numa_drop_counters *counters;

	if (bpf_core_field_exists(struct sock, sk_drop_counters)) {
		counters = READ(struct sock, sk, sk_drop_counters);
		if (counters)
			return (__u32)READ(struct numa_drop_counters, counters, drops0.counter) +
			       (__u32)READ(struct numa_drop_counters, counters, drops1.counter);
	}
	return (__u32)READ(struct sock, sk, sk_drops.counter);
}

static __always_inline bool add_peer(struct endpoints *ends, const struct udp_socket *kept)
{
	if (ends->remote_port)
		return true;
	if (!kept->remote_port)
		return false;
	if (ends->ip_version == 6 && kept->remote_version == 4)
		unmap_addr(ends->local_addr); /* of an IPv6 socket that speaks IPv4, too */
	ends->remote_port = kept->remote_port;
	ends->ip_version = kept->remote_version;
	__builtin_memcpy(ends->remote_addr, kept->remote_addr, 16);
	return false;
}

static __noinline void emit_udp(void *ctx, const struct udp_socket *kept, struct sock *sk,
				__u32 closed)
{
	struct net_udp *record;
	struct event_base base;
	struct endpoints ends;
	bool connected;

	start_base(&base);
	read_local(&ends, sk);
	connected = add_peer(&ends, kept);
	if (!admits_net(&base, &kept->owner, KIND_NET_UDP, &ends, kept->direction))
		return;
	record = begin(&bulk, &base, KIND_NET_UDP, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = kept->owner.task;
	record->owner_known = 1;
	record->duration_ns = base.boot_ns - kept->since_boot_ns;
	record->datagrams_sent = kept->datagrams_sent;
	record->bytes_sent = kept->bytes_sent;
	record->datagrams_received = kept->datagrams_received;
	record->bytes_received = kept->bytes_received;
	record->send_errors = kept->send_errors;
	record->drops = drops_of(sk);
	record->inode = kept->inode;
	record->direction = kept->direction;
	record->connected = connected;
	record->closed = closed;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	COPY_ENDPOINTS(record, &ends);
	submit(ctx, &bulk, RING_BULK, record);
}

static __always_inline void tell_in_time(void *ctx, struct udp_socket *kept, struct sock *sk)
{
	__u64 now = bpf_ktime_get_boot_ns();

	if (now - kept->told_boot_ns < udp_seconds * ONE_SECOND)
		return;
	kept->told_boot_ns = now; /* another CPU may do so as well: it tells the same */
	emit_udp(ctx, kept, sk, 0);
}

/* `result`: bytes, or an error. */
static __always_inline struct udp_socket *count_sent(struct sock *sk, long result,
						     const bool typed)
{
	struct udp_socket *kept = find_udp(sk, typed) ?: make_udp(sk, DIRECTION_OUTBOUND, typed);

	if (!kept)
		return NULL;
	if (result < 0) {
		count(&kept->send_errors);
	} else {
		count(&kept->datagrams_sent);
		__sync_fetch_and_add(&kept->bytes_sent, result);
	}
	return kept;
}

static __always_inline void count_received(void *ctx, struct sock *sk, __u64 bytes,
					   const bool typed)
{
	struct udp_socket *kept = find_udp(sk, typed) ?: make_udp(sk, DIRECTION_INBOUND, typed);

	if (!kept)
		return;
	count(&kept->datagrams_received);
	__sync_fetch_and_add(&kept->bytes_received, bytes);
	tell_in_time(ctx, kept, sk);
}

/* The kernel's copy of the address that the datagram was for. */
static __always_inline void note_peer(struct udp_socket *kept, struct msghdr *message)
{
	void *name = READ(struct msghdr, message, msg_name);
	struct asked_address asked = {};
	const struct sockaddr_in *in = (const void *)asked.bytes;
	const struct sockaddr_in6 *in6 = (const void *)asked.bytes;
	int length = READ(struct msghdr, message, msg_namelen);

	if (!name || length < (int)sizeof(*in))
		return; /* it is connected */
	if (bpf_probe_read_kernel(asked.bytes, sizeof(*in), name)) {
		count_fault(FAULT_UNREADABLE);
		return;
	}
	if (in->family != AF_INET6) {
		__builtin_memset(kept->remote_addr, 0, 16);
		__builtin_memcpy(kept->remote_addr, in->addr, 4);
		kept->remote_version = 4;
	} else {
		if (length < 24 || bpf_probe_read_kernel(asked.bytes, 24, name))
			return;
		__builtin_memcpy(kept->remote_addr, in6->addr, 16);
		kept->remote_version = 6;
		if (is_mapped(kept->remote_addr)) {
			unmap_addr(kept->remote_addr);
			kept->remote_version = 4;
		}
	}
	kept->remote_port = bpf_ntohs(in->port);
}

/* An IPv6 socket sends to an IPv4 address through the function for IPv4, within that for IPv6. */
static __always_inline int sent(void *ctx, struct sock *sk, struct msghdr *message,
				long result, const __u16 family, const bool typed)
{
	struct udp_socket *kept;

	if (!enabled(KIND_NET_UDP) || !is_udp(sk) ||
	    READ(struct sock, sk, __sk_common.skc_family) != family)
		return 0;
	kept = count_sent(sk, result, typed);
	if (!kept)
		return 0;
	if (result >= 0)
		note_peer(kept, message);
	tell_in_time(ctx, kept, sk);
	return 0;
}

static __always_inline int sent_by_any(void *ctx, struct sock *sk, long result,
				       const bool typed)
{
	struct udp_socket *kept;

	if (!enabled(KIND_NET_UDP))
		return 0;
	kept = count_sent(sk, result, typed);
	if (kept)
		tell_in_time(ctx, kept, sk);
	return 0;
}

/* A datagram leaves the queue; `length` is negative where it was only looked at. Of one without
 * content that cannot be seen, but then the queue has it as well. */
static __always_inline int consumed(void *ctx, struct sock *sk, struct sk_buff *skb,
				    int length, const bool typed)
{
	if (!enabled(KIND_NET_UDP) || length < 0 || !is_udp(sk) ||
	    (!length && READ(struct sk_buff, skb, users.refs.counter) > 1))
		return 0;
	count_received(ctx, sk, length, typed);
	return 0;
}

#define MSG_PEEK 2
#define RCV_SHUTDOWN 1

static __always_inline int received_by_any(void *ctx, struct sock *sk, int result, int flags,
					   const bool typed)
{
	if (!enabled(KIND_NET_UDP) || result < 0 || flags & MSG_PEEK)
		return 0;
	if (!result && READ(struct sock, sk, sk_shutdown) & RCV_SHUTDOWN)
		return 0; /* nothing will come any more */
	count_received(ctx, sk, result, typed);
	return 0;
}

static __always_inline int closed_udp(void *ctx, struct sock *sk, struct udp_socket *kept)
{
	__u64 key = (__u64)sk;

	if (kept)
		emit_udp(ctx, kept, sk, 1);
	bpf_map_delete_elem(&udp_sockets, &key);
	return 0;
}

static __always_inline int released(void *ctx, struct sock *sk, const bool typed)
{
	if (!is_udp(sk))
		return 0;
	return closed_udp(ctx, sk, find_udp(sk, typed));
}

#define OF_UDP(...) EMITS("net.udp") NEEDS(WANTED("net.udp") "," __VA_ARGS__)
/* Of a socket that nobody was seen to send or receive by, a close makes no record. */
#define CLOSES_UDP(...) COMPLETES("net.udp") NEEDS(WANTED("net.udp") "," __VA_ARGS__)
#define NO_PEERS LACKS("peers of UDP sockets that are not connected")

#define ON_SEND(name, function, family, typed)                                              \
	SEC("fexit/" function) HOOK(function) OF_UDP("fentry")                           \
	DOC("datagrams sent by " function "()")                                             \
	int BPF_PROG(name, struct sock *sk, struct msghdr *message, unsigned long length,   \
		     int result)                                                            \
	{                                                                                   \
		return UNPREEMPTED(sent(ctx, sk, message, result, family, typed));               \
	}

ON_SEND(on_udp_send, "udp_sendmsg", AF_INET, TYPED)
ON_SEND(on_udp_send_untyped, "udp_sendmsg", AF_INET, UNTYPED)
ON_SEND(on_udp6_send, "udpv6_sendmsg", AF_INET6, TYPED)
ON_SEND(on_udp6_send_untyped, "udpv6_sendmsg", AF_INET6, UNTYPED)

/* Of every socket's, for want of functions: the others are to pay as little as possible. */
#define ON_ANY_SEND(name, section, typed)                                       \
	SEC(section) HOOK("udp_send") OF_UDP("no fentry") NO_PEERS           \
	DOC("datagrams sent")                                                   \
	int BPF_PROG(name, struct sock *sk, int result, int flags)              \
	{                                                                       \
		return is_udp(sk) ? UNPREEMPTED(sent_by_any(ctx, sk, result, typed)) : 0; \
	}

ON_ANY_SEND(on_any_send, "tp_btf/sock_send_length", TYPED)
ON_ANY_SEND(on_any_send_untyped, "raw_tp/sock_send_length", UNTYPED)

#define ON_CONSUME(name, typed)                                                 \
	SEC("fentry/skb_consume_udp") HOOK("udp_receive") OF_UDP("fentry")   \
	DOC("datagrams received")                                               \
	int BPF_PROG(name, struct sock *sk, struct sk_buff *skb, int length)    \
	{                                                                       \
		return UNPREEMPTED(consumed(ctx, sk, skb, length, typed));           \
	}

ON_CONSUME(on_consume, TYPED)
ON_CONSUME(on_consume_untyped, UNTYPED)

#define ON_ANY_RECEIVE(name, section, typed)                                    \
	SEC(section) HOOK("udp_receive") OF_UDP("no fentry")                 \
	DOC("datagrams received")                                               \
	int BPF_PROG(name, struct sock *sk, int result, int flags)              \
	{                                                                       \
		return is_udp(sk) ? UNPREEMPTED(received_by_any(ctx, sk, result, flags, typed)) : 0; \
	}

ON_ANY_RECEIVE(on_any_receive, "tp_btf/sock_recv_length", TYPED)
ON_ANY_RECEIVE(on_any_receive_untyped, "raw_tp/sock_recv_length", UNTYPED)

#define ON_RELEASE(name, typed)                                                 \
	SEC("fentry/sk_common_release") HOOK("udp_close") CLOSES_UDP("fentry") \
	DOC("closes of UDP sockets")                                            \
	int BPF_PROG(name, struct sock *sk)                                     \
	{                                                                       \
		return UNPREEMPTED(released(ctx, sk, typed));                        \
	}

ON_RELEASE(on_release, TYPED)
ON_RELEASE(on_release_untyped, UNTYPED)

/* The socket itself is the context: its kernel type is not known, and what is kept with it is. */
SEC("cgroup/sock_release") HOOK("udp_close") CLOSES_UDP("no fentry,cgroup")
DOC("closes of UDP sockets")
int on_cgroup_release(struct bpf_sock *ctx)
{
	struct sock *sk = (struct sock *)ctx;
	struct udp_socket *kept;

	if (!is_udp(sk))
		return 1;
	kept = bpf_sk_storage_get(&udp_kept, ctx, NULL, 0);
	(void)UNPREEMPTED(closed_udp(ctx, sk, kept ?: find_udp(sk, UNTYPED)));
	return 1;
}
