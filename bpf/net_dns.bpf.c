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
/* How many exchanges of one who pays (see core/fair.bpf.h) are reported in a second. */
OPTION(dns_per_second);
/* Queries that can be kept at once, of all; one who pays has an eighth of that. */
OPTION(dns_queries);

#define ONE_SECOND 1000000000ull
#define MOST_WEIGHT (1u << 20)
#define DNS_HEADER 12
#define DNS_RESPONSE 0x80 /* in the third byte */
#define MOST_LABELS 128
#define MOST_LABEL 63
#define MOST_NAME 255
#define MOST_QUESTION (MOST_NAME + 4) /* a name, type and class */
#define WORDS_AT_ONCE 8 /* of a question, when it is hashed */
#define BYTES_AT_ONCE (8 * WORDS_AT_ONCE)
#define UNSOLICITED_PER_SECOND 100
/* Users have the first SHARES, services and containers the next ones: no user shares with those. */
#define SHARES 256
#define SHARES_OF_CGROUPS SHARES
#define SHARE_OF_TIMERS (2 * SHARES)
#define SHARES_OF_UNSOLICITED (SHARE_OF_TIMERS + 1)
#define SHARES_IN_ALL (SHARES_OF_UNSOLICITED + SHARES)
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

/* The place of the last of `length` bytes. Kernels before 6.8 do not see that what is not 0 is at
 * least 1, and let nothing be read of which the length may be 0: of `last_of(length) + 1` they do.
 */
static __always_inline __u32 last_of(__u32 length)
{
	__u32 last = length - 1;

	barrier_var(last);
	return last;
}

/* ---------------------------------------------------------------- what is kept */

/* What is known of a packet, and of a connection. */
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
	__u32 share;   /* of whoever sends: over TCP, of whoever connected */
};

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

/* What one who pays has of what all share. */
struct dns_share {
	__u64 since_boot_ns;
	__u64 reported; /* since then */
	__u64 left_out; /* in all */
	__u64 told;     /* how many of those are in the weight of one that was reported */
	__u32 kept;     /* queries, now */
	__u32 pad;
};

/* By who pays (see core/fair.bpf.h), and behind that by the user to whose socket an unsolicited response
 * came. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SHARES_IN_ALL);
	__type(key, __u32);
	__type(value, struct dns_share);
} dns_shares SEC(".maps");

enum dns_stream_state {
	STREAM_UNKNOWN,  /* nobody saw it begin */
	STREAM_FOLLOWED,
	STREAM_LOST,     /* where the next message begins is not known any more */
	STREAM_ENDED,    /* by a FIN or RST: nothing belongs to it from here on */
};

/* One direction of a TCP connection: messages, each behind its length in two bytes. */
struct dns_stream {
	__u32 next;   /* number of the byte that is expected */
	__u16 length; /* of the message */
	__u16 left;   /* of its bytes; 0: its length comes next */
	__u16 filled; /* bytes that are kept */
	__u8 state;   /* enum dns_stream_state */
	__u8 partial; /* bytes of the message are missing: no more are kept */
	__u8 half;    /* the first byte of a length has come */
	__u8 first;   /* that */
	__u8 ends;    /* the packet of now says that it is the last one */
	__u8 pad;
	__u32 at;     /* what the packet of now brings: where, how much, its number, and that behind it */
	__u32 brings;
	__u32 seq;
	__u32 end;
};

#define SENT_BYTES 512
#define KEPT_AT_ONCE 2048

/* With the socket. The messages begin so that the question, which is hashed by words, is aligned; the
 * verifier wants as much room again, wherever what comes is put. */
struct dns_connection {
	struct dns_packet ends;
	struct dns_stream sent;
	struct dns_stream received;
	__u16 transfer_id; /* of the last query for a zone */
	__u8 transfers;
	__u8 pad[5];
	__u8 sent_bytes[2 * SENT_BYTES];
	/* From 7.0 on nothing of a socket's can be larger than 8 KiB. The verifier wants room behind the
	 * last place for what is kept at once. */
	__u8 received_bytes[DNS_MESSAGE_LEN + KEPT_AT_ONCE];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dns_connection);
} dns_connections SEC(".maps");

