"""The backbones that Backboned ships, a family a file; found by entry point, never imported by the server."""
