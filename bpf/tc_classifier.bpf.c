// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * net.flow: what passes an interface, in both directions, by flow.
 *
 * The flows are in slots, and an index finds a flow's slot by its key, in which the lower of the two
 * endpoints comes first, whoever sent the packet. The kernel's own LRU table would throw flows out
 * without a word, and nobody could hold on to one while its last values are taken. So each slot has a
 * lock, under which packets are counted and values are taken; a slot is given to another flow under
 * the same lock that takes what its flow had counted. The index only helps to find it: what it says is
 * checked against the key in the slot.
 *
 * The agent has them walked through once a second: that reports flows that have ended, were idle for long, or
 * have not been reported for long.
 */
#include "core/sock.bpf.h"
#include "core/packet.h"

char LICENSE[] SEC("license") = "GPL";

#define FLOWS 65536 /* unless configured */
OPTION(flows);

#define PASS_ON (-1) /* TC_ACT_UNSPEC, TCX_NEXT: the next program decides */
#define LOOPBACK 1   /* its index, in every network namespace */

#define ETH_P_IP 0x0800
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_QINQ1 0x9100
#define ETH_P_IPV6 0x86dd
#define ETHERNET 14
#define VLAN_TAG 4
#define VLAN_ID 0xfff

#define NEXT_HOP_BY_HOP 0
#define NEXT_TCP 6
#define NEXT_UDP 17
#define NEXT_DCCP 33
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_AH 51
#define NEXT_OPTIONS 60
#define NEXT_SCTP 132
#define NEXT_MOBILITY 135
#define NEXT_UDPLITE 136
#define NEXT_HIP 139
#define NEXT_SHIM6 140
#define MOST_EXTENSIONS 8

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct flow_key {
	__u8 low_addr[16];
	__u8 high_addr[16];
	__u16 low_port;
	__u16 high_port;
	__u32 ifindex;
	__u16 vlan_id;
	__u16 inner_vlan_id;
	__u8 protocol;
	__u8 ip_version;
	__u8 portless; /* it has ports, and they are not known */
	__u8 pad;
};

/* What one of the two endpoints sent. */
struct flow_side {
	__u64 packets;
	__u64 bytes;
	__u64 packets_told; /* those that records have told of */
	__u64 bytes_told;
	__u32 flags;
	__u32 pad;
};

struct flow_state {
	struct flow_key key;
	struct flow_side sides[2]; /* of the lower endpoint, of the higher one */
	struct event_task owner;
	char interface[INTERFACE_LEN];
	__u32 latencies[LATENCIES]; /* since the last record */
	__u64 first_ns;
	__u64 last_ns;
	__u64 told_ns;
	__u64 syn_ns;
	__u64 handshake_ns;
	__u64 asked_ns; /* the client's last payload, until the server answers */
	__u32 netns;
	__u8 used;
	__u8 client; /* which of the two sides */
	__u8 client_by;
	__u8 direction;
	__u8 fins; /* bit per side */
	__u8 ended;
	__u8 accepted; /* the server's SYN and ACK were seen */
	__u8 owner_known;
	__u8 out_packets; /* that left: see owner_is_due() */
	__u8 owner_is_agent;
	__u8 owner_admitted;
	__u8 owner_settled; /* it was looked for at what only the owner can have sent */
};

struct flow {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct flow_state state;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOWS);
	__type(key, __u32);
	__type(value, struct flow);
} flow_slots SEC(".maps") SIZED("table:flows") NEEDS("interface");

/* With room for keys of flows that have just gone. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * FLOWS);
	__type(key, struct flow_key);
	__type(value, __u32);
} flow_index SEC(".maps") SIZED("table:flow_index") NEEDS("interface");

/* The slots that were used and are free. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, FLOWS);
	__type(value, __u32);
} free_slots SEC(".maps") SIZED("table:flows") NEEDS("interface");

struct flow_table {
	struct bpf_spin_lock lock;
	__u32 fresh; /* slots from here on were never used */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_table);
} flow_tables SEC(".maps") NEEDS("interface");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_walk);
} flow_walks SEC(".maps") NEEDS("interface");

/* What was taken from a slot, until it is reported. Packets come where nothing else of this kind can
 * come in between; the walk can be interrupted by them, and has a place of its own. */
enum {
	BY_PACKET = 0,
	BY_WALK = 1,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct flow_state);
} taken_flows SEC(".maps") NEEDS("interface");

/* The first fragment of a packet has its ports: later ones are found to belong to it. */
struct fragment_key {
	__u8 from[16];
	__u8 to[16];
	__u32 id;
	__u32 ifindex;
	__u16 vlan_id;
	__u16 inner_vlan_id;
	__u8 protocol;
	__u8 ip_version;
	__u8 pad[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fragment_key);
	__type(value, struct ports);
} fragments SEC(".maps") NEEDS("interface");

/* ---------------------------------------------------------------- owners */

/* Of UDP sockets: who connected it, or sent to an address by it, last. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct owner);
} udp_owners SEC(".maps") NEEDS("interface");

/* Before the first packet leaves, and in the task that has it sent: at the interface that may be any
 * other, as when the neighbour's address had to be asked for. */
