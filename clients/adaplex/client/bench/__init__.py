"""The load generator: workloads, the requests they send, measurements and reports."""
