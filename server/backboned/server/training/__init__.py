"""Fine-tuning: jobs, datasets, features of frozen stages, and the trainer in a process of its own."""
