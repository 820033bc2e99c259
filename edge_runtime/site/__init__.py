"""Edges of one site stand in for each other: who leads, who serves which device. `member` is the pure core, `link` its rim on the local bus."""