/* By the cookie of the socket: connections of which messages may have been missed. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} dns_unfollowed SEC(".maps");

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

/* Whether the socket is connected to anything but a DNS server: as it knows its peer, because where its own
 * network namespace translates addresses, what leaves is for another. Most packets are done with that. */
static __always_inline bool speaks_of_else(struct bpf_sock *sk, bool *connected)
{
	__u16 port = sk ? sk->dst_port : 0;

	*connected = port && is_dns_port(bpf_ntohs(port));
	return port && !*connected;
}

/* A datagram can be sent to another than the one that its socket is connected to. */
static __always_inline bool sends_to_anybody(struct bpf_sock *sk)
{
	if (!sk)
		return true;
	sk = bpf_sk_fullsock(sk);
	return sk && sk->protocol == IPPROTO_UDP;
}

/* False: it is not what its headers say. `sent`: it leaves, so that its source is local. Not inlined: what
 * comes after it needs the stack that the headers take. */
static __noinline bool read_packet(struct dns_packet *packet, struct __sk_buff *skb,
					__u32 transport, __u32 sent)
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

	if (!is_dns_port(port)) /* it is not, or this goes to another */
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

/* Of the next words of a question. What is behind `length` counts as zeros. */
static __always_inline __u64 hash_words(__u64 hash, const __u64 *words, __u32 length)
{
	__u64 word;
	__u32 i;

#pragma unroll
	for (i = 0; i < WORDS_AT_ONCE; i++) {
		if (i * 8 < length) {
			word = words[i];
			if (length - i * 8 < 8)
				word &= (1ull << (length - i * 8) * 8) - 1;
			hash = (hash ^ lower(word)) * 0x9e3779b97f4a7c15ull;
			hash ^= hash >> 29;
		}
	}
	return hash;
}

/* A question as it is known by: its length, and in the lower half its hash. */
static __always_inline __u64 as_question(__u32 length, __u64 hash)
{
	return (__u64)length << 32 | (__u32)(hash ^ hash >> 32);
}

static __always_inline __u32 seed_of_hash(void)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);

	return progress ? progress->seed : 0;
}

