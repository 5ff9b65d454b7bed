"""What operators see: metrics and the HTTP port."""
