"""Forms for CPUs, each with the name of its op. An op without a file here runs its definition."""
