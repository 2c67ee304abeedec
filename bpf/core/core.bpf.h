/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Rings, sequence, counters, settings: everything an event passes between its hook and its ring.
 *
 * The maps here are SHARED: core.bpf.c makes them, and the loader gives them to every sensor.
 */
#ifndef STREAMER_CORE_H
#define STREAMER_CORE_H

#include "kernel.bpf.h"
#include "settings.h"
#include "tables.h"
#include "tags.h"

/*
 * Events travel in ring buffers, of sizes that the loader sets. Where those are refused, it makes these
 * two maps arrays of perf events instead, of which each CPU has two for each ring: see perf_output().
 * Which it is is a constant to the verifier: what only the other one has is never looked at.
 */
OPTION(perf_buffers);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} critical SEC(".maps") SHARED;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} bulk SEC(".maps") SHARED;

/*
 * CPUs that write to one ring buffer wait for each other. With many, there are several for what is
 * bulk: CPU n has number (n >> bulk_shift) % bulk_rings, a power of two. Each CPU keeps to its own, so
 * that what it does stays in order. bulk_rings is 0 where there is `bulk` alone.
 */
OPTION(bulk_rings);
OPTION(bulk_shift);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MOST_BULK_RINGS);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_RINGBUF);
		__uint(max_entries, 4096);
	});
} bulk_of_cpus SEC(".maps") SHARED NEEDS("option:bulk_rings");

/* Mapped by the agent, so that reading and changing them costs no system call and needs no
 * capability. What is kept by CPU is in arrays by CPU: per-CPU arrays cannot be mapped. */
#define MAPPED_ARRAY(name, entries, value_type)        \
	struct {                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);      \
		__uint(map_flags, BPF_F_MMAPABLE);     \
		__uint(max_entries, entries);          \
		__type(key, __u32);                    \
		__type(value, value_type);             \
	} name SEC(".maps") SHARED

MAPPED_ARRAY(settings, 1, struct settings);
MAPPED_ARRAY(kind_settings, KIND_END, struct kind_settings);
MAPPED_ARRAY(counters, 1, struct cpu_counters) SIZED("cpus");
MAPPED_ARRAY(kind_counters, KIND_END, struct kind_counters) SIZED("cpus,kinds");
MAPPED_ARRAY(faults, FAULT_END, __u64);
MAPPED_ARRAY(reader, 1, struct reader_state);
MAPPED_ARRAY(identities, 1, struct identity);

/* Where records of fixed size are built that go into a perf buffer. */
#define PERF_SLOT_BYTES 504

struct perf_slot {
	__u64 users; /* 1: taken; more: others are looking at it */
	__u8 record[PERF_SLOT_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct perf_slot);
} perf_slots SEC(".maps") SHARED SIZED("cpus,slots") NEEDS("option:perf_buffers");

/* The interfaces that programs attach to: where the entries of each begin, by CPU, in tables that
 * are kept by interface. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_INTERFACES);
	__type(key, __u32); /* index */
	__type(value, __u32);
} interfaces SEC(".maps") SHARED;

/* A constant index lets the verifier see that the entry is there. */
#define ONLY_ENTRY(map)                            \
	({                                         \
		__u32 __zero = 0;                  \
		bpf_map_lookup_elem(&map, &__zero); \
	})

/* Adds without losing what an interrupting program adds on the same CPU. */
static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

static __always_inline void count_fault(enum fault fault)
{
	__u32 index = fault;
	__u64 *counter = bpf_map_lookup_elem(&faults, &index);

	if (counter)
		count(counter);
}

static __always_inline struct cpu_counters *my_counters(__u32 cpu)
{
	return bpf_map_lookup_elem(&counters, &cpu);
}

static __always_inline struct kind_counters *my_kind(__u32 cpu, enum event_kind kind)
{
	__u32 index = cpu * KIND_END + kind;
	struct kind_counters *mine = bpf_map_lookup_elem(&kind_counters, &index);

	if (!mine)
		count_fault(FAULT_NO_SLOT);
	return mine;
}

