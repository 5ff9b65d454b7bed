"""What serving and training both stand on: decoding, preprocessing, stages on a device, precision, compiling."""
