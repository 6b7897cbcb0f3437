"""Cost of a run before it starts: hardware rates, FLOPs, memory, traffic, simulated ranks, layouts, presets."""