static __always_inline struct kind_settings *settings_of(enum event_kind kind)
{
	__u32 index = kind;

	return bpf_map_lookup_elem(&kind_settings, &index);
}

static __always_inline bool enabled(enum event_kind kind)
{
	struct kind_settings *mine = settings_of(kind);

	return mine && mine->enabled;
}

/* Not static, so that its loop is verified once in each program. */
__noinline int is_further_worker(__u32 pid)
{
	struct identity *identity = ONLY_ENTRY(identities);
	__u32 i;

	for (i = 0; identity && i < MOST_FURTHER_WORKERS && i < identity->further_workers; i++) {
		if (pid == identity->worker_pids[i])
			return true;
	}
	return false;
}

static __always_inline bool is_agent(__u32 pid)
{
	struct identity *identity = ONLY_ENTRY(identities);

	if (!identity)
		return false;
	return pid == identity->agent_pids[0] || pid == identity->agent_pids[1] ||
	       (identity->further_workers && is_further_worker(pid));
}

static __always_inline bool is_initial_mntns(__u32 mntns)
{
	struct identity *identity = ONLY_ENTRY(identities);

	return identity && mntns && mntns == identity->initial_mntns;
}

static __always_inline void count_filtered(enum event_kind kind)
{
	struct kind_counters *mine = my_kind(bpf_get_smp_processor_id(), kind);

	if (mine) {
		count(&mine->produced);
		count(&mine->filtered);
	}
}

/* Which of the ring buffers for bulk a CPU writes to; 0 for another ring. */
static __always_inline __u32 bulk_number(enum event_ring ring, __u32 cpu)
{
	if (ring != RING_BULK || !bulk_rings)
		return 0;
	return cpu >> bulk_shift & (bulk_rings - 1) & (MOST_BULK_RINGS - 1);
}

/* The ring buffer that a CPU writes to, where the ring as a whole is `map`. NULL: there is none. */
static __always_inline void *buffer_of(void *map, enum event_ring ring, __u32 cpu)
{
	__u32 number = bulk_number(ring, cpu);

	if (ring != RING_BULK || !bulk_rings)
		return map;
	return bpf_map_lookup_elem(&bulk_of_cpus, &number);
}

#include "fair.bpf.h"

/* An event that is not reported by itself, to keep the rate down. */
static __always_inline void count_shed(enum event_kind kind)
{
	struct kind_counters *mine = my_kind(bpf_get_smp_processor_id(), kind);

	if (mine) {
		count(&mine->produced);
		count(&mine->shed);
	}
}

/* One in how many events of a kind is reported now. It is read once for each: that is its weight. */
static __always_inline __u32 rate_of(enum event_kind kind)
{
	struct kind_settings *wanted = settings_of(kind);
	struct pressure *now = ONLY_ENTRY(pressure);

	return wanted && now ? wanted->rates[now->level & (PRESSURE_LEVELS - 1)] : 1;
}

/* Whether what has drawn `draw`, any u32, is taken at a rate. What is taken at one is also taken at
 * each that is less. */
static __always_inline bool is_drawn(__u32 draw, __u32 rate)
{
	return (__u64)draw * rate >> 32 == 0;
}

/* Whether sampling takes this event; its weight then. Another one is counted, and 0. */
static __always_inline __u32 sample(enum event_kind kind)
{
	__u32 rate = rate_of(kind);

	if (rate <= 1)
		return 1;
	if (is_drawn(bpf_get_prandom_u32(), rate))
		return rate;
	count_shed(kind);
	return 0;
}

#define SEQ_ATTEMPTS 8

/*
 * The next sequence number, unique on this CPU whatever interrupts or preempts the program.
 *
 * An atomic add that returns the old value needs 5.12 and does not load on 5.10, not even where it
 * is never reached. So: read, add atomically, read again. The number is ours if exactly our add
 * happened in between; two programs cannot both see that of the same number. Otherwise a number is
 * given up, which the base reports in `skipped`, so that its absence is not taken for a loss.
 */
