/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Who may have how much of a ring that fills up: a flood by one is to cost nobody else an event.
 *
 * As long as a ring is nearly empty nothing is asked, and nobody is kept back. From an eighth on each
 * that does something has a bucket, by whoever pays for it (struct payer_key): what he has in the ring
 * may be SHARE times what is free at most. So one alone gets four fifths of it, two get four ninths
 * each, and whoever comes next always finds something. It is the reader that refills the bucket, by
 * taking records out of the ring: no rate has to be guessed for a sink that nobody knows. See
 * docs/adr/0021-who-pays-for-a-flood.md.
 *
 * With perf buffers no program can see how full they are: there all this is left out.
 */
#ifndef STREAMER_FAIR_H
#define STREAMER_FAIR_H

/* How much of what is free. */
#define SHARE 4
/* What is left of a ring at the last, as a part of it, is for records of no more than SMALL bytes. */
#define LAST_PART 16
#define SMALL 1024
/* And the last of that for those whom nobody can be more of: no users with ids over MOST_UID, of which
 * somebody who has subordinate ids (/etc/subuid) can be 65,536 at once. */
#define LAST_OF_ALL 32
#define MOST_UID 65535
#define LOOK_EVERY 8

MAPPED_ARRAY(pressure, 1, struct pressure);

/* What is known of who pays. Of those that did nothing for longest one makes way when it is full. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048); /* for each ring buffer for bulk */
	__type(key, struct payer_key);
	__type(value, struct payer);
} payers SEC(".maps") SHARED SIZED("bulk_rings");

static const struct payer new_payer;

/* Which counter of a payer's such an event has; none (PAID_END) where what runs is not who does it. */
static __always_inline __u32 paid_as(enum event_kind kind)
{
	switch (kind) {
	case KIND_PROCESS_EXEC:
		return PAID_PROCESS_EXEC;
	case KIND_PROCESS_FORK:
		return PAID_PROCESS_FORK;
	case KIND_PROCESS_EXIT:
		return PAID_PROCESS_EXIT;
	case KIND_FILE_OPEN:
		return PAID_FILE_OPEN;
	case KIND_NET_ACCEPT:
		return PAID_NET_ACCEPT;
	case KIND_NET_LISTEN:
		return PAID_NET_LISTEN;
	case KIND_NET_BIND:
		return PAID_NET_BIND;
	case KIND_SYSCALL_SLOW:
		return PAID_SYSCALL_SLOW;
	default:
		return PAID_END;
	}
}

/* ---------------------------------------------------------------- who pays */

#define MOST_USER_NAMESPACES 33 /* within one another: the kernel makes no more */
#define MOST_CGROUPS_UP 32

/* Who made the outermost user namespace that this one is in: all within it is his doing, whatever
 * users and namespaces he makes up there. 0 of the initial one. */
static __always_inline __u32 maker_of(struct user_namespace *ns)
{
	int i;

	for (i = 0; i < MOST_USER_NAMESPACES; i++) {
		if (READ(struct user_namespace, ns, level) <= 1)
			break;
		ns = READ(struct user_namespace, ns, parent);
	}
	return READ(struct user_namespace, ns, owner.val);
}

/* The outermost pid namespace that it is in but the initial one; NULL if it is in that. */
static __always_inline struct pid_namespace *outer_pidns(struct task_struct *task)
{
	struct pid *pid = READ(struct task_struct, task, thread_pid);
	struct pid_namespace *ns = NULL;

	if (!pid || !READ(struct pid, pid, level))
		return NULL;
	if (bpf_probe_read_kernel(&ns, sizeof(ns),
				  (void *)pid + bpf_core_field_offset(struct pid, numbers) +
					  bpf_core_type_size(struct upid) +
					  bpf_core_field_offset(struct upid, ns)))
		count_fault(FAULT_UNREADABLE);
	return ns;
}

static __always_inline bool is_delegated(struct cgroup *cgroup)
{
	struct kernfs_iattrs *attributes;

	if (!bpf_core_field_exists(struct kernfs_iattrs, ia_uid)) /* nobody knows */
		return false;
	attributes = READ(struct cgroup, cgroup, kn, iattr);
	return attributes && READ(struct kernfs_iattrs, attributes, ia_uid.val);
}

/*
 * A cgroup that is not its user's to make: the outermost that root has given away stands for all that
 * may be made in it. Those so deep that they cannot be followed up to the root pay together (0).
 * False: it is the root itself, which says nothing.
 */
