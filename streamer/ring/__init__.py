"""Reading: from the bytes in BPF ring buffers to events in order, and to the gaps between them."""
