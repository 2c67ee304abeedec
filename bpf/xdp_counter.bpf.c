// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * xdp.counters: the packets that come in at an interface, by what they are.
 *
 * Every packet passes. It is counted once, in the class that its headers make, as far as they can be
 * followed: each is checked against the end of the packet before it is read. Bytes are those of the
 * frame as it is seen here.
 */
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* By interface, and within that by CPU, so that no two count in one place. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct packet_counts);
} packets SEC(".maps") SIZED("cpus,interfaces") NEEDS("interface");

/* What is left of a packet, in the kernel's memory. */
struct cursor {
	void *at;
	void *end;
};

struct packet_class {
	__u32 vlan;
	__u32 network;
	__u32 transport;
	__u32 ports;
	__u32 verdict;
};

#define MOST_VLANS 2
#define MOST_EXTENSIONS 8

#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_QINQ1 0x9100
#define ETH_P_IPV6 0x86dd

#define NEXT_HOP_BY_HOP 0
#define NEXT_ICMP 1
#define NEXT_IGMP 2
#define NEXT_IPV4 4
#define NEXT_TCP 6
#define NEXT_UDP 17
#define NEXT_IPV6 41
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_GRE 47
#define NEXT_ESP 50
#define NEXT_AH 51
#define NEXT_ICMPV6 58
#define NEXT_NONE 59
#define NEXT_OPTIONS 60
#define NEXT_OSPF 89
#define NEXT_PIM 103
#define NEXT_VRRP 112
#define NEXT_SCTP 132
#define NEXT_MOBILITY 135
#define NEXT_HIP 139
#define NEXT_SHIM6 140

struct ethernet {
	__u8 to[6];
	__u8 from[6];
	__be16 type;
};

struct vlan_tag {
	__be16 control;
	__be16 type;
};

struct ipv4 {
	__u8 version_length;
	__u8 service;
	__be16 total_length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 checksum;
	__be32 from;
	__be32 to;
};

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_OFFSET 0x1fff

struct ipv6 {
	__be32 version_class_label;
	__be16 payload_length;
	__u8 next;
	__u8 hops;
	__u8 from[16];
	__u8 to[16];
};

struct extension {
	__u8 next;
	__u8 length; /* in units of 8 bytes, the first not counted */
	__u8 more[6];
};

struct fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset_more;
	__be32 id;
};

#define IPV6_MORE_FRAGMENTS 0x0001
#define IPV6_OFFSET 0xfff8

struct tcp {
	__be16 from;
	__be16 to;
	__be32 seq;
	__be32 ack;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};

struct udp {
	__be16 from;
	__be16 to;
	__be16 length;
	__be16 checksum;
};

struct ports {
	__be16 from;
	__be16 to;
};

/* The next header of that type, which is then behind the cursor; NULL where the packet ends before. */
#define TAKE(cursor, type)                                         \
	({                                                         \
		type *__taken = (cursor)->at;                      \
		void *__next = (void *)(__taken + 1);              \
		if (__next > (cursor)->end)                        \
			__taken = NULL;                            \
		else                                               \
			(cursor)->at = __next;                     \
		__taken;                                           \
	})

static __always_inline __u32 left(const struct cursor *cursor)
{
	return (__u32)(cursor->end - cursor->at);
}

/* ---------------------------------------------------------------- transport */

static __always_inline __u32 transport_of(__u8 protocol)
{
	switch (protocol) {
	case NEXT_TCP: return TRANSPORT_TCP;
	case NEXT_UDP: return TRANSPORT_UDP;
	case NEXT_ICMP: return TRANSPORT_ICMP;
	case NEXT_ICMPV6: return TRANSPORT_ICMPV6;
	case NEXT_IGMP: return TRANSPORT_IGMP;
	case NEXT_SCTP: return TRANSPORT_SCTP;
	case NEXT_GRE: return TRANSPORT_GRE;
	case NEXT_ESP: return TRANSPORT_ESP;
	case NEXT_AH: return TRANSPORT_AH;
	case NEXT_IPV4: return TRANSPORT_IPV4;
	case NEXT_IPV6: return TRANSPORT_IPV6;
	case NEXT_OSPF: return TRANSPORT_OSPF;
	case NEXT_PIM: return TRANSPORT_PIM;
	case NEXT_VRRP: return TRANSPORT_VRRP;
	case NEXT_NONE: return TRANSPORT_NONE;
	default: return TRANSPORT_OTHER;
	}
}

