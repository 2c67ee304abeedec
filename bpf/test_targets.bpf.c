// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * For the tests: programs that attach to an interface, to a cgroup and to a sampling rate. They
 * write no records, but maps that the agent reads from time to time. Never packaged; what each
 * needs is said in tests/kernel/targets_sensor.py.
 */
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* Packets by the protocol in their Ethernet header. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 64);
	__type(key, __u16);
	__type(value, __u64);
} protocols SEC(".maps");

static __always_inline void count_in(void *map, const void *key)
{
	__u64 one = 1, *counter = bpf_map_lookup_elem(map, key);

	if (counter)
		count(counter);
	else
		bpf_map_update_elem(map, key, &one, BPF_ANY);
}

#define ETHERNET 14

SEC("xdp")
int on_packet(struct xdp_md *packet)
{
	__u8 *data = (__u8 *)(long)packet->data, *end = (__u8 *)(long)packet->data_end;
	__u16 protocol;

	if (data + ETHERNET <= end) {
		protocol = data[ETHERNET - 2] << 8 | data[ETHERNET - 1];
		count_in(&protocols, &protocol);
	}
	return XDP_PASS;
}

struct traffic {
	__u64 packets;
	__u64 bytes;
};

/* What the sockets of a cgroup send, by the port that it is for. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct traffic);
} flows SEC(".maps");

SEC("cgroup_skb/egress")
int on_send(struct __sk_buff *packet)
{
	struct traffic first = { .packets = 1, .bytes = packet->len }, *flow;
	struct bpf_sock *socket = packet->sk;
	__u32 port;

	socket = socket ? bpf_sk_fullsock(socket) : NULL;
	if (!socket)
		return 1;
	port = bpf_ntohs(socket->dst_port);
	flow = bpf_map_lookup_elem(&flows, &port);
	if (flow) {
		count(&flow->packets);
		__sync_fetch_and_add(&flow->bytes, packet->len);
	} else {
		bpf_map_update_elem(&flows, &port, &first, BPF_ANY);
	}
	return 1; /* let it pass */
}

/* Samples by process. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} samples SEC(".maps");

SEC("perf_event")
int on_sample(void *ctx)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32;

	count_in(&samples, &pid);
	return 0;
}
