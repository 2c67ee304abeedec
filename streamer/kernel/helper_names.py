"""GENERATED from bpf/ by `make gen`: do not edit.

The helpers that the compiled objects call.
"""

from __future__ import annotations

HELPERS: dict[int, str] = {
    1: "bpf_map_lookup_elem",
    2: "bpf_map_update_elem",
    3: "bpf_map_delete_elem",
    5: "bpf_ktime_get_ns",
    7: "bpf_get_prandom_u32",
    8: "bpf_get_smp_processor_id",
    14: "bpf_get_current_pid_tgid",
    15: "bpf_get_current_uid_gid",
    16: "bpf_get_current_comm",
    25: "bpf_perf_event_output",
    26: "bpf_skb_load_bytes",
    27: "bpf_get_stackid",
    35: "bpf_get_current_task",
    46: "bpf_get_socket_cookie",
    68: "bpf_skb_load_bytes_relative",
    80: "bpf_get_current_cgroup_id",
    87: "bpf_map_push_elem",
    88: "bpf_map_pop_elem",
    93: "bpf_spin_lock",
    94: "bpf_spin_unlock",
    95: "bpf_sk_fullsock",
    107: "bpf_sk_storage_get",
    112: "bpf_probe_read_user",
    113: "bpf_probe_read_kernel",
    114: "bpf_probe_read_user_str",
    115: "bpf_probe_read_kernel_str",
    123: "bpf_get_current_ancestor_cgroup_id",
    125: "bpf_ktime_get_boot_ns",
    130: "bpf_ringbuf_output",
    131: "bpf_ringbuf_reserve",
    132: "bpf_ringbuf_submit",
    134: "bpf_ringbuf_query",
    156: "bpf_task_storage_get",
    158: "bpf_get_current_task_btf",
    175: "bpf_task_pt_regs",
}
"""Name of each helper, by its number."""
