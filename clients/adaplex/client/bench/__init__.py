"""The load generator: workloads, the load they make, what is measured, and how it is told."""
