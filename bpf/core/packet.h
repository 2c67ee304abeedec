/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Headers of packets as they are on the wire. None is of the kernel's types: nothing is relocated. */
#ifndef STREAMER_PACKET_H
#define STREAMER_PACKET_H

#include <linux/types.h>

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

#endif
