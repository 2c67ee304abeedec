"""What sensors attach to, apart from the kernel as a whole, as the configuration names it."""

from __future__ import annotations

from collections.abc import Mapping

from streamer.config.settings import Kernel
from streamer.kernel.loader import Targets
from streamer.kernel.objects import SENSORS

NO_INTERFACE = "no interface is named: --interface NAME, or `interfaces` in [kernel]"


def targets_of(kernel: Kernel) -> dict[str, Targets]:
    """The targets of every sensor that has any."""
    if not kernel.interfaces:
        return {}
    return {
        name: Targets(kernel.interfaces)
        for name, sensor in SENSORS.items()
        if any("interface" in program.needs for program in sensor.programs)
    }


def without_target(kernel: Kernel) -> Mapping[str, str]:
    """The kinds that nothing reports as long as their target is not named, and why."""
    if kernel.interfaces:
        return {}
    programs = [program for sensor in SENSORS.values() for program in sensor.programs]
    at_interfaces = {kind for one in programs if "interface" in one.needs for kind in one.kinds}
    elsewhere = {kind for one in programs if "interface" not in one.needs for kind in one.kinds}
    return dict.fromkeys(sorted(at_interfaces - elsewhere), NO_INTERFACE)
