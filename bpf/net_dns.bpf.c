// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * net.dns: what the sockets of this host ask of DNS servers, and what they are told.
 *
 * Programs at the root cgroup see each packet of each local socket, in every network namespace, as it
 * leaves for the network and as it comes to the socket. All but those from and to a port of DNS pass at
 * the price of a look at their ports. A query is kept, with its owner, until its response comes from
 * where it was sent to, with the same number and question; then both become one record. What is in a
 * message is not looked at here, but for the length of its question: that is left to a process without
 * privileges.
 *
 * A program that the agent runs every second reports the queries that nobody answered.
 */
#define TASK_HELPERS 0
#include "core/sock.bpf.h"
#include "core/tables.h"
#include "core/packet.h"

char LICENSE[] SEC("license") = "GPL";

/* Those of servers; where there are fewer, one is there more than once. */
OPTION(dns_port_1);
OPTION(dns_port_2);
OPTION(dns_port_3);
OPTION(dns_port_4);
/* How long a response may take. */
OPTION(dns_timeout_seconds);
/* How many exchanges of one user are reported in a second. */
OPTION(dns_per_second);
/* Queries that can be kept at once, of all; one user has an eighth of that. */
OPTION(dns_queries);

#define ONE_SECOND 1000000000ull
#define MOST_WEIGHT (1u << 20)
#define DNS_HEADER 12
#define DNS_RESPONSE 0x80 /* in the third byte */
#define MOST_LABELS 128
#define MOST_LABEL 63
#define MOST_NAME 255
#define QUESTION_WORDS 33 /* a name, type and class */
#define UNSOLICITED_PER_SECOND 100
#define SHARES 256
#define SHARE_OF_ALL 8
#define SLOTS_AT_ONCE 2048
#define MOST_TOLD_PER_RUN 1024
#define SLOTS_MADE_PER_RUN 4096

enum dns_state {
	DNS_ANSWERED,
	DNS_UNANSWERED,
	DNS_UNSOLICITED,
	DNS_UNFOLLOWED,
};

/* ---------------------------------------------------------------- what is kept */

struct dns_key {
	__u64 cookie; /* of the socket */
	__u8 remote_addr[16];
	__u32 question; /* a hash */
	__u16 remote_port;
	__u16 id;
	__u8 transport;
	__u8 ip_version;
	__u8 pad[6];
};

struct dns_query {
	struct owner owner;
	__u64 since_boot_ns; /* 0: it is not complete yet */
	__u32 slot;
	__u32 share;
	__u32 netns;
	__u32 sent; /* how often */
	__u16 local_port;
	__u16 length; /* of the beginning */
	__u32 pad;
	__u8 local_addr[16];
	__u8 beginning[DNS_QUERY_LEN]; /* header and question */
};

static const struct dns_query no_query;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct dns_key);
	__type(value, struct dns_query);
} dns_pending SEC(".maps") SIZED("table:dns_queries");

struct dns_slot {
	struct dns_key key;
	__u64 since_boot_ns; /* 0: it is free */
};

/* Where to look for queries that are too old: no program can walk through a hash on 5.10. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct dns_slot);
} dns_slots SEC(".maps") SIZED("table:dns_queries");

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 4096);
	__type(value, __u32);
} dns_free SEC(".maps") SIZED("table:dns_queries");

struct dns_progress {
	__u32 made;   /* slots that have been put among the free ones */
	__u32 looked; /* where the next look at the slots begins */
	__u32 end;    /* and where it ends */
	__u32 seed;   /* of the hash of questions */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dns_progress);
} dns_progress SEC(".maps");

/* What one user has of what all share. */
struct dns_share {
	__u64 since_boot_ns;
	__u64 reported; /* since then */
	__u64 left_out; /* in all */
	__u64 told;     /* how many of those are in the weight of one that was reported */
	__u32 kept;     /* queries, now */
	__u32 pad;
};

/* By user, and at the end that of unsolicited responses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SHARES + 1);
	__type(key, __u32);
	__type(value, struct dns_share);
} dns_shares SEC(".maps");

/* A record that is being made. The verifier wants room for the longest question before the longest
 * message, wherever that begins. */