static __always_inline int own_udp(struct bpf_sock_addr *ctx)
{
	struct owner *kept;

	if (ctx->protocol != IPPROTO_UDP || !ctx->sk)
		return 1;
	kept = bpf_sk_storage_get(&udp_owners, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		count_fault(FAULT_SOCKET_STORAGE);
	else if (!kept->known || kept->task.pid != bpf_get_current_pid_tgid() >> 32)
		own(kept);
	return 1;
}

#define ON_ADDRESS(name, section)                                          \
	SEC(section) COMPLETES("net.flow") NEEDS("interface,cgroup")       \
	DOC("owners of UDP sockets")                                       \
	int name(struct bpf_sock_addr *ctx)                                \
	{                                                                  \
		return own_udp(ctx);                                       \
	}

ON_ADDRESS(on_udp_connect, "cgroup/connect4")
ON_ADDRESS(on_udp6_connect, "cgroup/connect6")
ON_ADDRESS(on_udp_send_to, "cgroup/sendmsg4")
ON_ADDRESS(on_udp6_send_to, "cgroup/sendmsg6")

/* Whether its owner has closed the connection, and what he has sent before may still have to leave. */
static __always_inline bool is_closing(struct sock *sk)
{
	__u8 state = READ(struct sock, sk, __sk_common.skc_state);

	return state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2 || state == TCP_CLOSING ||
	       state == TCP_LAST_ACK;
}

/* Of TCP sockets net.bpf.c keeps them. NULL where it is not known (yet): not before somebody has
 * accepted the connection, who may be another than the one who listens. `is_nobodys` if somebody has,
 * and who is not known. */
static __always_inline const struct owner *owner_of_tcp(struct bpf_sock *sk, struct sock *address,
							bool *is_nobodys)
{
	struct connection *found = find_in_table(address), *kept;

	if (!is_accepted(address) && !is_closing(address))
		return NULL;
	if (found && found->owner.known)
		return &found->owner;
	kept = found ? NULL : bpf_sk_storage_get(&sockets, sk, NULL, 0);
	if (kept && is_owned(kept, address))
		return &kept->owner;
	*is_nobodys = true;
	return NULL;
}

/* Of the local socket that sends the packet. */
static __always_inline const struct owner *owner_of_packet(struct __sk_buff *skb, bool *is_nobodys)
{
	struct bpf_sock *sk = skb->sk;
	struct owner *kept;

	if (!sk)
		return NULL;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return NULL;
	if (sk->protocol == IPPROTO_UDP) {
		kept = bpf_sk_storage_get(&udp_owners, sk, NULL, 0);
		return kept && kept->known ? kept : NULL;
	}
	if (sk->protocol != IPPROTO_TCP)
		return NULL;
	return owner_of_tcp(sk, BPF_CORE_READ((struct sk_buff *)skb, sk), is_nobodys);
}

/* ---------------------------------------------------------------- packets */

struct packet {
	struct flow_key key;
	__u64 now;
	__u64 bytes;
	__u32 packets;
	__u32 payload;
	__u8 side; /* the sender's */
	__u8 flags;
	__u8 out;
	__u8 pad[5];
};

/* The one that is looked at. So the functions below are not static, and verified once each instead of
 * in every state in which they are called: before 5.12 such a function takes no pointers. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct packet);
} this_packet SEC(".maps") NEEDS("interface");

/* Where the headers are read from: an offset behind one of the places that the kernel knows. */
struct cursor {
	__u32 start; /* enum bpf_hdr_start_off */
	__u32 at;
};

#define LOAD(skb, cursor, to) \
	(!bpf_skb_load_bytes_relative(skb, (cursor)->at, to, sizeof(*(to)), (cursor)->start))

static __always_inline bool is_vlan(__u32 type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD) ||
	       type == bpf_htons(ETH_P_QINQ1);
}

/* The type of what the frame carries, behind its tags. One of them the kernel may keep apart. */
static __always_inline __u32 find_network(struct packet *packet, struct cursor *cursor,
					  struct __sk_buff *skb)
{
	__u32 type = skb->protocol;
	struct vlan_tag tag;

	cursor->start = BPF_HDR_START_NET;
	cursor->at = 0;
	if (skb->vlan_present)
		packet->key.vlan_id = skb->vlan_tci & VLAN_ID;
	if (!is_vlan(type))
		return type;
	cursor->start = BPF_HDR_START_MAC;
	cursor->at = ETHERNET;
	if (!LOAD(skb, cursor, &tag))
		return 0;
	cursor->at += VLAN_TAG;
	if (skb->vlan_present) {
		packet->key.inner_vlan_id = bpf_ntohs(tag.control) & VLAN_ID;
		return tag.type;
	}
	packet->key.vlan_id = bpf_ntohs(tag.control) & VLAN_ID;
	if (!is_vlan(tag.type))
		return tag.type;
	if (!LOAD(skb, cursor, &tag))
		return 0;
	cursor->at += VLAN_TAG;
	packet->key.inner_vlan_id = bpf_ntohs(tag.control) & VLAN_ID;
	return tag.type;
}

/* What the network header says. */
struct network {
	__u8 from[16];
	__u8 to[16];
	__u32 id;
	__u32 size;   /* of the packet, from this header on; 0: it cannot say */
	__u32 header; /* with extensions */
	__u8 protocol;
	__u8 version;
	__u8 first_fragment;
	__u8 later_fragment;
};

