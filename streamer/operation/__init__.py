"""What operators see of a running agent: metrics, health, status, and what systemd is told."""