struct dns_scratch {
	struct net_dns record;
	__u8 more[512];
};

/* Of packets that come in: nothing interrupts that on its CPU that would do the same. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dns_scratch);
} dns_scratch SEC(".maps");

/* Of queries that nobody answered: there is one process that looks for them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dns_scratch);
} dns_old_scratch SEC(".maps");

/* ---------------------------------------------------------------- packets */

struct dns_packet {
	__u8 local_addr[16];
	__u8 remote_addr[16];
	__u16 local_port;
	__u16 remote_port;
	__u8 ip_version;
	__u8 transport;
	__u16 flags;   /* of TCP */
	__u32 seq;     /* of TCP */
	__u32 at;      /* where the payload begins */
	__u32 length;  /* of it */
};

static __always_inline bool is_dns_port(__u16 port)
{
	return port == dns_port_1 || port == dns_port_2 || port == dns_port_3 || port == dns_port_4;
}

#define NEXT_TCP 6
#define NEXT_UDP 17
#define NEXT_HOP_BY_HOP 0
#define NEXT_ROUTING 43
#define NEXT_OPTIONS 60
#define MOST_EXTENSIONS 4

/* Where the transport's header begins, and above 16 bits its protocol; 0 where that is none. */
static __always_inline __u32 transport_at(void *data, void *end)
{
	struct extension *extension;
	struct ipv4 *ip = data;
	struct ipv6 *ip6 = data;
	__u32 at = sizeof(*ip6);
	__u8 next;
	int i;

	if ((void *)(ip + 1) > end)
		return 0;
	if (ip->version_length >> 4 == 4)
		return (ip->version_length & 15) * 4 | ip->protocol << 16;
	if ((void *)(ip6 + 1) > end)
		return 0;
	next = ip6->next;
	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (next != NEXT_HOP_BY_HOP && next != NEXT_ROUTING && next != NEXT_OPTIONS)
			break;
		extension = data + at;
		if (at > 0x1fff || (void *)(extension + 1) > end)
			return 0;
		next = extension->next;
		at += extension->length * 8 + 8;
	}
	return at | next << 16;
}

/* The ports, from which the first 16 bits and to which the others: 0 where there are none. */
static __always_inline __u32 ports_of(struct __sk_buff *skb, __u32 *transport)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 at = transport_at(data, end);
	struct ports *ports;

	*transport = at;
	if (at >> 16 != NEXT_UDP && at >> 16 != NEXT_TCP)
		return 0;
	at &= 0xffff;
	ports = data + at;
	if (at > 0x1fff || (void *)(ports + 1) > end)
		return 0;
	return bpf_ntohs(ports->from) << 16 | bpf_ntohs(ports->to);
}

/* The peer of a socket that is connected, as it knows it: where its own network namespace translates
 * addresses, what leaves is for another. */
static __always_inline bool asks_dns(struct __sk_buff *skb, __u32 ports)
{
	struct bpf_sock *sk = skb->sk;

	return is_dns_port(ports & 0xffff) || (sk && is_dns_port(bpf_ntohs(sk->dst_port)));
}

