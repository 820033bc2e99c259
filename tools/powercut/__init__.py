"""Power cuts that are not simulated: a real agent on a real ext4 whose every block write is recorded, and what a cut at each of them leaves."""
