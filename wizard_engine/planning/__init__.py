"""What a run costs before it starts: hardware rates, FLOPs, memory, traffic, simulated ranks, layouts, presets."""
