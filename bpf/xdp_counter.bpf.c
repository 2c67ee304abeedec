// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * xdp.counters: the packets that come in at an interface, by what they are.
 *
 * Every packet passes. It is counted once, in the class that its headers make, as far as they can be
 * followed: each is checked against the end of the packet before it is read. Bytes are those of the
 * frame as it is seen here.
 */
#include "core/core.bpf.h"
#include "core/packet.h"

char LICENSE[] SEC("license") = "GPL";

/* By interface, and within that by CPU, so that no two count in one place. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct packet_counts);
} packets SEC(".maps") SIZED("cpus,interfaces") NEEDS("interface");

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

/* The farthest that a header is looked for: behind eight extension headers of the largest size. */
#define MOST_HEADERS 0x7fff

/* The header of that type `at` so many bytes into the packet; NULL where the packet ends before. */
#define HEADER(packet, at, type)                                                  \
	({                                                                        \
		void *__end = (void *)(long)(packet)->data_end;                   \
		type *__header = (void *)(long)(packet)->data + (at);             \
		(at) > MOST_HEADERS || (void *)(__header + 1) > __end ? NULL :    \
									__header; \
	})

/* In 64 bits all the way: pointers cannot be subtracted in 32. */
static __always_inline __u64 length_of(struct xdp_md *packet)
{
	return (void *)(long)packet->data_end - (void *)(long)packet->data;
}

/* A class but for its VLANs, in one number: what the functions below give. */
static __always_inline __u32 class_of(__u32 network, __u32 transport, __u32 ports, __u32 verdict)
{
	return ((network * TRANSPORT_END + transport) * PORTS_END + ports) * PACKET_END + verdict;
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

static __always_inline __u32 ports_of(__be16 from, __be16 to)
{
	__u16 one = bpf_ntohs(from), other = bpf_ntohs(to), lower = one < other ? one : other;

	return lower < 1024 ? PORTS_SYSTEM : lower < 49152 ? PORTS_USER : PORTS_DYNAMIC;
}

static __always_inline __u32 verdict_of_tcp(const struct tcp *tcp, __u32 size, __u32 verdict)
{
	__u32 header = (tcp->offset >> 4) * 4;

	return header < sizeof(*tcp) || header > size ? PACKET_MALFORMED : verdict;
}

static __always_inline __u32 verdict_of_udp(const struct udp *udp, __u32 size, __u32 verdict)
{
	__u32 length = bpf_ntohs(udp->length);

	/* 0 in a jumbogram; of a first fragment the length of all. */
	if (length && (length < sizeof(*udp) || (verdict == PACKET_WHOLE && length > size)))
		return PACKET_MALFORMED;
	return verdict;
}

/*
 * The class of a packet that is a `verdict` so far, and has a header `at` so many bytes, with `size` bytes
 * from there on by the word of the IP header before it. `what` is its protocol, and the network above
 * these eight bits. This function and the two that call it are not static: so each is verified once,
 * and not in every state in which it is called.
 */
__noinline int classify_transport(struct xdp_md *packet, __u32 at, __u32 what, __u32 size,
				  __u32 verdict)
{
	__u32 protocol = what & 0xff, network = what >> 8;
	__u32 transport = transport_of(protocol), ports = PORTS_NONE;
	struct ports *any;
	struct tcp *tcp;
	struct udp *udp;

	if (protocol == NEXT_TCP) {
		tcp = HEADER(packet, at, struct tcp);
		if (!tcp)
			return class_of(network, transport, ports, PACKET_TRUNCATED);
		ports = ports_of(tcp->from, tcp->to);
		verdict = verdict_of_tcp(tcp, size, verdict);
	} else if (protocol == NEXT_UDP) {
		udp = HEADER(packet, at, struct udp);
		if (!udp)
			return class_of(network, transport, ports, PACKET_TRUNCATED);
		ports = ports_of(udp->from, udp->to);
		verdict = verdict_of_udp(udp, size, verdict);
	} else if (protocol == NEXT_SCTP) {
		any = HEADER(packet, at, struct ports);
		if (!any)
			return class_of(network, transport, ports, PACKET_TRUNCATED);
		ports = ports_of(any->from, any->to);
	}
	return class_of(network, transport, ports, verdict);
}

/* ---------------------------------------------------------------- IP */

__noinline int classify_ipv4(struct xdp_md *packet, __u32 at)
{
	__u32 header, fragment, verdict = PACKET_WHOLE;
	__u64 total, present = length_of(packet) - at;
	struct ipv4 *ip = HEADER(packet, at, struct ipv4);

	if (!ip)
		return class_of(NETWORK_IPV4, TRANSPORT_NONE, PORTS_NONE, PACKET_TRUNCATED);
	header = (ip->version_length & 0xf) * 4;
	total = bpf_ntohs(ip->total_length);
	if (!total && present > 0xffff)
		total = present; /* put together by the kernel, larger than can be said */
	if (ip->version_length >> 4 != 4 || header < sizeof(*ip) || total < header)
		return class_of(NETWORK_IPV4, TRANSPORT_NONE, PORTS_NONE, PACKET_MALFORMED);
	if (total > present)
		return class_of(NETWORK_IPV4, TRANSPORT_NONE, PORTS_NONE, PACKET_TRUNCATED);
	fragment = bpf_ntohs(ip->fragment);
	if (fragment & IPV4_OFFSET)
		return class_of(NETWORK_IPV4, transport_of(ip->protocol), PORTS_NONE,
				PACKET_LATER_FRAGMENT);
	if (fragment & IPV4_MORE_FRAGMENTS)
		verdict = PACKET_FIRST_FRAGMENT;
	return classify_transport(packet, at + header, ip->protocol | NETWORK_IPV4 << 8,
				  total - header, verdict);
}

static __always_inline bool is_extension(__u8 next)
{
	return next == NEXT_HOP_BY_HOP || next == NEXT_ROUTING || next == NEXT_OPTIONS ||
	       next == NEXT_MOBILITY || next == NEXT_HIP || next == NEXT_SHIM6;
}

/* In a fragment that is not the first there is no header, of an extension neither. */
static __always_inline __u32 later_fragment(__u8 next)
{
	__u32 transport = is_extension(next) ? TRANSPORT_NONE : transport_of(next);

	return class_of(NETWORK_IPV6, transport, PORTS_NONE, PACKET_LATER_FRAGMENT);
}

__noinline int classify_ipv6(struct xdp_md *packet, __u32 at)
{
	struct ipv6 *ip = HEADER(packet, at, struct ipv6);
	__u32 begin, verdict = PACKET_WHOLE;
	__u64 payload, present;
	struct extension *extension;
	struct fragment *fragment;
	__u8 next;
	int i;

	if (!ip)
		return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE, PACKET_TRUNCATED);
	if (bpf_ntohl(ip->version_class_label) >> 28 != 6)
		return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE, PACKET_MALFORMED);
	payload = bpf_ntohs(ip->payload_length);
	next = ip->next;
	at += sizeof(*ip);
	begin = at;
	present = length_of(packet) - at;
	if (payload > present)
		return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE, PACKET_TRUNCATED);
	/* A jumbogram says its length in an option. */
	if (!payload && (next == NEXT_HOP_BY_HOP || present > 0xffff))
		payload = present;
	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (next == NEXT_FRAGMENT) {
			fragment = HEADER(packet, at, struct fragment);
			if (!fragment)
				return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE,
						PACKET_TRUNCATED);
			next = fragment->next;
			if (fragment->offset_more & bpf_htons(IPV6_OFFSET))
				return later_fragment(next);
			if (fragment->offset_more & bpf_htons(IPV6_MORE_FRAGMENTS))
				verdict = PACKET_FIRST_FRAGMENT;
			at += sizeof(*fragment);
		} else if (is_extension(next)) {
			extension = HEADER(packet, at, struct extension);
			if (!extension || extension->length * 8u + sizeof(*extension) >
						  length_of(packet) - at)
				return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE,
						PACKET_TRUNCATED);
			next = extension->next;
			at += extension->length * 8u + sizeof(*extension);
		} else {
			break;
		}
	}
	if (is_extension(next) || next == NEXT_FRAGMENT)
		return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE, PACKET_EXTENSIONS);
	if (at - begin > payload)
		return class_of(NETWORK_IPV6, TRANSPORT_NONE, PORTS_NONE, PACKET_MALFORMED);
	return classify_transport(packet, at, next | NETWORK_IPV6 << 8, payload - (at - begin),
				  verdict);
}

