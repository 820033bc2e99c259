"""One command per promise. Each prints one JSON object last (promise, value, unit, spread, peer, machine, ok) and exits 0 only where ok."""