/* False: it is not what its headers say. `sent`: it leaves, so that its source is local. */
static __always_inline bool read_packet(struct dns_packet *packet, struct __sk_buff *skb,
					__u32 transport, const bool sent)
{
	__u32 at = transport & 0xffff, header = sizeof(struct udp);
	struct ipv6 ip6;
	struct ipv4 ip;
	struct tcp tcp;
	struct udp udp;

	__builtin_memset(packet, 0, sizeof(*packet));
	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return false;
	if (ip.version_length >> 4 == 4) {
		packet->ip_version = 4;
		*(__be32 *)packet->local_addr = sent ? ip.from : ip.to;
		*(__be32 *)packet->remote_addr = sent ? ip.to : ip.from;
	} else {
		if (bpf_skb_load_bytes(skb, 0, &ip6, sizeof(ip6)))
			return false;
		packet->ip_version = 6;
		__builtin_memcpy(packet->local_addr, sent ? ip6.from : ip6.to, 16);
		__builtin_memcpy(packet->remote_addr, sent ? ip6.to : ip6.from, 16);
	}
	if (transport >> 16 == NEXT_TCP) {
		if (bpf_skb_load_bytes(skb, at, &tcp, sizeof(tcp)))
			return false;
		packet->transport = TRANSPORT_TCP;
		packet->local_port = bpf_ntohs(sent ? tcp.from : tcp.to);
		packet->remote_port = bpf_ntohs(sent ? tcp.to : tcp.from);
		packet->seq = bpf_ntohl(tcp.seq);
		packet->flags = tcp.flags;
		header = (tcp.offset >> 4) * 4;
	} else {
		if (bpf_skb_load_bytes(skb, at, &udp, sizeof(udp)))
			return false;
		packet->transport = TRANSPORT_UDP;
		packet->local_port = bpf_ntohs(sent ? udp.from : udp.to);
		packet->remote_port = bpf_ntohs(sent ? udp.to : udp.from);
	}
	packet->at = at + header;
	if (packet->at > skb->len)
		return false;
	packet->length = skb->len - packet->at;
	return true;
}

/* Where the socket says to whom it is connected, that is who is asked. */
static __always_inline void read_peer(struct dns_packet *packet, struct bpf_sock *sk)
{
	__u16 port = bpf_ntohs(sk->dst_port);
	__u32 *addr = (__u32 *)packet->remote_addr;

	if (!port)
		return;
	packet->remote_port = port;
	if (sk->family == AF_INET) {
		addr[0] = sk->dst_ip4;
		return;
	}
	addr[0] = sk->dst_ip6[0];
	addr[1] = sk->dst_ip6[1];
	addr[2] = sk->dst_ip6[2];
	addr[3] = sk->dst_ip6[3];
	if (packet->ip_version == 4)
		unmap_addr(packet->remote_addr);
}

/* The socket as the kernel has it. By way of the stack its address becomes a number to the verifier, which
 * lets nobody look behind a socket of this type. */
static __always_inline struct sock *kernels_own(struct bpf_sock *sk)
{
	struct bpf_sock *volatile kept = sk;
	struct sock *address = NULL;

	if (bpf_probe_read_kernel(&address, sizeof(address), (const void *)&kept))
		count_fault(FAULT_UNREADABLE);
	return address;
}

static __always_inline __u32 netns_of(struct bpf_sock *sk)
{
	return READ(struct sock, kernels_own(sk), __sk_common.skc_net.net, ns.inum);
}

/* ---------------------------------------------------------------- questions */

/* The question is the same whatever the case of its letters. */
static __always_inline __u64 lower(__u64 bytes)
{
	const __u64 high = 0x8080808080808080ull, ones = 0x0101010101010101ull;
	__u64 low = bytes & ~high;
	__u64 from_a = low + ones * (128 - 'A'), past_z = low + ones * (128 - 'Z' - 1);
	__u64 letters = from_a & ~past_z & ~bytes & high;

	return bytes | letters >> 2;
}

/* In bytes; 0: there is none, or its name does not end. Not static, as others here: so it is verified
 * once, and not in each state in which it is called, nor is what follows in each in which it ends. */
__noinline int length_of_question(struct __sk_buff *skb, __u32 at, __u32 length)
{
	__u32 end = DNS_HEADER, i;
	__u8 label = 1;

	for (i = 0; i < MOST_LABELS; i++) {
		if (end + 5 > length || end > DNS_HEADER + MOST_NAME ||
		    bpf_skb_load_bytes(skb, at + end, &label, 1) || label > MOST_LABEL)
			return 0;
		end += label + 1;
		if (!label)
			break;
	}
	end += 4;
	if (label || end > length || end - DNS_HEADER > MOST_NAME + 4)
		return 0;
	return end - DNS_HEADER;
}

