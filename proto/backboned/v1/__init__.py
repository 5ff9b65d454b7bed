"""The API, version 1: `model_service.proto`, and the code that `make proto` generates from it."""
