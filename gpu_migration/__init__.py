"""The migration engine: moves files, disks and guest memory, encrypted, in parallel, resumable, committed at once. Imports nothing of ours."""
