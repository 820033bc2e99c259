"""Room for drivers for containers, micro-VMs, VMs, functions and batch jobs; reconcile, checkpoint, convert. Nothing is here yet; see the issues."""
