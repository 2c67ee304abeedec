"""The kernel side: capabilities, loading and attaching BPF programs, the contract."""