static __always_inline __u32 hash_of(const __u64 *words, __u32 length, __u32 seed)
{
	__u64 hash = seed;
	__u32 i;

#pragma unroll
	for (i = 0; i < QUESTION_WORDS; i++) {
		if (i * 8 < length) {
			hash = (hash ^ lower(words[i])) * 0x9e3779b97f4a7c15ull;
			hash ^= hash >> 29;
		}
	}
	return hash ^ hash >> 32;
}

static __always_inline __u32 seed_of_hash(void)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);

	return progress ? progress->seed : 0;
}

/* The length of a question, and in the lower half its hash; 0: there is none. */
__noinline __u64 question_of(struct __sk_buff *skb, __u32 at, __u32 length)
{
	__u64 words[QUESTION_WORDS] = {};
	__u32 size = length_of_question(skb, at, length);

	if (!size)
		return 0;
	barrier_var(size); /* else the two become one that the verifier cannot follow */
	if (size > sizeof(words) || bpf_skb_load_bytes(skb, at + DNS_HEADER, words, size))
		return 0;
	return (__u64)size << 32 | hash_of(words, size, seed_of_hash());
}

/* ---------------------------------------------------------------- shares */

/* Users share by who they logged in as, which they cannot change; services by who they are. */
static __always_inline __u32 share_of(const struct owner *owner, struct task_struct *task)
{
	__u32 user = -1;

	if (!owner->known)
		return 0;
	if (bpf_core_field_exists(task->loginuid))
		user = READ(struct task_struct, task, loginuid.val);
	if (user == (__u32)-1)
		user = owner->task.uid;
	return (user * 0x9e3779b1u >> 16) % SHARES;
}

/* Keeps down what a flood costs; what is left out is in the weight of the next one. */
static __always_inline bool within_limit(struct event_base *base, __u32 index, __u64 most)
{
	struct dns_share *share = bpf_map_lookup_elem(&dns_shares, &index);
	__u64 more;

	if (!share)
		return true;
	if (base->boot_ns - share->since_boot_ns >= ONE_SECOND) {
		share->since_boot_ns = base->boot_ns;
		share->reported = 0;
	}
	if (share->reported >= most) {
		__sync_fetch_and_add(&share->left_out, base->weight);
		count_shed(KIND_NET_DNS);
		return false;
	}
	count(&share->reported);
	more = share->left_out - share->told;
	if (more > MOST_WEIGHT - base->weight)
		more = MOST_WEIGHT - base->weight;
	share->told += more;
	base->weight += more;
	return true;
}

/* ---------------------------------------------------------------- records */

static __always_inline void read_ends(struct endpoints *ends, const struct net_dns *record)
{
	__builtin_memset(ends, 0, sizeof(*ends));
	__builtin_memcpy(ends->local_addr, record->local_addr, 16);
	__builtin_memcpy(ends->remote_addr, record->remote_addr, 16);
	ends->local_port = record->local_port;
	ends->remote_port = record->remote_port;
	ends->ip_version = record->ip_version;
	ends->netns = record->netns;
}

/* Whether it is to be reported. The record is complete but for its base. */
static __always_inline bool admits_dns(struct net_dns *record, const struct owner *owner,
				       __u32 share)
{
	__u64 most = share == SHARES ? UNSOLICITED_PER_SECOND : dns_per_second;
	struct endpoints ends;

	read_ends(&ends, record);
	return admits_net(&record->base, owner, KIND_NET_DNS, &ends, DIRECTION_OUTBOUND) &&
	       within_limit(&record->base, share, most);
}

/* Gives up a query that was kept. False: another CPU has done so. */
static __always_inline bool take_out(const struct dns_key *key, const struct dns_query *query)
{
	__u32 slot = query->slot, index = query->share;
	struct dns_slot *place = bpf_map_lookup_elem(&dns_slots, &slot);
	struct dns_share *share;

	if (bpf_map_delete_elem(&dns_pending, key))
		return false;
	if (place)
		place->since_boot_ns = 0;
	if (bpf_map_push_elem(&dns_free, &slot, 0))
		count_fault(FAULT_NO_SLOT);
	share = bpf_map_lookup_elem(&dns_shares, &index);
	if (share)
		__sync_fetch_and_add(&share->kept, -1);
	return true;
}

