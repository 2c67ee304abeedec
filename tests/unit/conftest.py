"""Property tests: slow examples tell of a busy machine, not of a defect."""

from hypothesis import HealthCheck, settings

settings.register_profile("streamer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamer")
