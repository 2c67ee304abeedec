"""The sensor of test_targets.py, as a loader is told of it.

Apart from the tests, because a helper imports it too: from Python's own modules and ours alone.
"""

from __future__ import annotations

from streamer.kernel.objects import SENSORS
from streamer.kernel.tags import MapInfo, ProgramInfo, SensorInfo

SENSOR = "test_targets"
CATALOGUE = {
    "core": SENSORS["core"],
    SENSOR: SensorInfo(
        SENSOR,
        (
            ProgramInfo("on_packet", "packets", (), "", ("interface",)),
            ProgramInfo("on_send", "sending", (), "", ("cgroup",)),
            ProgramInfo("on_sample", "samples", (), "", ("rate",)),
        ),
        (
            MapInfo("protocols", "", False, ("interface",)),
            MapInfo("flows", "table:flows", False, ("cgroup",)),
            MapInfo("samples", "", False, ("rate",)),
        ),
    ),
}
