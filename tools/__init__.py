"""Tools around NovaCron: novactl, benchmarks, the demo, the fault proxy, model training."""
