"""Room for the node's half of intent-based networking. Nothing is here yet; see the issues."""
