"""What a run will take of each rank, by arithmetic: no weights, no processes, no device."""