static __always_inline void put_query(struct net_dns *record, const struct dns_key *key,
				      const struct dns_query *query)
{
	record->task = query->owner.task;
	record->owner_known = query->owner.known;
	record->latency_ns = record->base.boot_ns - query->since_boot_ns;
	record->queries = query->sent;
	record->netns = query->netns;
	record->local_port = query->local_port;
	record->remote_port = key->remote_port;
	record->dns_id = key->id;
	record->ip_version = key->ip_version;
	record->transport = key->transport;
	__builtin_memcpy(record->local_addr, query->local_addr, 16);
	__builtin_memcpy(record->remote_addr, key->remote_addr, 16);
	*(__u16 *)record->data = query->length;
	__builtin_memcpy(record->data + 2, query->beginning, DNS_QUERY_LEN);
}

/* ---------------------------------------------------------------- queries */

static __always_inline void make_key(struct dns_key *key, const struct dns_packet *packet,
				     __u64 cookie, __u16 id, __u64 question)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = cookie;
	__builtin_memcpy(key->remote_addr, packet->remote_addr, 16);
	key->question = question;
	key->remote_port = packet->remote_port;
	key->id = id;
	key->transport = packet->transport;
	key->ip_version = packet->ip_version;
}

/* A query that finds no room is lost. It is given a number, by whose gap the reader knows. */
static __noinline void lose_query(void)
{
	struct kind_counters *counts;
	struct event_base base = {};

	count_fault(FAULT_DNS_FULL);
	counts = number(&base, KIND_NET_DNS, RING_BULK, 0);
	if (counts)
		count(&counts->lost);
}

/* Over UDP whoever sends is the current task. TCP sends when it can, so its owner is the socket's. */
static __noinline void owner_of_query(struct owner *owner, struct bpf_sock *sk, __u32 transport)
{
	if (transport == TRANSPORT_UDP)
		own(owner);
	else
		*owner = nothing.owner;
}

static __always_inline struct dns_query *make_query(const struct dns_key *key,
						    const struct owner *owner)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 index = share_of(owner, task), slot;
	struct dns_share *share = bpf_map_lookup_elem(&dns_shares, &index);
	struct dns_query *query;

	if (!share || share->kept >= dns_queries / SHARE_OF_ALL ||
	    bpf_map_pop_elem(&dns_free, &slot)) {
		lose_query();
		return NULL;
	}
	if (bpf_map_update_elem(&dns_pending, key, &no_query, BPF_NOEXIST)) {
		if (bpf_map_push_elem(&dns_free, &slot, 0))
			count_fault(FAULT_NO_SLOT);
		lose_query();
		return NULL;
	}
	query = bpf_map_lookup_elem(&dns_pending, key);
	if (!query) {
		count_fault(FAULT_NO_SLOT);
		return NULL;
	}
	__sync_fetch_and_add(&share->kept, 1);
	query->owner = *owner;
	query->share = index;
	query->slot = slot;
	return query;
}

static __noinline void keep_query(struct __sk_buff *skb, const struct dns_packet *packet,
				  struct bpf_sock *sk, __u32 id, __u64 question)
{
	__u32 length = (question >> 32) + DNS_HEADER;
	struct dns_query *query;
	struct dns_slot *place;
	struct owner owner;
	struct dns_key key;

	make_key(&key, packet, bpf_get_socket_cookie(skb), id, question);
	query = bpf_map_lookup_elem(&dns_pending, &key);
	if (query) {
		__sync_fetch_and_add(&query->sent, 1);
		return;
	}
	owner_of_query(&owner, sk, packet->transport);
	query = make_query(&key, &owner);
	if (!query)
		return;
	query->netns = netns_of(sk);
	query->local_port = packet->local_port;
	__builtin_memcpy(query->local_addr, packet->local_addr, 16);
	query->sent = 1;
	if (!(question >> 32)) /* so that its mistake is seen */
		length = packet->length < DNS_QUERY_LEN ? packet->length : DNS_QUERY_LEN;
	barrier_var(length);
	if (length && length <= DNS_QUERY_LEN &&
	    !bpf_skb_load_bytes(skb, packet->at, query->beginning, length))
		query->length = length;
	query->since_boot_ns = bpf_ktime_get_boot_ns();
	place = bpf_map_lookup_elem(&dns_slots, &query->slot);
	if (place) {
		place->key = key;
		place->since_boot_ns = query->since_boot_ns;
	}
}

