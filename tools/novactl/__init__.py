"""novactl: one command for people. Talks to the hub's and the edge's HTTP APIs; reads a journal file where asked to."""