static __always_inline bool read_ipv4(struct network *net, struct cursor *cursor,
				      struct __sk_buff *skb)
{
	struct cursor last = *cursor;
	struct ipv4 ip;
	__u32 fragment;
	__u8 byte;

	if (!LOAD(skb, cursor, &ip))
		return false;
	net->version = 4;
	net->header = (ip.version_length & 0xf) * 4;
	net->size = bpf_ntohs(ip.total_length);
	if (ip.version_length >> 4 != 4 || net->header < sizeof(ip) ||
	    (net->size && net->size < net->header))
		return false;
	last.at += net->header - 1;
	if (net->header > sizeof(ip) && !LOAD(skb, &last, &byte)) /* its options are cut off */
		return false;
	*(__u32 *)net->from = ip.from;
	*(__u32 *)net->to = ip.to;
	net->protocol = ip.protocol;
	net->id = ip.id;
	fragment = bpf_ntohs(ip.fragment);
	net->later_fragment = (fragment & IPV4_OFFSET) != 0;
	net->first_fragment = !net->later_fragment && (fragment & IPV4_MORE_FRAGMENTS);
	cursor->at += net->header;
	return true;
}

static __always_inline bool is_extension(__u8 next)
{
	return next == NEXT_HOP_BY_HOP || next == NEXT_ROUTING || next == NEXT_OPTIONS ||
	       next == NEXT_FRAGMENT || next == NEXT_AH || next == NEXT_MOBILITY ||
	       next == NEXT_HIP || next == NEXT_SHIM6;
}

static __always_inline bool read_ipv6(struct network *net, struct cursor *cursor,
				      struct __sk_buff *skb)
{
	__u32 begin = cursor->at, more;
	struct extension extension;
	struct fragment *fragment = (void *)&extension;
	struct ipv6 ip;
	int i;

	if (!LOAD(skb, cursor, &ip))
		return false;
	if (bpf_ntohl(ip.version_class_label) >> 28 != 6)
		return false;
	net->version = 6;
	net->size = bpf_ntohs(ip.payload_length);
	if (net->size)
		net->size += sizeof(ip);
	__builtin_memcpy(net->from, ip.from, 16);
	__builtin_memcpy(net->to, ip.to, 16);
	net->protocol = ip.next;
	cursor->at += sizeof(ip);
#pragma unroll /* before 5.13 no loop may begin behind a call */
	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (net->later_fragment || !is_extension(net->protocol))
			break;
		/* What is behind the packet, such as padding, is none of it. */
		if (net->size && cursor->at - begin + sizeof(extension) > net->size)
			break;
		if (!LOAD(skb, cursor, &extension))
			break; /* what is behind has no ports, then */
		if (net->protocol == NEXT_FRAGMENT) {
			more = bpf_ntohs(fragment->offset_more);
			net->later_fragment = (more & IPV6_OFFSET) != 0;
			net->first_fragment = !net->later_fragment &&
					      (more & IPV6_MORE_FRAGMENTS);
			net->id = fragment->id;
			cursor->at += sizeof(extension);
		} else if (net->protocol == NEXT_AH) {
			cursor->at += (extension.length + 2) * 4;
		} else {
			cursor->at += (extension.length + 1) * 8;
		}
		net->protocol = extension.next;
	}
	net->header = cursor->at - begin;
	return true;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == NEXT_TCP || protocol == NEXT_UDP || protocol == NEXT_SCTP ||
	       protocol == NEXT_UDPLITE || protocol == NEXT_DCCP;
}

/* The ports of a packet of which only other fragments have them, or which it has for those. */
static __always_inline bool find_ports(struct network *net, struct packet *packet,
				       struct ports *ports)
{
	struct fragment_key key = {};
	struct ports *known;

	__builtin_memcpy(key.from, net->from, 16);
	__builtin_memcpy(key.to, net->to, 16);
	key.id = net->id;
	key.ifindex = packet->key.ifindex;
	key.vlan_id = packet->key.vlan_id;
	key.inner_vlan_id = packet->key.inner_vlan_id;
	key.protocol = net->protocol;
	key.ip_version = net->version;
	if (net->first_fragment) {
		if (bpf_map_update_elem(&fragments, &key, ports, BPF_ANY))
			count_fault(FAULT_FRAGMENTS_FULL);
		return true;
	}
	known = bpf_map_lookup_elem(&fragments, &key);
	if (!known)
		return false;
	*ports = *known;
	return true;
}

/* In the order of their bytes. */
static __always_inline int compare(const __u8 *one, const __u8 *other)
{
	const __u64 *a = (const __u64 *)one, *b = (const __u64 *)other;
	__u64 x = bpf_be64_to_cpu(a[0]), y = bpf_be64_to_cpu(b[0]);

	if (x == y) {
		x = bpf_be64_to_cpu(a[1]);
		y = bpf_be64_to_cpu(b[1]);
	}
	return x < y ? -1 : x > y;
}