static __always_inline void classify_ports(struct packet_class *class, __be16 from, __be16 to)
{
	__u16 one = bpf_ntohs(from), other = bpf_ntohs(to), lower = one < other ? one : other;

	class->ports = lower < 1024 ? PORTS_SYSTEM : lower < 49152 ? PORTS_USER : PORTS_DYNAMIC;
}

/* `size` bytes follow the IP header, by its own words. */
static __always_inline void classify_transport(struct packet_class *class, struct cursor *cursor,
					       __u8 protocol, __u32 size)
{
	struct ports *ports;
	struct tcp *tcp;
	struct udp *udp;

	class->transport = transport_of(protocol);
	if (protocol == NEXT_TCP) {
		tcp = TAKE(cursor, struct tcp);
		if (!tcp) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		classify_ports(class, tcp->from, tcp->to);
		if ((tcp->offset >> 4) < 5 || (tcp->offset >> 4) * 4u > size)
			class->verdict = PACKET_MALFORMED;
	} else if (protocol == NEXT_UDP) {
		udp = TAKE(cursor, struct udp);
		if (!udp) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		classify_ports(class, udp->from, udp->to);
		/* Of a first fragment it is the length of all; 0 in a jumbogram. */
		if (udp->length && bpf_ntohs(udp->length) < sizeof(*udp))
			class->verdict = PACKET_MALFORMED;
		else if (class->verdict == PACKET_WHOLE && bpf_ntohs(udp->length) > size)
			class->verdict = PACKET_MALFORMED;
	} else if (protocol == NEXT_SCTP) {
		ports = TAKE(cursor, struct ports);
		if (!ports) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		classify_ports(class, ports->from, ports->to);
	}
}

/* ---------------------------------------------------------------- IP */

static __always_inline void classify_ipv4(struct packet_class *class, struct cursor *cursor)
{
	__u32 header, total, fragment, present = left(cursor);
	struct ipv4 *ip = TAKE(cursor, struct ipv4);

	class->network = NETWORK_IPV4;
	if (!ip) {
		class->verdict = PACKET_TRUNCATED;
		return;
	}
	header = (ip->version_length & 0xf) * 4;
	total = bpf_ntohs(ip->total_length);
	if (!total && present > 0xffff)
		total = present; /* put together by the kernel, larger than can be said */
	if (ip->version_length >> 4 != 4 || header < sizeof(*ip) || total < header) {
		class->verdict = PACKET_MALFORMED;
		return;
	}
	if (total > present || cursor->at + (header - sizeof(*ip)) > cursor->end) {
		class->verdict = PACKET_TRUNCATED;
		return;
	}
	cursor->at += header - sizeof(*ip);
	fragment = bpf_ntohs(ip->fragment);
	if (fragment & IPV4_OFFSET) {
		class->verdict = PACKET_LATER_FRAGMENT;
		class->transport = transport_of(ip->protocol);
		return;
	}
	if (fragment & IPV4_MORE_FRAGMENTS)
		class->verdict = PACKET_FIRST_FRAGMENT;
	classify_transport(class, cursor, ip->protocol, total - header);
}

static __always_inline bool is_extension(__u8 next)
{
	return next == NEXT_HOP_BY_HOP || next == NEXT_ROUTING || next == NEXT_OPTIONS ||
	       next == NEXT_MOBILITY || next == NEXT_HIP || next == NEXT_SHIM6;
}

