"""Events in Kafka."""

from streamer.sinks.kafka.sink import KafkaSink

__all__ = ["KafkaSink"]