/* The key, and which of its sides sends. */
static __always_inline void set_endpoints(struct packet *packet, const struct network *net,
					  const struct ports *ports)
{
	__u16 from = bpf_ntohs(ports->from), to = bpf_ntohs(ports->to);
	struct flow_key *key = &packet->key;
	int order = compare(net->from, net->to);

	key->protocol = net->protocol;
	key->ip_version = net->version;
	packet->side = order > 0 || (order == 0 && from > to);
	if (packet->side) {
		__builtin_memcpy(key->low_addr, net->to, 16);
		__builtin_memcpy(key->high_addr, net->from, 16);
		key->low_port = to;
		key->high_port = from;
	} else {
		__builtin_memcpy(key->low_addr, net->from, 16);
		__builtin_memcpy(key->high_addr, net->to, 16);
		key->low_port = from;
		key->high_port = to;
	}
}

/* The segments that the kernel keeps together, and what their headers add to the bytes. */
static __always_inline void count_segments(struct packet *packet, struct __sk_buff *skb,
					   const struct network *net, __u32 transport)
{
	__u32 size = skb->gso_size, link = ETHERNET, headers;

	packet->packets = 1;
	packet->bytes = skb->len;
	if (!size)
		return;
	if (net->size && net->size <= skb->len)
		link = skb->len - net->size;
	headers = link + net->header + transport;
	packet->packets = skb->gso_segs;
	if (!packet->packets && skb->len > headers)
		packet->packets = (skb->len - headers + size - 1) / size;
	if (!packet->packets)
		packet->packets = 1;
	packet->bytes += (__u64)(packet->packets - 1) * headers;
}

/* Whether it is a packet that belongs to a flow: its key, and what it adds there. */
__noinline int read_packet(struct __sk_buff *skb)
{
	struct packet *packet = ONLY_ENTRY(this_packet);
	struct tcp start = {};
	struct ports ports = {};
	struct network net = {};
	struct cursor cursor;
	__u32 type, transport = 0, behind, room;
	bool readable;

	if (!packet)
		return false;
	type = find_network(packet, &cursor, skb);
	if (type == bpf_htons(ETH_P_IP))
		readable = read_ipv4(&net, &cursor, skb);
	else if (type == bpf_htons(ETH_P_IPV6))
		readable = read_ipv6(&net, &cursor, skb);
	else
		return false;
	if (!readable) {
		count_fault(FAULT_PACKET_MALFORMED);
		return false;
	}
	room = !net.size ? ~0u : net.size > net.header ? net.size - net.header : 0;
	if (net.later_fragment) {
		if (has_ports(net.protocol))
			packet->key.portless = !find_ports(&net, packet, &ports);
	} else if (net.protocol == NEXT_TCP && room >= sizeof(start) &&
		   LOAD(skb, &cursor, &start)) {
		ports.from = start.from;
		ports.to = start.to;
		packet->flags = start.flags;
		transport = (start.offset >> 4) * 4;
	} else if (has_ports(net.protocol)) {
		packet->key.portless = room < sizeof(ports) || !LOAD(skb, &cursor, &ports);
		if (net.protocol == NEXT_UDP)
			transport = 8;
	}
	if (net.first_fragment && !packet->key.portless)
		find_ports(&net, packet, &ports);
	set_endpoints(packet, &net, &ports);
	count_segments(packet, skb, &net, transport);
	behind = net.header + transport;
	if (transport || net.later_fragment)
		packet->payload = net.size ? net.size > behind : skb->len > behind + ETHERNET;
	return true;
}

/* ---------------------------------------------------------------- reports */

static __always_inline struct flow_state *taken_at(__u32 place)
{
	return bpf_map_lookup_elem(&taken_flows, &place);
}

static __always_inline bool passes_port_filter(__u16 client, __u16 server)
{
	__u32 generation = generation_in_force();
	struct filter_modes *modes = modes_of(generation);
	__u8 *ours, *theirs;

	if (!modes || modes->port == FILTER_OFF)
		return true;
	ours = verdict_on(&filter_ports, client, generation);
	theirs = verdict_on(&filter_ports, server, generation);
	if (theirs && *theirs == VERDICT_DROP)
		return false;
	return modes->port == FILTER_EXCLUDE || (ours && *ours == VERDICT_KEEP) ||
	       (theirs && *theirs == VERDICT_KEEP);
}

/* What is shorter than times may tell is not told apart. */
static __always_inline void merge_latencies(__u32 *latencies)
{
	struct flow_walk *walk = ONLY_ENTRY(flow_walks);
	__u32 least = walk ? walk->least : 0, merged = 0, i;

#pragma unroll
	for (i = 0; i < LATENCIES; i++) {
		if (i < least) {
			merged += latencies[i];
			latencies[i] = 0;
		} else if (i == least) {
			latencies[i] += merged;
		}
	}
}

