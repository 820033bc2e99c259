"""The simulator: the shipped edge and hub code on simulated time, network, broker and disk. See README.md here."""
