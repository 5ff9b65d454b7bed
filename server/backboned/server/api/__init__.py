"""The gRPC room: proto to plain values and back, and nothing else."""