/* The same of a message that is kept. */
static __always_inline __u32 length_of_kept(const __u8 *message, __u32 length)
{
	__u32 end = DNS_HEADER, i;
	__u8 label = 1;

	for (i = 0; i < MOST_LABELS; i++) {
		if (end + 5 > length || end > DNS_HEADER + MOST_NAME)
			return 0;
		label = message[end & (SENT_BYTES - 1)];
		if (label > MOST_LABEL)
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

static __always_inline struct dns_connection *connection_of(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return NULL;
	sk = bpf_sk_fullsock(sk);
	return sk ? bpf_sk_storage_get(&dns_connections, sk, NULL, 0) : NULL;
}

/* The question of the message that a connection has just sent or received. */
__noinline __u64 question_of_kept(struct __sk_buff *skb, __u32 sent)
{
	struct dns_connection *connection = connection_of(skb);
	__u32 size, length, done;
	__u8 *message;
	__u64 hash;

	if (!connection)
		return 0;
	message = sent ? connection->sent_bytes : connection->received_bytes;
	length = sent ? connection->sent.filled : connection->received.filled;
	size = length_of_kept(message, length);
	if (!size)
		return 0;
	hash = seed_of_hash();
#pragma unroll
	for (done = 0; done < MOST_QUESTION; done += BYTES_AT_ONCE)
		if (done < size)
			hash = hash_words(hash, (const __u64 *)(message + DNS_HEADER + done),
					  size - done);
	return as_question(size, hash);
}

/* The length of a question, and in the lower half its hash; 0: there is none. */
__noinline __u64 question_of(struct __sk_buff *skb, __u32 at, __u32 length)
{
	__u32 size = length_of_question(skb, at, length), done, last;
	__u64 hash = seed_of_hash();

	if (!size)
		return 0;
	for (done = 0; done < MOST_QUESTION; done += BYTES_AT_ONCE) {
		__u64 words[WORDS_AT_ONCE] = {};

		if (done >= size)
			break;
		last = last_of(size - done);
		if (last >= sizeof(words))
			last = sizeof(words) - 1;
		if (bpf_skb_load_bytes(skb, at + DNS_HEADER + done, words, last + 1))
			return 0;
		hash = hash_words(hash, words, size - done);
	}
	return as_question(size, hash);
}

/* ---------------------------------------------------------------- shares */

static __always_inline __u32 share_of(__u64 id)
{
	return (id * 0x9e3779b97f4a7c15ull >> 32) % SHARES;
}

/* Of whoever pays for what the current task does. Not static, as others here: so it is verified once. */
__noinline int own_share(void)
{
	struct payer_key key = {};

	find_payer(&key);
	return share_of(key.id) + (key.kind == PAYER_USER ? 0 : SHARES_OF_CGROUPS);
}

/*
 * Of whoever opens a connection. That is the current task as long as a system call has the socket. Else a
 * timer sends the SYN, in whatever task it interrupts, because the first one did not come as far as here. As
 * a user can see to that (by rules in a network namespace of his own), all of those pay together, and
 * nobody whom they happen to interrupt.
 */
static __always_inline __u32 share_of_opener(struct bpf_sock *sk)
{
	return READ(struct sock, kernels_own(sk), sk_lock.owned) ? own_share() : SHARE_OF_TIMERS;
}

static __always_inline __u32 share_of_unsolicited(struct bpf_sock *sk)
{
	return SHARES_OF_UNSOLICITED +
	       share_of(READ(struct sock, kernels_own(sk), sk_uid.val));
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
	if ((__s64)more < 0) /* two CPUs told the same ones: that many are not told again */
		more = 0;
	if (more > MOST_WEIGHT - base->weight)
		more = MOST_WEIGHT - base->weight;
	__sync_fetch_and_add(&share->told, more);
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
	__u64 most = share >= SHARES_OF_UNSOLICITED ? UNSOLICITED_PER_SECOND : dns_per_second;
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
	record->latency_ns = record->base.boot_ns > query->since_boot_ns ?
		record->base.boot_ns - query->since_boot_ns : 0;
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

/* Over UDP whoever sends is the current task. TCP sends when it can: its owner is the connection's. */
static __noinline void owner_of_query(struct owner *owner, struct bpf_sock *sk, __u32 transport)
{
	struct connection *kept, *found;

	if (transport == TRANSPORT_UDP) {
		own(owner);
		return;
	}
	kept = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	found = find_in_table(kernels_own(sk));
	if (found)
		*owner = found->owner;
	else if (kept)
		*owner = kept->owner;
	else
		*owner = nothing.owner;
}

/* Whether such a query is kept; then this is one more. */
static __always_inline bool sent_again(const struct dns_key *key)
{
	struct dns_query *query = bpf_map_lookup_elem(&dns_pending, key);

	if (!query)
		return false;
	__sync_fetch_and_add(&query->sent, 1);
	return true;
}

static __always_inline struct dns_query *make_query(const struct dns_key *key, __u32 index)
{
	struct dns_share *share = bpf_map_lookup_elem(&dns_shares, &index);
	struct dns_query *query;
	__u32 slot;

	if (!share || share->kept >= dns_queries / SHARE_OF_ALL ||
	    bpf_map_pop_elem(&dns_free, &slot)) {
		lose_query();
		return NULL;
	}
	if (bpf_map_update_elem(&dns_pending, key, &no_query, BPF_NOEXIST)) {
		if (bpf_map_push_elem(&dns_free, &slot, 0))
			count_fault(FAULT_NO_SLOT);
		if (!sent_again(key)) /* by another thread, just now */
			lose_query();
		return NULL;
	}
	query = bpf_map_lookup_elem(&dns_pending, key);
	if (!query) {
		count_fault(FAULT_NO_SLOT);
		return NULL;
	}
	__sync_fetch_and_add(&share->kept, 1);
	query->share = index;
	query->slot = slot;
	return query;
}

/* `kept`: the message, where it is not in this packet alone. */
static __noinline void keep_query(struct __sk_buff *skb, const struct dns_packet *packet,
				  const __u8 *kept, __u32 id, __u64 question)
{
	struct bpf_sock *sk = skb->sk;
	__u32 length = (question >> 32) + DNS_HEADER, last;
	struct dns_query *query;
	struct dns_slot *place;
	struct dns_key key;
	__u64 now;

	if (!sk)
		return;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return;
	make_key(&key, packet, bpf_get_socket_cookie(skb), id, question);
	if (sent_again(&key))
		return;
	query = make_query(&key, packet->share);
	if (!query)
		return;
	owner_of_query(&query->owner, sk, packet->transport);
	query->netns = netns_of(sk);
	query->local_port = packet->local_port;
	__builtin_memcpy(query->local_addr, packet->local_addr, 16);
	__sync_fetch_and_add(&query->sent, 1); /* another thread may have sent it again by now */
	if (!(question >> 32)) /* so that its mistake is seen */
		length = packet->length < DNS_QUERY_LEN ? packet->length : DNS_QUERY_LEN;
	last = last_of(length);
	if (last < DNS_QUERY_LEN &&
	    !(kept ? bpf_probe_read_kernel(query->beginning, last + 1, kept) :
		     bpf_skb_load_bytes(skb, packet->at, query->beginning, last + 1)))
		query->length = length;
	now = bpf_ktime_get_boot_ns();
	place = bpf_map_lookup_elem(&dns_slots, &query->slot);
	if (place) {
		place->key = key;
		place->since_boot_ns = now;
	}
	query->since_boot_ns = now; /* last: from here on a response takes it out, and frees the slot */
}

/* ---------------------------------------------------------------- responses */

/* What there is of a response. `kept` as above; `whole` is its length as sent. */
struct dns_response {
	const __u8 *kept;
	__u32 length;
	__u32 whole;
	__u16 id;
	__u8 partial;
	__u8 transfer; /* of a zone: more messages follow the first */
	__u32 pad;
};

static __noinline void emit_response(struct __sk_buff *skb, const struct dns_packet *packet,
				     const struct dns_response *response, __u64 question)
{
	struct dns_scratch *scratch = ONLY_ENTRY(dns_scratch);
	__u32 length = response->length, before, last, share;
	struct bpf_sock *sk = skb->sk;
	struct owner owner = {};
	struct dns_query *query;
	struct net_dns *record;
	struct dns_key key;

	if (!scratch || !sk)
		return;
	record = &scratch->record;
	start_base(&record->base);
	make_key(&key, packet, bpf_get_socket_cookie(skb), response->id, question);
	query = bpf_map_lookup_elem(&dns_pending, &key);
	if (!query && response->transfer)
		return;
	if (query && !query->since_boot_ns) /* not sent yet: whoever answers has guessed it */
		query = NULL;
	if (query) {
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
		share = share_of_unsolicited(sk);
		record->state = DNS_UNSOLICITED;
		record->latency_ns = 0;
		record->netns = netns_of(sk);
		record->local_port = packet->local_port;
		__builtin_memcpy(record->local_addr, packet->local_addr, 16);
	}
	record->message_bytes = response->whole;
	if (!admits_dns(record, &owner, share))
		return;
	if (response->partial || response->whole > length)
		record->base.cut = 1;
	before = *(__u16 *)record->data & 511;
	if (length > DNS_MESSAGE_LEN) {
		length = DNS_MESSAGE_LEN;
		record->base.cut = 1;
	}
	last = last_of(length);
	if (last < DNS_MESSAGE_LEN &&
	    (response->kept ?
		     bpf_probe_read_kernel(record->data + 2 + before, last + 1, response->kept) :
		     bpf_skb_load_bytes(skb, packet->at, record->data + 2 + before, last + 1))) {
		length = 0;
		record->base.flags |= FLAG_INCOMPLETE;
	}
	length = (length + before + 2) & 8191;
	record->message_len = length;
	length += offsetof(struct net_dns, data);
	if (length <= sizeof(*scratch))
		output(skb, &bulk, &record->base, KIND_NET_DNS, RING_BULK, length);
}

/* ---------------------------------------------------------------- TCP */

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_RST 0x04
#define MOST_PIECES 32 /* of a packet: each message is two, its length and the rest */
#define TYPE_IXFR 251
#define TYPE_AXFR 252

static __always_inline __u32 number_of(const __u8 *bytes)
{
	return bytes[0] << 8 | bytes[1];
}

static __always_inline bool asks_for_zone(const __u8 *message, __u64 question)
{
	__u32 size = question >> 32, type;

	if (size < 5)
		return false;
	type = number_of(message + ((DNS_HEADER + size - 4) & (SENT_BYTES - 1)));
	return type == TYPE_AXFR || type == TYPE_IXFR;
}

static __always_inline void query_complete(struct __sk_buff *skb, struct dns_connection *connection)
{
	__u64 question;

	if (connection->sent.filled < DNS_HEADER || connection->sent_bytes[2] & DNS_RESPONSE) {
		count_fault(FAULT_DNS_MALFORMED);
		return;
	}
	question = question_of_kept(skb, 1);
	if (asks_for_zone(connection->sent_bytes, question)) {
		connection->transfer_id = number_of(connection->sent_bytes);
		connection->transfers = 1;
	}
	connection->ends.length = connection->sent.filled;
	keep_query(skb, &connection->ends, connection->sent_bytes, number_of(connection->sent_bytes),
		   question);
}

static __always_inline void response_complete(struct __sk_buff *skb, struct dns_connection *connection)
{
	struct dns_response response = {};

	if (connection->received.filled < DNS_HEADER ||
	    !(connection->received_bytes[2] & DNS_RESPONSE)) {
		count_fault(FAULT_DNS_MALFORMED);
		return;
	}
	response.kept = connection->received_bytes;
	response.length = connection->received.filled;
	response.whole = connection->received.length;
	response.id = number_of(connection->received_bytes);
	response.partial = connection->received.partial;
	response.transfer = connection->transfers && response.id == connection->transfer_id;
	emit_response(skb, &connection->ends, &response, question_of_kept(skb, 0));
}

enum follow {
	FOLLOW_END,
	FOLLOW_MORE,
	FOLLOW_MESSAGE, /* one is complete */
};

__noinline int message_complete(struct __sk_buff *skb, __u32 sent)
{
	struct dns_connection *connection = connection_of(skb);

	if (!connection)
		return 0;
	if (sent)
		query_complete(skb, connection);
	else
		response_complete(skb, connection);
	return 0;
}

/* The length of the next message, or what there is of it. How many bytes it was. */
static __always_inline __u32 take_length(struct __sk_buff *skb, struct dns_stream *stream, __u32 at,
					 __u32 length)
{
	__u8 bytes[2];
	__u32 taken = 1;

	if (stream->half) {
		if (bpf_skb_load_bytes(skb, at, &bytes[1], 1))
			return 0;
		bytes[0] = stream->first;
		stream->half = 0;
	} else if (length == 1) {
		if (bpf_skb_load_bytes(skb, at, &stream->first, 1))
			return 0;
		stream->half = 1;
		return 1;
	} else {
		if (bpf_skb_load_bytes(skb, at, bytes, 2))
			return 0;
		taken = 2;
	}
	stream->length = number_of(bytes);
	if (!stream->length)
		count_fault(FAULT_DNS_MALFORMED);
	stream->left = stream->length;
	stream->filled = 0;
	stream->partial = 0;
	return taken;
}

/* Keeps what is the message's, as far as there is room, `most` at once. How many bytes were kept. */
static __always_inline __u32 keep_bytes(struct __sk_buff *skb, struct dns_stream *stream, __u8 *to,
					__u32 room, __u32 most, __u32 at, __u32 length)
{
	__u32 filled = stream->filled, last;

	if (stream->partial || filled >= room)
		return 0;
	if (length > room - filled)
		length = room - filled;
	if (length > most)
		length = most;
	barrier_var(filled);
	last = last_of(length);
	if (filled >= room || last >= most)
		return 0;
	if (bpf_skb_load_bytes(skb, at, to + filled, last + 1)) {
		stream->partial = 1;
		return 0;
	}
	stream->filled = filled + length;
	return length;
}

/* Keeps a response's, in two goes. */
static __always_inline void keep_response(struct __sk_buff *skb, struct dns_connection *connection,
					  __u32 at, __u32 length)
{
	struct dns_stream *stream = &connection->received;
	__u8 *to = connection->received_bytes;
	__u32 kept;

	_Static_assert(2 * KEPT_AT_ONCE >= DNS_MESSAGE_LEN, "two goes are enough");
	kept = keep_bytes(skb, stream, to, DNS_MESSAGE_LEN, KEPT_AT_ONCE, at, length);
	if (kept && kept < length)
		keep_bytes(skb, stream, to, DNS_MESSAGE_LEN, KEPT_AT_ONCE, at + kept, length - kept);
}

static __always_inline void lose_stream(struct __sk_buff *skb, struct dns_stream *stream)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u8 one = 1;

	if (stream->state == STREAM_LOST)
		return;
	stream->state = STREAM_LOST;
	count_fault(FAULT_DNS_UNFOLLOWED);
	if (bpf_map_update_elem(&dns_unfollowed, &cookie, &one, BPF_ANY))
		count_fault(FAULT_NO_SLOT);
}

/* Bytes that have come before are left out. Where some are missing, the message goes on without them,
 * unless it is not known where the next one begins. What comes behind an end says that TCP did not take
 * that end. An enum follow, as of the next. */
__noinline int find_start(struct __sk_buff *skb, __u32 sent)
{
	struct dns_connection *connection = connection_of(skb);
	struct dns_stream *stream;
	__u32 missing, known;

	if (!connection)
		return FOLLOW_END;
	stream = sent ? &connection->sent : &connection->received;
	if (stream->state == STREAM_ENDED && (int)(stream->end - stream->next) <= 0)
		stream->brings = 0;
	if (!stream->brings)
		return FOLLOW_END;
	missing = stream->seq - stream->next;
	if (stream->state != STREAM_FOLLOWED || ((int)missing > 0 && missing > stream->left)) {
		lose_stream(skb, stream);
		return FOLLOW_END;
	}
	if ((int)missing > 0) {
		stream->partial = 1;
		stream->next = stream->seq;
		stream->left -= missing;
		return stream->left ? FOLLOW_MORE : FOLLOW_MESSAGE;
	}
	known = stream->next - stream->seq;
	if (known >= stream->brings) {
		stream->brings = 0;
		return FOLLOW_END;
	}
	stream->at += known;
	stream->brings -= known;
	return FOLLOW_MORE;
}

/* One piece of what a packet brings: a length, or of a message what there is. */
__noinline int take_piece(struct __sk_buff *skb, __u32 sent)
{
	struct dns_connection *connection = connection_of(skb);
	struct dns_stream *stream;
	__u32 taken;
	bool whole;

	if (!connection)
		return FOLLOW_END;
	stream = sent ? &connection->sent : &connection->received;
	if (!stream->brings)
		return FOLLOW_END;
	whole = stream->left && stream->left <= stream->brings;
	if (!stream->left) {
		taken = take_length(skb, stream, stream->at, stream->brings);
	} else {
		taken = whole ? stream->left : stream->brings;
		if (sent)
			keep_bytes(skb, stream, connection->sent_bytes, SENT_BYTES, SENT_BYTES,
				   stream->at, taken);
		else
			keep_response(skb, connection, stream->at, taken);
		stream->left -= taken;
	}
	stream->next += taken;
	stream->at += taken;
	stream->brings -= taken;
	if (whole)
		return FOLLOW_MESSAGE;
	return taken ? FOLLOW_MORE : FOLLOW_END;
}

/* What a packet brings, after its last piece: with more messages than are looked at, the next one is not
 * to be found. A message that the end of its connection cuts off is told of nowhere, and counted once,
 * however often that end comes. TCP looks at numbers only behind this hook: what has another number than
 * is expected, as an old packet or a forged one, is no end. */
__noinline int find_end(struct __sk_buff *skb, __u32 sent)
{
	struct dns_connection *connection = connection_of(skb);
	struct dns_stream *stream;

	if (!connection)
		return 0;
	stream = sent ? &connection->sent : &connection->received;
	if (stream->brings)
		lose_stream(skb, stream);
	if (!stream->ends || stream->state != STREAM_FOLLOWED || stream->end != stream->next)
		return 0;
	stream->state = STREAM_ENDED;
	if (stream->left || stream->half)
		count_fault(FAULT_DNS_MALFORMED);
	return 0;
}

static __always_inline void follow_packet(struct __sk_buff *skb, const bool sent)
{
	int found = find_start(skb, sent), i;

	for (i = 0; i < MOST_PIECES; i++) {
		if (found == FOLLOW_END)
			break;
		if (found == FOLLOW_MESSAGE)
			message_complete(skb, sent);
		found = take_piece(skb, sent);
	}
	if (found == FOLLOW_MESSAGE)
		message_complete(skb, sent);
	find_end(skb, sent);
}

static __always_inline void begin_stream(struct dns_stream *stream, __u32 seq)
{
	__builtin_memset(stream, 0, sizeof(*stream));
	stream->next = seq + 1;
	stream->state = STREAM_FOLLOWED;
}

/* A SYN begins both the connection and what is kept of it; what it has with it (Fast Open) comes behind.
 * Whether there is anything to follow. Not inlined, as is its neighbour below: their packets need the
 * stack that what follows needs. */
static __noinline bool begin_packet(struct __sk_buff *skb, struct bpf_sock *sk, __u32 transport,
				    __u32 sent)
{
	struct dns_connection *connection;
	struct dns_stream *stream;
	struct dns_packet packet;
	bool begins, ends;

	if (!read_packet(&packet, skb, transport, sent)) {
		count_fault(FAULT_DNS_MALFORMED);
		return false;
	}
	begins = packet.flags & TCP_FLAG_SYN;
	ends = packet.flags & (TCP_FLAG_FIN | TCP_FLAG_RST);
	if (!begins && !ends && !packet.length)
		return false;
	read_peer(&packet, sk);
	connection = bpf_sk_storage_get(&dns_connections, sk, NULL,
					begins || packet.length ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!connection) {
		if (begins || packet.length)
			count_fault(FAULT_SOCKET_STORAGE);
		return false;
	}
	stream = sent ? &connection->sent : &connection->received;
	if (begins) {
		packet.share = sent && !stream->state ? share_of_opener(sk) :
							connection->ends.share;
		connection->ends = packet;
		begin_stream(stream, packet.seq);
	}
	stream->at = packet.at;
	stream->brings = packet.length;
	stream->seq = packet.seq + begins;
	stream->end = stream->seq + packet.length;
	stream->ends = ends;
	return packet.length || ends;
}

/* ---------------------------------------------------------------- UDP */

static __noinline void over_udp(struct __sk_buff *skb, struct bpf_sock *sk, __u32 transport,
				__u32 sent)
{
	struct dns_response response = {};
	struct dns_packet packet;
	__u64 question;
	__u8 header[4];

	if (!read_packet(&packet, skb, transport, sent) || packet.length < DNS_HEADER ||
	    bpf_skb_load_bytes(skb, packet.at, header, sizeof(header)) ||
	    !(header[2] & DNS_RESPONSE) != !!sent) {
		count_fault(FAULT_DNS_MALFORMED);
		return;
	}
	question = question_of(skb, packet.at, packet.length);
	if (sent) {
		read_peer(&packet, sk);
		packet.share = own_share();
		keep_query(skb, &packet, NULL, number_of(header), question);
		return;
	}
	response.id = number_of(header);
	response.length = packet.length;
	response.whole = packet.length;
	emit_response(skb, &packet, &response, question);
}

/* ---------------------------------------------------------------- packets that matter */

static __always_inline int handle(struct __sk_buff *skb, __u32 transport, const bool sent)
{
	struct bpf_sock *sk;

	if (!enabled(KIND_NET_DNS))
		return 0;
	sk = skb->sk;
	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 0;
	if (transport >> 16 == NEXT_UDP)
		over_udp(skb, sk, transport, sent);
	else if (begin_packet(skb, sk, transport, sent))
		follow_packet(skb, sent);
	return 0;
}

#define PASS 1

#define OF_DNS EMITS("net.dns") NEEDS("cgroup")

SEC("cgroup_skb/egress") OF_DNS
int on_dns_egress(struct __sk_buff *skb)
{
	__u32 transport, ports;
	bool connected;

	if (speaks_of_else(skb->sk, &connected) && !sends_to_anybody(skb->sk))
		return PASS;
	ports = ports_of(skb, &transport);
	if (ports && (connected || is_dns_port(ports & 0xffff)))
		(void)UNPREEMPTED(handle(skb, transport, true));
	return PASS;
}

SEC("cgroup_skb/ingress") OF_DNS
int on_dns_ingress(struct __sk_buff *skb)
{
	__u32 transport, ports;
	bool connected;

	if (speaks_of_else(skb->sk, &connected))
		return PASS;
	ports = ports_of(skb, &transport);
	if (ports && (connected || is_dns_port(ports >> 16)))
		(void)UNPREEMPTED(handle(skb, transport, false));
	return PASS;
}

/* ---------------------------------------------------------------- no response */

/* Puts the next slot among the free ones. 1: it did; 0: there is no other. */
__noinline int make_slot(void)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	__u32 slot;

	if (!progress)
		return 0;
	slot = progress->made;
	if (slot >= dns_queries || bpf_map_push_elem(&dns_free, &slot, 0))
		return 0;
	progress->made = slot + 1;
	return 1;
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
	if (key.transport == TRANSPORT_TCP && bpf_map_lookup_elem(&dns_unfollowed, &key.cookie))
		record->state = DNS_UNFOLLOWED;
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

/* Reports the next one that is old. 0: there is no other. */
__noinline int tell_next(struct bpf_raw_tracepoint_args *ctx)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	struct dns_scratch *scratch = ONLY_ENTRY(dns_old_scratch);
	__u32 last;
	int size;

	if (!progress || !scratch)
		return 0;
	size = next_old();
	last = last_of(size);
	if (last < sizeof(*scratch))
		(void)UNPREEMPTED(output(ctx, &bulk, &scratch->record.base, KIND_NET_DNS, RING_BULK,
					 last + 1));
	return size >= 0 || progress->looked < progress->end;
}

/* Never attached: the agent runs it before the others are attached, and then every second. */
SEC("raw_tp/streamer_every_second") EMITS("net.dns") NEEDS("cgroup")
DOC("queries without a response")
int every_second(struct bpf_raw_tracepoint_args *ctx)
{
	struct dns_progress *progress = ONLY_ENTRY(dns_progress);
	int i;

	if (!progress)
		return 0;
	if (!progress->seed)
		progress->seed = bpf_get_prandom_u32() | 1;
	/* What a loop does is a function that is verified by itself: 5.10 takes a loop with more than one
	 * end of its body for an endless one, and no kernel follows so many turns of more than this. */
	if (progress->made < dns_queries) {
		for (i = 0; i < SLOTS_MADE_PER_RUN; i++)
			if (!make_slot())
				break;
	}
	if (progress->looked >= progress->made)
		progress->looked = 0;
	progress->end = progress->made;
	for (i = 0; i < MOST_TOLD_PER_RUN; i++)
		if (!tell_next(ctx))
			break;
	return 0;
}
