"""Keeps Ray on loopback where it is started for one command on one machine; to be said before Ray is imported."""

import os

# Ray's processes find each other over 127.0.0.1, as on other systems, instead of every address of the machine.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def stay_on_loopback() -> None:
    """Have Ray started here listen on loopback alone; a cluster that RAY_ADDRESS names has addresses of its own."""
    if "RAY_ADDRESS" not in os.environ:
        os.environ.update(LOOPBACK)
