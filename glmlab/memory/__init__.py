"""What it costs: probes and recordings (measured), traces, allocator and forecasts (computed)."""