static __always_inline void classify_ipv6(struct packet_class *class, struct cursor *cursor)
{
	struct ipv6 *ip = TAKE(cursor, struct ipv6);
	struct extension *extension;
	struct fragment *fragment;
	__u32 payload, rest, more;
	void *begin;
	__u8 next;
	int i;

	class->network = NETWORK_IPV6;
	if (!ip) {
		class->verdict = PACKET_TRUNCATED;
		return;
	}
	payload = bpf_ntohs(ip->payload_length);
	if ((bpf_ntohl(ip->version_class_label) >> 28) != 6) {
		class->verdict = PACKET_MALFORMED;
		return;
	}
	begin = cursor->at;
	if (payload > left(cursor)) {
		class->verdict = PACKET_TRUNCATED;
		return;
	}
	next = ip->next;
	if (!payload) /* a jumbogram says its length in an option */
		payload = next == NEXT_HOP_BY_HOP || left(cursor) > 0xffff ? left(cursor) : 0;
	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (next == NEXT_FRAGMENT) {
			fragment = TAKE(cursor, struct fragment);
			if (!fragment) {
				class->verdict = PACKET_TRUNCATED;
				return;
			}
			next = fragment->next;
			more = bpf_ntohs(fragment->offset_more);
			if (more & IPV6_OFFSET) {
				class->verdict = PACKET_LATER_FRAGMENT;
				class->transport = is_extension(next) ? TRANSPORT_NONE :
									transport_of(next);
				return;
			}
			if (more & IPV6_MORE_FRAGMENTS)
				class->verdict = PACKET_FIRST_FRAGMENT;
			continue;
		}
		if (!is_extension(next))
			break;
		extension = TAKE(cursor, struct extension);
		if (!extension) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		next = extension->next;
		rest = extension->length * 8u;
		if (cursor->at + rest > cursor->end) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		cursor->at += rest;
	}
	if (is_extension(next) || next == NEXT_FRAGMENT) {
		class->verdict = PACKET_EXTENSIONS;
		return;
	}
	more = cursor->at - begin;
	if (more > payload) {
		class->verdict = PACKET_MALFORMED;
		return;
	}
	classify_transport(class, cursor, next, payload - more);
}

/* ---------------------------------------------------------------- frame */

static __always_inline bool is_vlan(__be16 type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD) ||
	       type == bpf_htons(ETH_P_QINQ1);
}

static __always_inline void classify(struct packet_class *class, struct cursor *cursor)
{
	struct ethernet *frame = TAKE(cursor, struct ethernet);
	struct vlan_tag *tag;
	__be16 type;
	int i;

	if (!frame) {
		class->verdict = PACKET_TRUNCATED;
		return;
	}
	type = frame->type;
	for (i = 0; i < MOST_VLANS && is_vlan(type); i++) {
		tag = TAKE(cursor, struct vlan_tag);
		if (!tag) {
			class->verdict = PACKET_TRUNCATED;
			return;
		}
		class->vlan++;
		type = tag->type;
	}
	if (is_vlan(type))
		class->vlan = VLAN_MORE;
	else if (type == bpf_htons(ETH_P_IP))
		classify_ipv4(class, cursor);
	else if (type == bpf_htons(ETH_P_IPV6))
		classify_ipv6(class, cursor);
	else if (type == bpf_htons(ETH_P_ARP))
		class->network = NETWORK_ARP;
}

static __always_inline __u32 index_of(const struct packet_class *class)
{
	__u32 index = class->vlan;

	index = index * NETWORK_END + class->network;
	index = index * TRANSPORT_END + class->transport;
	index = index * PORTS_END + class->ports;
	return index * PACKET_END + class->verdict;
}

static __always_inline struct packet_counts *counts_of(__u32 interface)
{
	__u32 *first = bpf_map_lookup_elem(&interfaces, &interface), index;

	if (!first)
		return NULL;
	index = *first + bpf_get_smp_processor_id();
	return bpf_map_lookup_elem(&packets, &index);
}

SEC("xdp") EMITS("xdp.counters") NEEDS("interface")
int on_packet(struct xdp_md *packet)
{
	struct cursor cursor = {
		.at = (void *)(long)packet->data,
		.end = (void *)(long)packet->data_end,
	};
	struct packet_counts *counts = counts_of(packet->ingress_ifindex);
	struct packet_class class = {};
	__u64 bytes = cursor.end - cursor.at;
	__u32 index;

	if (!counts) {
		count_fault(FAULT_NO_SLOT);
		return XDP_PASS;
	}
	classify(&class, &cursor);
	index = index_of(&class);
	if (index >= PACKET_CLASSES) /* cannot be, and the verifier wants to see it */
		return XDP_PASS;
	counts->by_class[index].packets++;
	counts->by_class[index].bytes += bytes;
	return XDP_PASS;
}