/* What was taken becomes a record. Not static: so it is verified once. */
__noinline int report_taken(struct __sk_buff *skb, __u32 place, __u32 reason)
{
	struct flow_state *flow = taken_at(place);
	struct flow_side *client, *server;
	struct net_flow *record;
	struct event_base base;
	__u16 client_port, server_port;
	bool low;

	if (!flow || flow->owner_is_agent || !enabled(KIND_NET_FLOW))
		return 0;
	low = !flow->client;
	client = low ? &flow->sides[0] : &flow->sides[1];
	server = low ? &flow->sides[1] : &flow->sides[0];
	client_port = low ? flow->key.low_port : flow->key.high_port;
	server_port = low ? flow->key.high_port : flow->key.low_port;
	if (client->packets + server->packets == 0)
		return 0; /* its first packet has gone elsewhere */
	if (reason == FLOW_EVICTED)
		count_fault(FAULT_FLOWS_EVICTED);
	start_base(&base);
	if ((flow->owner_known && !flow->owner_admitted) ||
	    !passes_port_filter(client_port, server_port)) {
		count_filtered(KIND_NET_FLOW);
		return 0;
	}
	base.weight = sample(KIND_NET_FLOW);
	if (!base.weight)
		return 0;
	record = begin(&bulk, &base, KIND_NET_FLOW, RING_BULK, sizeof(*record));
	if (!record)
		return 0;
	record->task = flow->owner;
	record->first_boot_ns = flow->first_ns;
	record->last_boot_ns = flow->last_ns;
	record->client_packets = client->packets - client->packets_told;
	record->client_bytes = client->bytes - client->bytes_told;
	record->server_packets = server->packets - server->packets_told;
	record->server_bytes = server->bytes - server->bytes_told;
	record->client_packets_total = client->packets;
	record->client_bytes_total = client->bytes;
	record->server_packets_total = server->packets;
	record->server_bytes_total = server->bytes;
	record->handshake_ns = flow->handshake_ns;
	record->netns = flow->netns;
	record->ifindex = flow->key.ifindex;
	record->client_port = client_port;
	record->server_port = server_port;
	record->vlan_id = flow->key.vlan_id;
	record->inner_vlan_id = flow->key.inner_vlan_id;
	record->client_tcp_flags = client->flags;
	record->server_tcp_flags = server->flags;
	record->protocol = flow->key.protocol;
	record->ip_version = flow->key.ip_version;
	record->ports_unknown = flow->key.portless;
	record->direction = flow->direction;
	record->client_by = flow->client_by;
	record->reason = reason;
	record->owner_known = flow->owner_known;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	__builtin_memcpy(record->client_addr, low ? flow->key.low_addr : flow->key.high_addr, 16);
	__builtin_memcpy(record->server_addr, low ? flow->key.high_addr : flow->key.low_addr, 16);
	__builtin_memcpy(record->interface, flow->interface, INTERFACE_LEN);
	merge_latencies(flow->latencies);
	__builtin_memcpy(record->response_latencies, flow->latencies, sizeof(flow->latencies));
	submit(skb, &bulk, RING_BULK, record);
	return 0;
}

/* ---------------------------------------------------------------- flows; under a slot's lock */

static __always_inline bool is_same_key(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const void *)one, *b = (const void *)other;

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) |
		 (a[5] ^ b[5]));
}

/* By the packet that was seen first. Without a SYN the lower port is taken for the server's. */
static __always_inline void begin_flow(struct flow_state *flow, const struct packet *packet)
{
	__u8 sender = packet->side;
	bool sent_by_client = true;

	flow->key = packet->key;
	flow->first_ns = packet->now;
	flow->last_ns = packet->now;
	flow->told_ns = packet->now;
	flow->used = 1;
	flow->client_by = CLIENT_BY_PACKET;
	if (packet->key.protocol == NEXT_TCP && !packet->key.portless) {
		flow->client_by = CLIENT_BY_SYN;
		if (packet->flags & TCP_SYN) {
			sent_by_client = !(packet->flags & TCP_ACK);
		} else {
			flow->client_by = CLIENT_BY_PORT;
			sent_by_client = sender ?
				packet->key.high_port >= packet->key.low_port :
				packet->key.low_port >= packet->key.high_port;
		}
	}
	flow->client = sent_by_client ? sender : !sender;
	flow->direction = packet->out == sent_by_client ? DIRECTION_OUTBOUND : DIRECTION_INBOUND;
}

static __always_inline __u32 latency_class(__u64 ns)
{
	__u64 left = ns / 1000;
	__u32 bits = 0;

	if (left >> 32)
		return LATENCIES - 1;
#define HALVE(by)                   \
	if (left >> (by)) {         \
		bits += (by);       \
		left >>= (by);      \
	}
	HALVE(16)
	HALVE(8)
	HALVE(4)
	HALVE(2)
	HALVE(1)
#undef HALVE
	bits += left; /* 0 µs: 0, 1 µs: 1, 2 to 3 µs: 2 ... */
	return bits < LATENCIES ? bits : LATENCIES - 1;
}

static __always_inline void follow_tcp(struct flow_state *flow, const struct packet *packet,
				       bool by_client)
{
	if (packet->flags & TCP_SYN) {
		if (by_client && !(packet->flags & TCP_ACK) && !flow->syn_ns)
			flow->syn_ns = packet->now;
		if (!by_client && (packet->flags & TCP_ACK))
			flow->accepted = 1;
	} else if (by_client && (packet->flags & TCP_ACK) && flow->accepted && flow->syn_ns &&
		   !flow->handshake_ns) {
		flow->handshake_ns = packet->now - flow->syn_ns;
	}
	if (packet->flags & TCP_FIN)
		flow->fins |= packet->side ? 2 : 1;
	if (packet->flags & TCP_RST || flow->fins == 3)
		flow->ended = 1;
}