static __always_inline __u64 take_seq(struct cpu_counters *mine, enum event_ring ring,
				      __u8 *skipped)
{
	volatile __u64 *seq = &mine->seq[ring];
	__u64 before;
	int attempt;

#pragma unroll
	for (attempt = 0; attempt < SEQ_ATTEMPTS; attempt++) {
		before = *seq;
		__sync_fetch_and_add((__u64 *)seq, 1);
		if (*seq == before + 1)
			return before + 1;
		if (attempt + 1 == SEQ_ATTEMPTS)
			break; /* this number stands for the event, which is lost */
		count(&mine->skipped[ring]);
		(*skipped)++;
	}
	return 0;
}

/*
 * Completes the base of an admitted event: counts it and numbers it. From here on the event is
 * either submitted or reported lost by the gap that its number leaves.
 */
static __always_inline struct kind_counters *number(struct event_base *base, enum event_kind kind,
						    enum event_ring ring, __u32 size)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct cpu_counters *mine = my_counters(cpu);
	struct kind_counters *counts = my_kind(cpu, kind);

	if (!mine || !counts)
		return NULL;
	count(&counts->produced);
	base->skipped = 0;
	base->seq = take_seq(mine, ring, &base->skipped);
	base->size = size;
	base->kind = kind;
	base->cpu = cpu;
	base->ring = ring;
	return counts;
}

/*
 * Wakes the reader only when it asked for it: a wake-up for each record costs thirty times the
 * record. Otherwise the reader's timer finds the records. `buffer` is the one that `cpu` writes to,
 * and `size` is of a record that is not reserved yet.
 */
static __always_inline __u64 wakeup(void *buffer, enum event_ring ring, __u32 cpu, __u64 size)
{
	struct reader_state *state = ONLY_ENTRY(reader);
	struct settings *wanted = ONLY_ENTRY(settings);
	__u32 number = ring + bulk_number(ring, cpu);

	if (!state || !wanted || !buffer || state->wake[number] == WAKE_NEVER)
		return BPF_RB_NO_WAKEUP;
	if (state->wake[number] == WAKE_FULL &&
	    bpf_ringbuf_query(buffer, BPF_RB_AVAIL_DATA) + size < wanted->wakeup_bytes[ring])
		return BPF_RB_NO_WAKEUP;
	state->wake[number] = WAKE_NEVER;
	return BPF_RB_FORCE_WAKEUP;
}

/* A wake-up that was not given after all: the next record is to give it. */
static __always_inline void wake_later(enum event_ring ring, __u32 cpu)
{
	struct reader_state *state = ONLY_ENTRY(reader);

	if (state)
		state->wake[ring + bulk_number(ring, cpu)] = WAKE_ANY;
}

/*
 * Copies a numbered record into this CPU's perf buffer. Not 0: it is lost.
 *
 * Two perf events of each CPU write to that buffer: the second wakes the reader with each record, the
 * first when another quarter of the buffer is full. The kernel counts what finds no room, too
 * (PERF_RECORD_LOST), but not what finds no perf event: that of a CPU that has just come up.
 */
static __always_inline long perf_output(void *ctx, void *map, enum event_ring ring,
					struct event_base *record, __u32 size)
{
	struct reader_state *state = ONLY_ENTRY(reader);
	bool wakes = state && state->wake[ring] == WAKE_ANY;
	long result;

	if (wakes)
		state->wake[ring] = WAKE_NEVER;
	result = bpf_perf_event_output(ctx, map, 2 * record->cpu + wakes, record, size);
	if (result && wakes)
		wake_later(ring, 0);
	return result;
}

/*
 * A slot of this CPU's that nothing else uses: what interrupts the program takes another one, and so does
 * what runs while it is preempted. It is ours if ours is the only add; see take_seq() on why it is not
 * a compare-and-exchange. NULL: there is none.
 */
