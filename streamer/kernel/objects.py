"""GENERATED from bpf/ by `make gen`: do not edit.

What the compiled objects hold, for whoever loads them and reads their maps. Imports little: the
privileged process needs it.
"""

# ruff: noqa: E501
from __future__ import annotations

from streamer.kernel.tags import MapInfo, ProgramInfo, SensorInfo

CONTRACT: dict[str, tuple[tuple[str, int, int], ...]] = {
    "event_base": (('boot_ns', 0, 8), ('seq', 8, 8), ('size', 16, 4), ('weight', 20, 4), ('kind', 24, 2), ('cpu', 26, 2), ('skipped', 28, 1), ('ring', 29, 1), ('cut', 30, 1), ('flags', 31, 1)),
    "event_task": (('start_boot_ns', 0, 8), ('cgroup_id', 8, 8), ('pid', 16, 4), ('tid', 20, 4), ('ppid', 24, 4), ('uid', 28, 4), ('gid', 32, 4), ('pidns', 36, 4), ('ns_pid', 40, 4), ('pad', 44, 4), ('comm', 48, 16)),
    "settings": (('wakeup_bytes', 0, 16), ('filter_pid', 16, 1), ('filter_uid', 17, 1), ('filter_comm', 18, 1), ('filter_cgroup', 19, 1), ('filter_exe', 20, 1), ('task_filters', 21, 1), ('filter_port', 22, 1), ('filter_path', 23, 1)),
    "kind_settings": (('enabled', 0, 4), ('sample', 4, 4)),
    "identity": (('agent_pids', 0, 8), ('initial_mntns', 8, 4), ('pad', 12, 4)),
    "kind_counters": (('produced', 0, 8), ('filtered', 8, 8), ('shed', 16, 8), ('lost', 24, 8)),
    "cpu_counters": (('seq', 0, 16), ('skipped', 16, 16), ('pad', 32, 32)),
    "reader_state": (('wake', 0, 8),),
    "path_prefix": (('bits', 0, 4), ('path', 4, 256)),
    "exe_key": (('inode', 0, 8), ('dev', 8, 4), ('pad', 12, 4)),
    "process_exec": (('base', 0, 32), ('task', 32, 64), ('start_time_ns', 96, 8), ('exe_inode', 104, 8), ('exe_dev', 112, 4), ('exe_nlink', 116, 4), ('exe_mntns', 120, 4), ('cwd_mntns', 124, 4), ('parent_exe_mntns', 128, 4), ('euid', 132, 4), ('auid', 136, 4), ('argc', 140, 4), ('exe_len', 144, 2), ('argv_len', 146, 2), ('cwd_len', 148, 2), ('parent_exe_len', 150, 2), ('filename_len', 152, 2), ('interp_len', 154, 2), ('exe_mntns_initial', 156, 1), ('cwd_mntns_initial', 157, 1), ('parent_exe_mntns_initial', 158, 1), ('exe_deleted', 159, 1), ('exe_memfd', 160, 1), ('pad', 161, 7), ('parent_comm', 168, 16), ('data', 184, 36864)),
    "process_fork": (('base', 0, 32), ('task', 32, 64), ('child_start_boot_ns', 96, 8), ('child_start_time_ns', 104, 8), ('child_pid', 112, 4), ('child_ppid', 116, 4), ('child_pidns', 120, 4), ('child_ns_pid', 124, 4)),
    "process_exit": (('base', 0, 32), ('task', 32, 64), ('start_time_ns', 96, 8), ('duration_ns', 104, 8), ('exit_code', 112, 4), ('signal', 116, 4), ('core_dumped', 120, 1), ('pad', 121, 7)),
    "file_open": (('base', 0, 32), ('task', 32, 64), ('latency_ns', 96, 8), ('inode', 104, 8), ('dev', 112, 4), ('fd', 116, 4), ('errno', 120, 4), ('flags', 124, 4), ('mode', 128, 4), ('mntns', 132, 4), ('path_len', 136, 2), ('mntns_initial', 138, 1), ('pad', 139, 5), ('data', 144, 8192)),
    "net_connect": (('base', 0, 32), ('task', 32, 64), ('latency_ns', 96, 8), ('errno', 104, 4), ('netns', 108, 4), ('local_port', 112, 2), ('remote_port', 114, 2), ('ip_version', 116, 1), ('direction', 117, 1), ('owner_known', 118, 1), ('pad', 119, 1), ('local_addr', 120, 16), ('remote_addr', 136, 16)),
    "net_accept": (('base', 0, 32), ('task', 32, 64), ('fd', 96, 4), ('netns', 100, 4), ('local_port', 104, 2), ('remote_port', 106, 2), ('ip_version', 108, 1), ('direction', 109, 1), ('owner_known', 110, 1), ('pad', 111, 1), ('local_addr', 112, 16), ('remote_addr', 128, 16)),
    "net_close": (('base', 0, 32), ('task', 32, 64), ('duration_ns', 96, 8), ('bytes_sent', 104, 8), ('bytes_received', 112, 8), ('errno', 120, 4), ('netns', 124, 4), ('local_port', 128, 2), ('remote_port', 130, 2), ('ip_version', 132, 1), ('direction', 133, 1), ('owner_known', 134, 1), ('pad', 135, 1), ('local_addr', 136, 16), ('remote_addr', 152, 16)),
    "enum event_schema": (('SCHEMA_VERSION', 3, 0),),
    "enum event_kind": (('KIND_PROCESS_EXEC', 1, 0), ('KIND_PROCESS_FORK', 2, 0), ('KIND_PROCESS_EXIT', 3, 0), ('KIND_FILE_OPEN', 16, 0), ('KIND_NET_CONNECT', 32, 0), ('KIND_NET_ACCEPT', 33, 0), ('KIND_NET_CLOSE', 34, 0), ('KIND_END', 35, 0)),
    "enum event_ring": (('RING_CRITICAL', 0, 0), ('RING_BULK', 1, 0), ('RING_END', 2, 0)),
    "enum event_flags": (('FLAG_INCOMPLETE', 1, 0),),
    "enum filter_mode": (('FILTER_OFF', 0, 0), ('FILTER_EXCLUDE', 1, 0), ('FILTER_INCLUDE', 2, 0)),
    "enum filter_verdict": (('VERDICT_KEEP', 1, 0), ('VERDICT_DROP', 2, 0)),
    "enum fault": (('FAULT_CONNECTIONS_FULL', 0, 0), ('FAULT_SOCKET_STORAGE', 1, 0), ('FAULT_LISTENERS_FULL', 2, 0), ('FAULT_AGENT_PEERS_FULL', 3, 0), ('FAULT_EXITED_FULL', 4, 0), ('FAULT_FAILED_FULL', 5, 0), ('FAULT_OPEN_STARTS_FULL', 6, 0), ('FAULT_UNREADABLE', 7, 0), ('FAULT_NO_SLOT', 8, 0), ('FAULT_CHANGE_UNSEEN', 9, 0), ('FAULT_END', 10, 0)),
    "enum wake": (('WAKE_NEVER', 0, 0), ('WAKE_FULL', 1, 0), ('WAKE_ANY', 2, 0)),
}
"""Every shared struct: its members with offset and size in bytes; and
every shared enum: its names with their numbers, and 0."""

