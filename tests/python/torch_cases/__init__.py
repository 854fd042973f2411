"""Cases of epd.torch: each runs on every rank of a group, on the host backend as threads, on GPUs as processes."""