static __always_inline struct perf_slot *take_slot(__u32 cpu)
{
	struct perf_slot *slot;
	__u32 i, index;

	for (i = 0; i < PERF_SLOTS; i++) {
		index = cpu * PERF_SLOTS + i;
		slot = bpf_map_lookup_elem(&perf_slots, &index);
		if (!slot)
			return NULL;
		if (*(volatile __u64 *)&slot->users)
			continue;
		__sync_fetch_and_add(&slot->users, 1);
		if (*(volatile __u64 *)&slot->users == 1)
			return slot;
		__sync_fetch_and_add(&slot->users, -1);
	}
	return NULL;
}

static __always_inline void *reserve(void *buffer, struct event_base *base, const __u32 size)
{
	struct perf_slot *slot;

	if (!perf_buffers)
		return buffer ? bpf_ringbuf_reserve(buffer, size, 0) : NULL;
	slot = take_slot(base->cpu);
	return slot ? slot->record : NULL;
}

/* Room for a record of constant `size`, with its base in place; NULL when it is lost. What is
 * behind the base is the caller's to write, to the last byte: the kernel does not clear it. */
static __always_inline void *begin(void *map, struct event_base *base, enum event_kind kind,
				   enum event_ring ring, const __u32 size)
{
	struct kind_counters *counts = number(base, kind, ring, size);
	void *record, *buffer;

	if (!counts)
		return NULL;
	buffer = buffer_of(map, ring, base->cpu);
	record = base->seq && affords(buffer, base, ring, kind, size) ?
			 reserve(buffer, base, size) : NULL;
	if (!record) {
		count(&counts->lost);
		return NULL;
	}
	*(struct event_base *)record = *base;
	return record;
}

static __always_inline void submit_of_size(void *ctx, void *map, enum event_ring ring,
					   struct event_base *record, const __u32 size)
{
	struct perf_slot *slot;
	struct kind_counters *counts;

	if (!perf_buffers) {
		map = buffer_of(map, ring, record->cpu);
		bpf_ringbuf_submit(record, wakeup(map, ring, record->cpu, 0));
		return;
	}
	if (perf_output(ctx, map, ring, record, size)) {
		counts = my_kind(record->cpu, record->kind);
		if (counts)
			count(&counts->lost);
	}
	slot = (void *)record - offsetof(struct perf_slot, record);
	__sync_fetch_and_add(&slot->users, -1);
}

/* Ends what begin() has begun. `ctx` is the program's own context, which perf events want. */
#define submit(ctx, map, ring, record) \
	submit_of_size(ctx, map, ring, (struct event_base *)(record), sizeof(*(record)))

/* Copies a record of variable size, built elsewhere, into the ring. `ctx` is as of submit(). */
static __always_inline void output(void *ctx, void *map, struct event_base *record,
				   enum event_kind kind, enum event_ring ring, __u32 size)
{
	struct kind_counters *counts = number(record, kind, ring, size);
	__u64 flags;

	if (!counts)
		return;
	if (perf_buffers) {
		if (!record->seq || perf_output(ctx, map, ring, record, size))
			count(&counts->lost);
		return;
	}
	map = buffer_of(map, ring, record->cpu);
	flags = wakeup(map, ring, record->cpu, size);
	if (record->seq && map && affords(map, record, ring, kind, size) &&
	    !bpf_ringbuf_output(map, record, size, flags))
		return;
	count(&counts->lost);
	if (flags == BPF_RB_FORCE_WAKEUP)
		wake_later(ring, record->cpu);
}

/* Makes the compiler keep the types of the contract in the BTF, which generator and loader read. */
const union event_record *event_records __attribute__((unused));
const union table *tables __attribute__((unused));
const struct {
	enum event_schema schema;
	enum event_kind kind;
	enum summary_kind summary;
	struct filter_modes modes;
	struct path_prefix prefix;
	struct number_key number;
	struct comm_key comm;
	struct exe_key exe;
	struct flow_walk walk;
	enum event_ring ring;
	enum event_flags flags;
	enum filter_mode mode;
	enum filter_verdict verdict;
	enum fault fault;
	enum wake wake;
	enum perf_limits perf;
	enum payer_kind payer;
	enum paid paid;
} *other_types __attribute__((unused));

#endif
