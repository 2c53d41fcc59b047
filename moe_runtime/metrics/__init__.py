"""What a deployment shows of itself: Prometheus metrics, a line in the log, the load of its experts.

`DeploymentMetrics` is the whole of it; what it exports is listed in docs/metrics.md.
"""