/* ---------------------------------------------------------------- frame */

static __always_inline bool is_vlan(__be16 type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD) ||
	       type == bpf_htons(ETH_P_QINQ1);
}

/* What is behind the frame's own header and its VLAN tags. */
static __always_inline __u32 classify_network(struct xdp_md *packet, __u32 at, __be16 type)
{
	if (type == bpf_htons(ETH_P_IP))
		return classify_ipv4(packet, at);
	if (type == bpf_htons(ETH_P_IPV6))
		return classify_ipv6(packet, at);
	if (type == bpf_htons(ETH_P_ARP))
		return class_of(NETWORK_ARP, TRANSPORT_NONE, PORTS_NONE, PACKET_WHOLE);
	return class_of(NETWORK_OTHER, TRANSPORT_NONE, PORTS_NONE, PACKET_WHOLE);
}

static __always_inline __u32 with_vlan(__u32 vlan, __u32 class)
{
	return vlan * NETWORK_END * TRANSPORT_END * PORTS_END * PACKET_END + class;
}

static __always_inline __u32 classify(struct xdp_md *packet)
{
	__u32 cut = class_of(NETWORK_OTHER, TRANSPORT_NONE, PORTS_NONE, PACKET_TRUNCATED);
	struct ethernet *frame = HEADER(packet, 0, struct ethernet);
	__u32 at = sizeof(*frame), vlan;
	struct vlan_tag *tag;
	__be16 type;

	if (!frame)
		return cut;
	type = frame->type;
	for (vlan = 0; vlan < MOST_VLANS && is_vlan(type); vlan++) {
		tag = HEADER(packet, at, struct vlan_tag);
		if (!tag)
			return with_vlan(vlan, cut);
		at += sizeof(*tag);
		type = tag->type;
	}
	if (is_vlan(type))
		return with_vlan(VLAN_MORE, class_of(NETWORK_OTHER, TRANSPORT_NONE, PORTS_NONE, PACKET_WHOLE));
	return with_vlan(vlan, classify_network(packet, at, type));
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
	struct packet_counts *counts = counts_of(packet->ingress_ifindex);
	__u32 class;

	if (!counts) {
		count_fault(FAULT_NO_SLOT);
		return XDP_PASS;
	}
	class = classify(packet);
	if (class >= PACKET_CLASSES) { /* cannot be, and the verifier wants to see it */
		count_fault(FAULT_NO_SLOT);
		return XDP_PASS;
	}
	counts->by_class[class].packets++;
	counts->by_class[class].bytes += length_of(packet);
	return XDP_PASS;
}