static __always_inline bool paying_cgroup(struct payer_key *key, struct task_struct *task)
{
	struct cgroup *cgroup = READ(struct task_struct, task, cgroups, dfl_cgrp);
	struct cgroup_subsys_state *above;
	int i;

	key->kind = PAYER_CGROUP;
	key->id = READ(struct cgroup, cgroup, kn, id);
	for (i = 0; i < MOST_CGROUPS_UP; i++) {
		above = READ(struct cgroup, cgroup, self.parent);
		if (!above)
			return i;
		if (is_delegated(cgroup))
			key->id = READ(struct cgroup, cgroup, kn, id);
		cgroup = READ(struct cgroup_subsys_state, above, cgroup);
	}
	key->id = 0;
	return true;
}

/*
 * Who pays for what the current task does. In a container that root has made: its cgroup, whoever its
 * users are; without one, its pid namespace. Else the user: his real user id, or who made the user
 * namespace that he is in. Not who he logged in as: whoever has not logged in, as a service, may
 * write anybody into /proc/self/loginuid. Root, outside of a user namespace, by cgroup: so each
 * service by itself.
 */
static __always_inline void find_payer(struct payer_key *key)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct user_namespace *ns = READ(struct task_struct, task, cred, user_ns);
	struct pid_namespace *pidns = outer_pidns(task);
	bool contained = pidns && !maker_of(READ(struct pid_namespace, pidns, user_ns));
	__u32 user = READ(struct task_struct, task, cred, uid.val);

	if (READ(struct user_namespace, ns, level))
		user = maker_of(ns);
	key->bulk = 0;
	if (!contained && user) {
		key->kind = PAYER_USER;
		key->id = user;
	} else if (!paying_cgroup(key, task) && contained) {
		key->kind = PAYER_CONTAINER;
		key->id = READ(struct pid_namespace, pidns, ns.inum);
	}
}

/* NULL: there is no room to keep it. Then it is let through as long as there is room in the ring. */
static __always_inline struct payer *payer_of(const struct payer_key *key)
{
	struct payer *found = bpf_map_lookup_elem(&payers, key);

	if (found)
		return found;
	bpf_map_update_elem(&payers, key, &new_payer, BPF_NOEXIST); /* or another CPU did just now */
	found = bpf_map_lookup_elem(&payers, key);
	if (!found)
		count_fault(FAULT_PAYERS_FULL);
	return found;
}

/* ---------------------------------------------------------------- how much */

/* A ring, at a moment. Its spans are numbered on and on, as its positions are. */
struct fill {
	__u64 size;
	__u64 free;
	__u64 oldest; /* number of the span that has the oldest record */
	__u64 newest;
};

static __always_inline void look_at(struct fill *fill, void *ring)
{
	__u64 read = bpf_ringbuf_query(ring, BPF_RB_CONS_POS);
	__u64 written = bpf_ringbuf_query(ring, BPF_RB_PROD_POS);
	__u64 span;

	fill->size = bpf_ringbuf_query(ring, BPF_RB_RING_SIZE);
	/* What was read meanwhile may let it seem more than there is room for. */
	fill->free = written - read < fill->size ? fill->size - (written - read) : 0;
	span = fill->size / SPANS;
	fill->oldest = read / span;
	fill->newest = written / span;
}

/* Bytes that he has in the ring: what he wrote in those of its spans that are not read yet. The upper
 * half of each word says which span it is of. */
static __always_inline __u64 held_by(const struct payer *payer, enum event_ring ring,
				     const struct fill *fill)
{
	__u64 sum = 0, word;
	int i;

	for (i = 0; i < PAYER_SPANS; i++) {
		word = payer->spans[ring * PAYER_SPANS + i];
		if ((__u32)((word >> 32) - fill->oldest) <= SPANS)
			sum += (__u32)word;
	}
	return sum;
}

/* Two CPUs that begin a span at once can lose what the other one adds: an estimate gets worse by that,
 * and no count. */
static __always_inline void charge(struct payer *payer, enum event_ring ring,
				   const struct fill *fill, __u32 size)
{
	__u64 *word = &payer->spans[ring * PAYER_SPANS + (fill->newest & (PAYER_SPANS - 1))];

	if (*word >> 32 != (__u32)fill->newest)
		*word = fill->newest << 32;
	__sync_fetch_and_add(word, size);
}

/* Whether he has so much in the ring of what matters that his bulk has to stand back. */
static __always_inline bool bulk_stands_back(struct payer_key *key)
{
	struct payer *payer;
	struct fill fill;

	key->bulk = 0; /* where that is kept */
	payer = bpf_map_lookup_elem(&payers, key);
	look_at(&fill, &critical);
	return payer && 2 * held_by(payer, RING_CRITICAL, &fill) > SHARE * fill.free;
}

