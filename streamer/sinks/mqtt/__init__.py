"""Events in MQTT messages."""

from streamer.sinks.mqtt.sink import MqttSink

__all__ = ["MqttSink"]
