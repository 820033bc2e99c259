"""Room for the node's half of the distributed memory pool. Nothing is here yet; see the issues."""