static __always_inline void add_packet(struct flow_state *flow, const struct packet *packet)
{
	bool by_client = packet->side == flow->client;
	struct flow_side *mine = &flow->sides[packet->side & 1];
	__u32 class;

	mine->packets += packet->packets;
	mine->bytes += packet->bytes;
	mine->flags |= packet->flags;
	if (packet->now > flow->last_ns)
		flow->last_ns = packet->now;
	if (packet->key.protocol == NEXT_TCP)
		follow_tcp(flow, packet, by_client);
	if (!packet->payload)
		return;
	if (by_client) {
		flow->asked_ns = packet->now;
	} else if (flow->asked_ns) {
		class = packet->now > flow->asked_ns ?
			latency_class(packet->now - flow->asked_ns) : 0;
		if (class < LATENCIES)
			flow->latencies[class]++;
		flow->asked_ns = 0;
	}
}

static __always_inline void mark_told(struct flow_state *flow, __u64 now)
{
	int i;

	flow->told_ns = now;
#pragma unroll
	for (i = 0; i < 2; i++) {
		flow->sides[i].packets_told = flow->sides[i].packets;
		flow->sides[i].bytes_told = flow->sides[i].bytes;
	}
	__builtin_memset(flow->latencies, 0, sizeof(flow->latencies));
}

/* ---------------------------------------------------------------- slots */

static __always_inline struct flow *flow_at(__u32 slot)
{
	return bpf_map_lookup_elem(&flow_slots, &slot);
}

static __always_inline __u32 capacity(void)
{
	return flows ? flows : FLOWS;
}

static __always_inline void count_live(__s64 change)
{
	struct flow_walk *walk = ONLY_ENTRY(flow_walks);

	if (walk)
		__sync_fetch_and_add((__s64 *)&walk->live, change);
}

/* Let the index no longer lead to the slot. */
static __always_inline void forget(const struct flow_key *key, __u32 slot)
{
	__u32 *found = bpf_map_lookup_elem(&flow_index, key);

	if (found && *found == slot)
		bpf_map_delete_elem(&flow_index, key);
}

/* Where that fails, the slot is found again when the oldest flow is looked for. */
static __always_inline void give_back(__u32 slot)
{
	count_live(-1);
	bpf_map_push_elem(&free_slots, &slot, BPF_ANY);
}

#define LOOKED_AT 16

/* Of a few chosen at random, the slot of the flow that is idle for longest, of those that have ended
 * if there are any. One that has had packets more lately than half of them has one chance in 2^15 to be
 * taken for the oldest, when it is looked at. */
static __always_inline __u32 oldest_slot(void)
{
	__u32 all = capacity(), slot, oldest = 0, random = bpf_get_prandom_u32();
	__u64 since = ~0ULL, last;
	struct flow *flow;
	int i;

#pragma unroll
	for (i = 0; i < LOOKED_AT; i++) {
		random = random * 1664525 + 1013904223; /* Numerical Recipes */
		slot = (__u64)random * all >> 32;
		flow = flow_at(slot);
		if (!flow)
			continue;
		if (!flow->state.used)
			return slot;
		last = flow->state.ended ? flow->state.last_ns >> 1 : flow->state.last_ns;
		if (last < since) {
			since = last;
			oldest = slot;
		}
	}
	return oldest;
}

/* A slot for a new flow: free, or of the flow that has to make way. */
static __always_inline __u32 find_slot(void)
{
	struct flow_table *table = ONLY_ENTRY(flow_tables);
	__u32 slot = 0, all = capacity();
	bool fresh = true;

	if (!bpf_map_pop_elem(&free_slots, &slot))
		return slot;
	if (!table)
		return 0;
	bpf_spin_lock(&table->lock);
	if (table->fresh < all) {
		slot = table->fresh;
		table->fresh++;
	} else {
		fresh = false;
	}
	bpf_spin_unlock(&table->lock);
	return fresh ? slot : oldest_slot();
}

/* The slot has a flow of this key that nobody has found: no packet is in it. */
static __always_inline void give_up(__u32 slot, const struct flow_key *key)
{
	struct flow *flow = flow_at(slot);
	bool mine;

	if (!flow)
		return;
	bpf_spin_lock(&flow->lock);
	mine = flow->state.used && is_same_key(&flow->state.key, key) &&
	       !flow->state.sides[0].packets && !flow->state.sides[1].packets;
	if (mine)
		flow->state.used = 0;
	bpf_spin_unlock(&flow->lock);
	if (mine)
		give_back(slot);
}

struct place {
	char interface[INTERFACE_LEN];
	__u32 netns;
};

static __always_inline void read_place(struct place *place, struct __sk_buff *skb)
{
	struct net_device *device = BPF_CORE_READ((struct sk_buff *)skb, dev);

	if (bpf_probe_read_kernel(place->interface, INTERFACE_LEN,
				  (void *)device + bpf_core_field_offset(struct net_device, name)))
		count_fault(FAULT_UNREADABLE);
	place->netns = BPF_CORE_READ(device, nd_net.net, ns.inum);
}

/* A slot for the packet's flow, which the index leads to. Whether there is one; somebody else may have
 * made it. */