/* Whether what is left of a ring is not for such a record of his, whatever he has in it. */
static __always_inline bool is_last_part(const struct fill *fill, const struct payer_key *key,
					 __u32 size)
{
	if (key->kind == PAYER_USER && key->id > MOST_UID &&
	    fill->free < fill->size / LAST_OF_ALL + size)
		return true;
	return size > SMALL && fill->free < fill->size / LAST_PART + size;
}

static __always_inline bool is_refused(const struct pressure *now, const struct payer *payer,
				       struct payer_key *key, enum event_ring ring,
				       const struct fill *fill, __u32 size)
{
	if (held_by(payer, ring, fill) + size > SHARE * fill->free)
		return true;
	return ring == RING_BULK && now->pressed[RING_CRITICAL] && bulk_stands_back(key);
}

/* Whether there is room for the current task's record in a ring that fills up. Not static, as others
 * here: so it is verified once in each program, and not wherever it is called, in whatever state. */
__noinline int has_share(__u32 ring, __u32 size, __u32 paid)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct pressure *now = ONLY_ENTRY(pressure);
	struct payer_key key;
	struct payer *payer;
	struct fill fill;
	bool refused;
	void *buffer;

	if (perf_buffers || !now)
		return true;
	if (ring == RING_CRITICAL) {
		look_at(&fill, &critical);
	} else {
		buffer = buffer_of(&bulk, RING_BULK, cpu);
		if (!buffer)
			return false;
		look_at(&fill, buffer);
	}
	find_payer(&key);
	if (ring != RING_CRITICAL)
		key.bulk = bulk_number(RING_BULK, cpu);
	payer = payer_of(&key);
	refused = is_last_part(&fill, &key, size);
	if (!refused && payer)
		refused = ring == RING_CRITICAL ?
				  is_refused(now, payer, &key, RING_CRITICAL, &fill, size) :
				  is_refused(now, payer, &key, RING_BULK, &fill, size);
	if (refused) {
		if (paid < PAID_END) {
			if (payer)
				count(&payer->refused[paid]);
			count(&now->refused[paid]);
		}
		return false;
	}
	if (payer && ring == RING_CRITICAL)
		charge(payer, RING_CRITICAL, &fill, size);
	else if (payer)
		charge(payer, RING_BULK, &fill, size);
	return true;
}

/*
 * Whether a numbered event of this kind, of which the record has `size` bytes, may have room in its
 * ring. To look how full one is costs 9 ns: for bulk one in LOOK_EVERY of each CPU does it for all.
 */
static __always_inline bool affords(void *buffer, const struct event_base *base,
				    enum event_ring ring, enum event_kind kind, __u32 size)
{
	__u32 paid = paid_as(kind), number = ring + bulk_number(ring, base->cpu);
	struct pressure *now;
	bool pressed;

	if (perf_buffers || paid == PAID_END)
		return true;
	now = ONLY_ENTRY(pressure);
	if (!now || !buffer)
		return true; /* where there is no buffer it is lost */
	if (ring == RING_CRITICAL || base->seq % LOOK_EVERY == 0) {
		pressed = bpf_ringbuf_query(buffer, BPF_RB_AVAIL_DATA) >= now->from[ring];
		if (now->pressed[number] != pressed)
			now->pressed[number] = pressed;
	}
	if (!now->pressed[number] && (ring == RING_CRITICAL || !now->pressed[RING_CRITICAL]))
		return true;
	return has_share(ring, size, paid);
}

/* How many bytes of arguments an exec may have: all, unless the ring fills up, and the fewer, the
 * less is left of it, or of what who pays may have. */
__noinline int most_of_argv(void)
{
	struct pressure *now = ONLY_ENTRY(pressure);
	struct payer_key key;
	struct payer *payer;
	struct fill fill;
	__u64 left, held;

	if (perf_buffers || !now ||
	    bpf_ringbuf_query(&critical, BPF_RB_AVAIL_DATA) < now->from[RING_CRITICAL])
		return ARGV_LEN;
	look_at(&fill, &critical);
	left = fill.free;
	find_payer(&key);
	payer = payer_of(&key);
	if (payer) {
		held = held_by(payer, RING_CRITICAL, &fill);
		left = held < SHARE * fill.free ? SHARE * fill.free - held : 0;
		if (left > fill.free)
			left = fill.free;
	}
	if (left >= fill.size / 2)
		return ARGV_LEN;
	if (left >= fill.size / 4)
		return ARGV_LEN / 4;
	return left >= fill.size / 8 ? ARGV_LEN / 16 : ARGV_LEN / 128;
}

#endif