/* ---------------------------------------------------------------- responses */

static __noinline void emit_response(struct __sk_buff *skb, const struct dns_packet *packet,
				     struct bpf_sock *sk, __u32 id, __u64 question)
{
	struct dns_scratch *scratch = ONLY_ENTRY(dns_scratch);
	__u32 length = packet->length, before, share = SHARES;
	struct owner owner = {};
	struct dns_query *query;
	struct net_dns *record;
	struct dns_key key;

	if (!scratch)
		return;
	record = &scratch->record;
	start_base(&record->base);
	make_key(&key, packet, bpf_get_socket_cookie(skb), id, question);
	query = bpf_map_lookup_elem(&dns_pending, &key);
	if (query && query->since_boot_ns) {
		put_query(record, &key, query);
		owner = query->owner;
		share = query->share;
		if (!take_out(&key, query))
			query = NULL;
	}
	if (query) {
		record->state = DNS_ANSWERED;
	} else {
		put_query(record, &key, &no_query);
		owner = no_query.owner;
		share = SHARES;
		record->state = DNS_UNSOLICITED;
		record->latency_ns = 0;
		record->netns = netns_of(sk);
		record->local_port = packet->local_port;
		__builtin_memcpy(record->local_addr, packet->local_addr, 16);
	}
	record->message_bytes = length;
	if (!admits_dns(record, &owner, share))
		return;
	before = *(__u16 *)record->data & 511;
	if (length > DNS_MESSAGE_LEN) {
		length = DNS_MESSAGE_LEN;
		record->base.cut = 1;
	}
	if (length && length <= DNS_MESSAGE_LEN &&
	    bpf_skb_load_bytes(skb, packet->at, record->data + 2 + before, length)) {
		length = 0;
		record->base.flags |= FLAG_INCOMPLETE;
	}
	length = (length + before + 2) & 8191;
	record->message_len = length;
	length += offsetof(struct net_dns, data);
	if (length <= sizeof(*scratch))
		output(skb, &bulk, &record->base, KIND_NET_DNS, RING_BULK, length);
}

/* ---------------------------------------------------------------- packets that matter */

static __always_inline int sent(struct __sk_buff *skb, __u32 transport)
{
	struct dns_packet packet;
	struct bpf_sock *sk;
	__u8 header[4];

	if (!enabled(KIND_NET_DNS))
		return 0;
	sk = skb->sk;
	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk || !read_packet(&packet, skb, transport, true))
		return 0;
	read_peer(&packet, sk);
	if (packet.transport != TRANSPORT_UDP)
		return 0;
	if (packet.length < DNS_HEADER || bpf_skb_load_bytes(skb, packet.at, header, 4) ||
	    header[2] & DNS_RESPONSE)
		return 0;
	keep_query(skb, &packet, sk, header[0] << 8 | header[1],
		   question_of(skb, packet.at, packet.length));
	return 0;
}

static __always_inline int received(struct __sk_buff *skb, __u32 transport)
{
	struct dns_packet packet;
	struct bpf_sock *sk;
	__u8 header[4];

	if (!enabled(KIND_NET_DNS))
		return 0;
	sk = skb->sk;
	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk || !read_packet(&packet, skb, transport, false))
		return 0;
	if (packet.transport != TRANSPORT_UDP)
		return 0;
	if (packet.length < DNS_HEADER || bpf_skb_load_bytes(skb, packet.at, header, 4) ||
	    !(header[2] & DNS_RESPONSE))
		return 0;
	emit_response(skb, &packet, sk, header[0] << 8 | header[1],
		      question_of(skb, packet.at, packet.length));
	return 0;
}

#define PASS 1

#define OF_DNS EMITS("net.dns") NEEDS("cgroup")