__noinline int make_flow(struct __sk_buff *skb)
{
	struct packet *packet = ONLY_ENTRY(this_packet);
	struct flow_state *taken = taken_at(BY_PACKET);
	struct place place = {};
	struct flow *flow;
	__u32 slot;
	bool evicted;
	int failed;

	if (!packet)
		return false;
	read_place(&place, skb);
	slot = find_slot();
	flow = flow_at(slot);
	if (!flow || !taken)
		return false;
	bpf_spin_lock(&flow->lock);
	evicted = flow->state.used;
	if (evicted)
		*taken = flow->state;
	__builtin_memset(&flow->state, 0, sizeof(flow->state));
	begin_flow(&flow->state, packet);
	__builtin_memcpy(flow->state.interface, place.interface, INTERFACE_LEN);
	flow->state.netns = place.netns;
	bpf_spin_unlock(&flow->lock);
	if (evicted) {
		forget(&taken->key, slot);
		report_taken(skb, BY_PACKET, taken->ended ? FLOW_END : FLOW_EVICTED);
	} else {
		count_live(1);
	}
	failed = bpf_map_update_elem(&flow_index, &packet->key, &slot, BPF_NOEXIST);
	if (failed)
		give_up(slot, &packet->key);
	return !failed || failed == -EEXIST;
}

/* Most flows that pass through have no owner, and should not pay for it at each packet: it is looked for at
 * the first so many that leave, and then at one of so many, for who is late to accept. Two CPUs can count
 * past that one, and the next is looked at. */
#define OWNER_TRIES 64

/* The kernel acknowledges by itself. */
static __always_inline bool is_by_owner(const struct packet *packet)
{
	return packet->payload || packet->flags & (TCP_FIN | TCP_RST);
}

/* Until accept() returns, the connection that it takes is whose the listener is, which may be another; and
 * it may not return for long, by where it is told to write the address. So the owner is settled only when
 * this end sends something; and looked for again when it ends, as another thread can use the descriptor a
 * moment before that. Not at the loopback device, where it is who sends first, at whichever end. */
static __always_inline bool owner_is_due(const struct flow_state *state, const struct packet *packet)
{
	bool among_first = state->out_packets < OWNER_TRIES;
	bool one_of_many = !(state->out_packets % OWNER_TRIES);

	if (!packet->out)
		return false;
	if (!state->owner_known)
		return among_first || one_of_many;
	if (packet->key.protocol != NEXT_TCP || packet->key.ifindex == LOOPBACK)
		return false;
	if (state->owner_settled)
		return one_of_many || packet->flags & (TCP_FIN | TCP_RST);
	return among_first || one_of_many || is_by_owner(packet);
}

static __always_inline void count_out(struct flow_state *state)
{
	state->out_packets = state->out_packets == 0xff ? OWNER_TRIES : state->out_packets + 1;
}

enum counted {
	NOT_HERE = 0, /* the index is of yesterday */
	COUNTED = 1,
	REPLACED = 2, /* and a flow that had ended is to be reported */
	REFUSED = 3,
};

static __always_inline void disown(struct flow_state *state)
{
	state->owner_known = state->owner_is_agent = state->owner_admitted = 0;
	__builtin_memset(&state->owner, 0, sizeof(state->owner));
}

static __always_inline enum counted count_in(struct flow *flow, const struct packet *packet,
					     struct __sk_buff *skb, struct flow_state *taken)
{
	const struct owner *owner = NULL;
	enum counted result = NOT_HERE;
	struct flow_state *state = &flow->state;
	bool is_nobodys = false;

