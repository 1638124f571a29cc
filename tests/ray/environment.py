"""Ray on a machine that is busy with something else: patience, and workers no nicer than we are."""

BUSY_MACHINE = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