SEC("cgroup_skb/egress") OF_DNS
int on_dns_egress(struct __sk_buff *skb)
{
	__u32 transport, ports = ports_of(skb, &transport);

	if (ports && asks_dns(skb, ports))
		(void)UNPREEMPTED(sent(skb, transport));
	return PASS;
}

SEC("cgroup_skb/ingress") OF_DNS
int on_dns_ingress(struct __sk_buff *skb)
{
	__u32 transport, ports = ports_of(skb, &transport);

	if (is_dns_port(ports >> 16) && ports)
		(void)UNPREEMPTED(received(skb, transport));
	return PASS;
}

/* ---------------------------------------------------------------- no response */

/* Puts the next slot among the free ones. */
__noinline int make_slot(void)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	__u32 slot;

	if (!progress)
		return 0;
	slot = progress->made;
	if (slot < dns_queries && !bpf_map_push_elem(&dns_free, &slot, 0))
		progress->made = slot + 1;
	return 0;
}

/* Whether the query of a slot has waited for too long. */
__noinline int is_old(__u32 slot)
{
	struct dns_slot *place = bpf_map_lookup_elem(&dns_slots, &slot);

	return place && place->since_boot_ns &&
	       bpf_ktime_get_boot_ns() - place->since_boot_ns >= dns_timeout_seconds * ONE_SECOND;
}

/* Makes a record of the query of a slot. Its size; 0: it was answered just now, or is not to be told. */
static __noinline int expire(__u32 slot)
{
	struct dns_slot *place = bpf_map_lookup_elem(&dns_slots, &slot);
	struct dns_scratch *scratch = ONLY_ENTRY(dns_old_scratch);
	struct dns_query *query;
	struct net_dns *record;
	struct owner owner;
	struct dns_key key;
	__u32 length, share;

	if (!place || !scratch)
		return 0;
	key = place->key;
	query = bpf_map_lookup_elem(&dns_pending, &key);
	if (!query || query->slot != slot)
		return 0;
	record = &scratch->record;
	start_base(&record->base);
	put_query(record, &key, query);
	owner = query->owner;
	share = query->share;
	if (!take_out(&key, query))
		return 0;
	record->state = DNS_UNANSWERED;
	record->message_bytes = 0;
	if (!admits_dns(record, &owner, share))
		return 0;
	length = (*(__u16 *)record->data & 511) + 2;
	record->message_len = length;
	return length + offsetof(struct net_dns, data);
}

/* The same of the next one that is old, of those that this run has still to look at. -1: there is none
 * among the next few. */
__noinline int next_old(void)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	__u32 i, slot;

	if (!progress)
		return -1;
	slot = progress->looked;
	for (i = 0; i < SLOTS_AT_ONCE; i++) {
		if (slot + i >= progress->end)
			break;
		if (is_old(slot + i)) {
			progress->looked = slot + i + 1;
			return expire(slot + i);
		}
	}
	progress->looked = slot + i;
	return -1;
}

/* Never attached: the agent runs it before the others are attached, and then every second. */
SEC("raw_tp/streamer_every_second") EMITS("net.dns") NEEDS("cgroup")
DOC("queries without a response")
int every_second(void *ctx)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	struct dns_scratch *scratch = ONLY_ENTRY(dns_old_scratch);
	int i, size;

	if (!progress || !scratch)
		return 0;
	if (!progress->seed)
		progress->seed = bpf_get_prandom_u32() | 1;
	if (progress->made < dns_queries) {
		for (i = 0; i < SLOTS_MADE_PER_RUN; i++)
			make_slot();
	}
	if (progress->looked >= progress->made)
		progress->looked = 0;
	progress->end = progress->made;
	for (i = 0; i < MOST_TOLD_PER_RUN; i++) {
		size = next_old();
		if (size < 0 && progress->looked >= progress->end)
			break;
		if (size > 0 && size <= (int)sizeof(*scratch))
			(void)UNPREEMPTED(output(ctx, &bulk, &scratch->record.base, KIND_NET_DNS,
						 RING_BULK, size));
	}
	return 0;
}
