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

/* Names what is not a map's value, so that it is in the objects' BTF. */
union table {
	struct packet_count packet_count;
	struct packet_counts packet_counts;
	enum packet_vlan vlan;
	enum packet_network network;
	enum packet_transport transport;
	enum packet_ports ports;
	enum packet_verdict verdict;
};

#endif
