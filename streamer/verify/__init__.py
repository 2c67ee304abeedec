"""Checks what a topic or file holds: which events are missing, and whether the stream says why.

Records come in as bytes, from files, Kafka or MQTT; a report goes out, as text or JSON.
"""
