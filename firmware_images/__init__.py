"""Room for bootable images of the edge (amd64, arm64, riscv64). Nothing is here yet."""
