// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* All programs as one object: they share the rings, the counters and the filters. */
#include "process.bpf.c"
#include "file.bpf.c"
#include "net.bpf.c"

char LICENSE[] SEC("license") = "GPL";

/* Makes the compiler keep the types of the contract in the BTF, which generator and loader read. */
const union event_record *event_records __attribute__((unused));
const struct {
	enum event_schema schema;
	enum event_kind kind;
	enum event_stream stream;
	enum event_flags flags;
	enum filter_mode mode;
	enum filter_verdict verdict;
	enum wake wake;
} *event_enums __attribute__((unused));

/* Never attached: the agent runs it in its own process, and so learns its pid as the hooks see it,
 * whatever pid namespace it is in. */
SEC("raw_tp/streamer_whoami")
int whoami(void *ctx)
{
	agent_pid = bpf_get_current_pid_tgid() >> 32;
	return 0;
}