KIND_NUMBERS: dict[str, int] = {"process.exec": 1, "process.fork": 2, "process.exit": 3, "file.open": 16, "net.connect": 32, "net.accept": 33, "net.close": 34}
"""The number of each kind."""

KIND_END = 35
"""What is kept by kind has so many entries for each CPU."""

SENSORS: dict[str, SensorInfo] = {
    "core": SensorInfo("core", (
    ), (
        MapInfo("bulk", "", True, ()),
        MapInfo("counters", "cpus", True, ()),
        MapInfo("critical", "", True, ()),
        MapInfo("faults", "", True, ()),
        MapInfo("filter_cgroups", "", True, ()),
        MapInfo("filter_comms", "", True, ()),
        MapInfo("filter_exes", "", True, ()),
        MapInfo("filter_paths", "", True, ()),
        MapInfo("filter_pids", "", True, ()),
        MapInfo("filter_ports", "", True, ()),
        MapInfo("filter_uids", "", True, ()),
        MapInfo("identities", "", True, ()),
        MapInfo("kind_counters", "cpus,kinds", True, ()),
        MapInfo("kind_settings", "", True, ()),
        MapInfo("reader", "", True, ()),
        MapInfo("settings", "", True, ()),
    )),
    "file": SensorInfo("file", (
        ProgramInfo("on_open", "open", ("file.open",), "opens by open()", ("x86_64",)),
        ProgramInfo("on_open_exit", "open", ("file.open",), "opens by open()", ("x86_64",)),
        ProgramInfo("on_creat", "creat", ("file.open",), "opens by creat()", ("x86_64",)),
        ProgramInfo("on_creat_exit", "creat", ("file.open",), "opens by creat()", ("x86_64",)),
        ProgramInfo("on_openat", "openat", ("file.open",), "opens by openat()", ()),
        ProgramInfo("on_openat_exit", "openat", ("file.open",), "opens by openat()", ()),
        ProgramInfo("on_openat2", "openat2", ("file.open",), "opens by openat2()", ()),
        ProgramInfo("on_openat2_exit", "openat2", ("file.open",), "opens by openat2()", ()),
        ProgramInfo("on_open_start", "open_start", ("file.open",), "latencies of open()", ("option:open_latency", "x86_64"), False),
        ProgramInfo("on_open_enter", "open_start", ("file.open",), "latencies of open()", ("option:open_latency", "x86_64"), False),
        ProgramInfo("on_creat_start", "creat_start", ("file.open",), "latencies of creat()", ("option:open_latency", "x86_64"), False),
        ProgramInfo("on_creat_enter", "creat_start", ("file.open",), "latencies of creat()", ("option:open_latency", "x86_64"), False),
        ProgramInfo("on_openat_start", "openat_start", ("file.open",), "latencies of openat()", ("option:open_latency",), False),
        ProgramInfo("on_openat_enter", "openat_start", ("file.open",), "latencies of openat()", ("option:open_latency",), False),
        ProgramInfo("on_openat2_start", "openat2_start", ("file.open",), "latencies of openat2()", ("option:open_latency",), False),
        ProgramInfo("on_openat2_enter", "openat2_start", ("file.open",), "latencies of openat2()", ("option:open_latency",), False),
    ), (
        MapInfo("bulk", "", True, ()),
        MapInfo("counters", "cpus", True, ()),
        MapInfo("critical", "", True, ()),
        MapInfo("faults", "", True, ()),
        MapInfo("filter_cgroups", "", True, ()),
        MapInfo("filter_comms", "", True, ()),
        MapInfo("filter_exes", "", True, ()),
        MapInfo("filter_paths", "", True, ()),
        MapInfo("filter_pids", "", True, ()),
        MapInfo("filter_ports", "", True, ()),
        MapInfo("filter_uids", "", True, ()),
        MapInfo("identities", "", True, ()),
        MapInfo("kind_counters", "cpus,kinds", True, ()),
        MapInfo("kind_settings", "", True, ()),
        MapInfo("open_scratches", "cpus", False, ()),
        MapInfo("open_starts", "", False, ("option:open_latency", "function:bpf_task_storage_get")),
        MapInfo("path_buffers", "cpus", False, ()),
        MapInfo("reader", "", True, ()),
        MapInfo("settings", "", True, ()),
    )),
    "net": SensorInfo("net", (
        ProgramInfo("on_sock_state", "sock_state", ("net.connect", "net.close"), "", ("function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_sock_state_untyped", "sock_state", ("net.connect", "net.close"), "", ("function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_sock_state_alone", "sock_state", ("net.connect", "net.close"), "", ("no function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_sock_state_alone_untyped", "sock_state", ("net.connect", "net.close"), "", ("no function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_sock_state_twin", "sock_state_twin", ("net.connect", "net.close"), "changes of state that interrupt another one", ("function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_sock_state_twin_untyped", "sock_state_twin", ("net.connect", "net.close"), "changes of state that interrupt another one", ("function:bpf_prog_inc_misses_counter",)),
        ProgramInfo("on_destroyed", "on_destroyed", ("net.close",), "closes that both programs on the hook of socket states missed", ("function:bpf_preempt_disable",), False),
        ProgramInfo("on_destroyed_twin", "on_destroyed_twin", ("net.close",), "closes that both programs on the hook of socket states missed", ("function:bpf_preempt_disable",), False),
        ProgramInfo("on_connect", "connect", ("net.connect",), "connects that fail before a SYN is sent (no route, no free port)", ()),
        ProgramInfo("on_connect_exit", "connect", ("net.connect",), "connects that fail before a SYN is sent (no route, no free port)", ()),
        ProgramInfo("on_accept", "accept", ("net.accept", "net.close"), "connections taken by accept(), and their owner at the close,", ()),
        ProgramInfo("on_accept_exit", "accept", ("net.accept", "net.close"), "connections taken by accept(), and their owner at the close,", ()),
        ProgramInfo("on_accept4", "accept4", ("net.accept", "net.close"), "connections taken by accept4(), and their owner at the close,", ()),
        ProgramInfo("on_accept4_exit", "accept4", ("net.accept", "net.close"), "connections taken by accept4(), and their owner at the close,", ()),
    ), (
        MapInfo("bulk", "", True, ()),
        MapInfo("connections", "table:connections", False, ()),
        MapInfo("counters", "cpus", True, ()),
        MapInfo("critical", "", True, ()),
        MapInfo("faults", "", True, ()),
        MapInfo("filter_cgroups", "", True, ()),
        MapInfo("filter_comms", "", True, ()),
        MapInfo("filter_exes", "", True, ()),
        MapInfo("filter_paths", "", True, ()),
        MapInfo("filter_pids", "", True, ()),
        MapInfo("filter_ports", "", True, ()),
        MapInfo("filter_uids", "", True, ()),
        MapInfo("identities", "", True, ()),
        MapInfo("kind_counters", "cpus,kinds", True, ()),
        MapInfo("kind_settings", "", True, ()),
        MapInfo("reader", "", True, ()),
        MapInfo("settings", "", True, ()),
    )),
    "process": SensorInfo("process", (
        ProgramInfo("on_exec", "on_exec", ("process.exec",), "", ()),
        ProgramInfo("on_fork", "on_fork", ("process.fork",), "", ()),
        ProgramInfo("on_exit", "on_exit", ("process.exit",), "", ()),
    ), (
        MapInfo("bulk", "", True, ()),
        MapInfo("counters", "cpus", True, ()),
        MapInfo("critical", "", True, ()),
        MapInfo("exec_records", "cpus", False, ()),
        MapInfo("faults", "", True, ()),
        MapInfo("filter_cgroups", "", True, ()),
        MapInfo("filter_comms", "", True, ()),
        MapInfo("filter_exes", "", True, ()),
        MapInfo("filter_paths", "", True, ()),
        MapInfo("filter_pids", "", True, ()),
        MapInfo("filter_ports", "", True, ()),
        MapInfo("filter_uids", "", True, ()),
        MapInfo("identities", "", True, ()),
        MapInfo("kind_counters", "cpus,kinds", True, ()),
        MapInfo("kind_settings", "", True, ()),
        MapInfo("path_buffers", "cpus", False, ()),
        MapInfo("reader", "", True, ()),
        MapInfo("settings", "", True, ()),
    )),
}
"""The objects by name: their programs and maps."""
