"""Where events go: the terminal, files, Kafka, MQTT, and memory for tests."""