	if (owner_is_due(state, packet))
		owner = owner_of_packet(skb, &is_nobodys);
	bpf_spin_lock(&flow->lock);
	if (state->used && is_same_key(&state->key, &packet->key)) {
		result = COUNTED;
		if (state->ended && (packet->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) {
			/* The next connection between the same ports. */
			result = REPLACED;
			*taken = *state;
			mark_told(state, packet->now);
			__builtin_memset(state->sides, 0, sizeof(state->sides));
			state->syn_ns = state->handshake_ns = state->asked_ns = 0;
			state->fins = state->ended = state->accepted = 0;
			state->out_packets = state->owner_settled = 0;
			disown(state);
			begin_flow(state, packet);
		}
		add_packet(state, packet);
		if (packet->out)
			count_out(state);
		if (owner) {
			state->owner = owner->task;
			state->owner_known = 1;
			state->owner_settled |= is_by_owner(packet);
			state->owner_admitted = owner->admitted;
			state->owner_is_agent = owner->is_agent;
		} else if (is_nobodys && !state->owner_settled && !(packet->flags & TCP_RST)) {
			disown(state); /* it is not the listener's, and whose was not kept */
		}
	}
	bpf_spin_unlock(&flow->lock);
	return result;
}

__noinline int try_to_count(struct __sk_buff *skb)
{
	struct packet *packet = ONLY_ENTRY(this_packet);
	struct flow_state *taken = taken_at(BY_PACKET);
	enum counted counted;
	struct flow *flow;
	__u32 *found, slot;

	if (!packet)
		return REFUSED;
	found = bpf_map_lookup_elem(&flow_index, &packet->key);
	if (!found) {
		if (!make_flow(skb))
			return REFUSED;
		found = bpf_map_lookup_elem(&flow_index, &packet->key);
		if (!found)
			return NOT_HERE;
	}
	slot = *found;
	flow = flow_at(slot);
	if (!flow || !taken)
		return REFUSED;
	counted = count_in(flow, packet, skb, taken);
	if (counted == REPLACED)
		report_taken(skb, BY_PACKET, FLOW_END);
	if (counted == NOT_HERE)
		forget(&packet->key, slot);
	return counted;
}

#define ATTEMPTS 8

/* Not if it was found and had gone by then, or could not be made, again and again. */
static __always_inline bool count_packet(struct __sk_buff *skb)
{
	int result = NOT_HERE, i;

#pragma unroll
	for (i = 0; i < ATTEMPTS; i++) {
		if (result == NOT_HERE)
			result = try_to_count(skb);
	}
	return result == COUNTED || result == REPLACED;
}

static __always_inline int on_frame(struct __sk_buff *skb, __u8 out)
{
	struct packet *packet = ONLY_ENTRY(this_packet);

	if (!packet || (!out && skb->ifindex == LOOPBACK))
		return PASS_ON; /* it went out there, too */
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->now = bpf_ktime_get_boot_ns();
	packet->key.ifindex = skb->ifindex;
	packet->out = out;
	if (read_packet(skb) && !count_packet(skb))
		count_fault(FAULT_FLOWS_FULL);
	return PASS_ON;
}

SEC("tcx/ingress") EMITS("net.flow") NEEDS("interface")
int flow_ingress(struct __sk_buff *skb)
{
	return on_frame(skb, 0);
}

SEC("tcx/egress") EMITS("net.flow") NEEDS("interface")
int flow_egress(struct __sk_buff *skb)
{
	return on_frame(skb, 1);
}

/* ---------------------------------------------------------------- the walk */

#define SLOTS_PER_RUN 16
#define NOT_DUE 0xff

/* Why the flow is to be reported now; without the lock only a guess. */
static __always_inline __u32 due(const struct flow_state *flow, const struct flow_walk *walk,
				 bool gone, __u64 now)
{
	if (!flow->used)
		return NOT_DUE;
	if (walk->stop)
		return FLOW_STOP;
	if (gone)
		return FLOW_GONE;
	if (flow->ended && now > flow->last_ns && now - flow->last_ns >= walk->linger_ns)
		return FLOW_END;
	if (now > flow->last_ns && now - flow->last_ns >= walk->idle_ns)
		return FLOW_IDLE;
	if (now > flow->told_ns && now - flow->told_ns >= walk->active_ns)
		return FLOW_ACTIVE;
	return NOT_DUE;
}

static __always_inline bool has_room(void)
{
	void *buffer;

	if (perf_buffers) /* how full they are cannot be asked: what is lost there is counted */
		return true;
	buffer = buffer_of(&bulk, RING_BULK, bpf_get_smp_processor_id());
	return buffer && bpf_ringbuf_query(buffer, BPF_RB_AVAIL_DATA) <
				 bpf_ringbuf_query(buffer, BPF_RB_RING_SIZE) / 2;
}

/* Whether the flow in the slot was looked at: not if it has to be reported, and the ring has other
 * records enough. */
__noinline int visit(struct __sk_buff *skb, __u32 slot)
{
	struct flow_walk *walk = ONLY_ENTRY(flow_walks);
	struct flow_state *taken = taken_at(BY_WALK);
	struct flow *flow = flow_at(slot);
	__u32 reason, ifindex;
	__u64 now;
	bool gone;

	if (!walk || !taken || !flow)
		return 1;
	now = bpf_ktime_get_boot_ns();
	ifindex = flow->state.key.ifindex;
	gone = !bpf_map_lookup_elem(&interfaces, &ifindex);
	if (due(&flow->state, walk, gone, now) == NOT_DUE)
		return 1;
	if (!has_room())
		return 0;
	bpf_spin_lock(&flow->lock);
	gone = gone && flow->state.key.ifindex == ifindex;
	reason = due(&flow->state, walk, gone, now);
	if (reason != NOT_DUE) {
		*taken = flow->state;
		if (reason == FLOW_ACTIVE)
			mark_told(&flow->state, now);
		else
			flow->state.used = 0;
	}
	bpf_spin_unlock(&flow->lock);
	if (reason == NOT_DUE)
		return 1;
	if (reason != FLOW_ACTIVE) {
		forget(&taken->key, slot);
		give_back(slot);
	}
	report_taken(skb, BY_WALK, reason);
	return 1;
}

/* Goes on where it stopped; 1 if the round is not over. */
SEC("tc") RUN HOOK("walk") EMITS("net.flow") NEEDS("interface")
int walk_flows(struct __sk_buff *skb)
{
	struct flow_table *table = ONLY_ENTRY(flow_tables);
	struct flow_walk *walk = ONLY_ENTRY(flow_walks);
	int i;

	if (!walk || !table)
		return 0;
#pragma unroll /* it is the body that is verified once */
	for (i = 0; i < SLOTS_PER_RUN; i++) {
		if (walk->rounds >= walk->target)
			return 0;
		if (walk->cursor >= table->fresh) {
			walk->cursor = 0;
			walk->rounds++;
			continue;
		}
		if (!visit(skb, walk->cursor))
			return 1;
		walk->cursor++;
	}
	return walk->rounds < walk->target;
}
